"""Count what the host dispatches for one batch of images, by part of the network, and where it waits for the device.

    python benchmarks/launches.py
    python benchmarks/launches.py --preset show-o2-7b --images 8 --json result.json

A batch of one is bound by the host, and there this is what one can take off. The real sampler and VAE run on PyTorch's
`meta` device, with projections joined as on a GPU: no weights, no GPU. Once uncompiled; once as if what `Blocks` calls
were compiled: each such call is then one, and what is dispatched around them counts as before; and once as if calls
were captured as CUDA graphs, each replay of which is one. What an operator is, and a wait, stands in `dispatched.py`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from dispatched import CALL, CAPTURED, OPERATOR, UNCOMPILED, WAIT, WAYS, Event, Launches, told_place
from hardware import describe
from time_split import OTHER, labelled

from flashu import sampler
from flashu.acceleration import layer_skipping
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.plan import Plan
from flashu.config import GUIDANCE_SCALE, flashu_preset
from flashu.flops import any_text
from flashu.models.geometry import PATCH_SIZE, Showo2Config, VaeGeometry
from flashu.models.presets import PRESETS, preset
from flashu.models.showo2 import Showo2
from flashu.models.wan_vae import WanVae

SETTINGS = ("off", "paper-1.5b", "few-steps")
PREFIX_TOKENS = 62  # of a prompt with bos and boi
PARTS = {
    "_embed_span": "image path",
    "run_llm": "LLM",
    "measure_llm": "LLM",
    "run_head": "head",
    "run_final": "final layer",
    "lay_out_text": "prefix",
    "read_text": "prefix",
    "embed_times": "times",
}
VAE = "VAE"
ORDER = (*dict.fromkeys(PARTS.values()), VAE, OTHER)
MOST_PLACES = 15  # that are printed; the JSON has them all


@torch.no_grad()
def count_launches(
    config: Showo2Config, vae: VaeGeometry, plan: Plan, images: int = 1, way: str = UNCOMPILED
) -> Launches:
    """What one batch dispatches, from noise to pixels: where calls are captured, one after those that captured them."""
    grid = config.native_grid
    with torch.device("meta"):
        model, decoder = Showo2(config).bfloat16(), WanVae(vae).bfloat16()
    model.join()
    height, width = (side * PATCH_SIZE for side in grid)
    noise = sampler.initial_noise(range(images), config.image_latent_dim, height, width)
    text = any_text(config, plan, grid, PREFIX_TOKENS, images)
    points = sampler.time_grid(plan.num_inference_steps)
    launches = Launches()
    calls = [*((model, method, part) for method, part in PARTS.items()), (decoder, "decode_pixels", VAE)]
    blocks = launches.blocks(way)
    with labelled(calls, launches.within), launches:
        for _ in range(3 if way == CAPTURED else 1):
            launches.events.clear()
            launches.step = 0
            states = sampler.trajectory(model, noise, text, points, plan, blocks)
            latents = next(states)
            for step in plan.steps:
                latents = next(states)
                launches.step = step.number
            decoder.decode_pixels(latents)
    return launches


def summary(launches: Launches, plan: Plan) -> dict[str, Any]:
    """As the JSON has it. The first step stands apart, as it makes the times and its prefix."""
    steps = len(plan.steps)
    per_step = launches.by(lambda event: event.step, OPERATOR, CALL)
    return {
        "together": sum(per_step.values()),
        "per_step": [per_step.get(step, 0) for step in range(steps)],
        "calls": launches.by(lambda event: event.name, CALL),
        "operators": launches.by(lambda event: event.part, OPERATOR),
        "operators_by_name": launches.by(lambda event: event.name, OPERATOR),
        "operators_by_place": launches.by(_where, OPERATOR),
        "waits": {
            "first_step": launches.by(_where, WAIT, steps=range(1)),
            "later": launches.by(_where, WAIT, steps=range(1, steps + 1)),
        },
    }


def _where(event: Event) -> str:
    return event.place if event.kind == OPERATOR else f"{event.place} {event.name}"


def count_settings(name: str, flashu_name: str, images: int) -> dict[str, Any]:
    """All ways of one setting, as the JSON has them."""
    config, vae = preset(name)
    settings = flashu_preset(flashu_name)
    plan = Acceleration.of(settings, config.llm).plan(settings.total_steps, GUIDANCE_SCALE)
    choice = layer_skipping.least_important.__code__
    return {
        "flashu": flashu_name,
        "evaluations": len(plan.steps),
        **{way: summary(count_launches(config, vae, plan, images, way), plan) for way in WAYS},
        "waits_after_measuring": {
            told_place(choice.co_filename, choice.co_firstlineno): sum(step.measure for step in plan.steps)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="show-o2-1.5b", choices=PRESETS, help="the model's size")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="of the batch (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    options = parser.parse_args()
    if options.images < 1:
        parser.error(f"--images {options.images}: a batch has one at least")
    counts = [count_settings(options.preset, flashu_name, options.images) for flashu_name in SETTINGS]
    print(f"{options.preset}, a batch of {options.images}, prefix {PREFIX_TOKENS} tokens, guided\n")
    print_counts(counts)
    if options.json:
        result = {
            **describe(torch.device("meta")),
            "command": "python benchmarks/launches.py " + shlex.join(sys.argv[1:]),
            "preset": options.preset,
            "images": options.images,
            "prefix_tokens": PREFIX_TOKENS,
            "counts": counts,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def print_counts(counts: Sequence[dict[str, Any]]) -> None:
    waits = [each["compiled"]["waits"] for each in counts]
    measured = [each["waits_after_measuring"] for each in counts]
    together = [
        sum(sum(places.values()) for places in (*waits_of.values(), after))
        for waits_of, after in zip(waits, measured, strict=True)
    ]
    print_table("", {"evaluations": [each["evaluations"] for each in counts], "waits": together})
    for way in WAYS:
        ways = [each[way] for each in counts]
        rows = {f"calls of {name}": numbers for name, numbers in side_by_side([each["calls"] for each in ways]).items()}
        rows |= {part: [each["operators"].get(part, 0) for each in ways] for part in ORDER}
        rows["together"] = [each["together"] for each in ways]
        rows["in a step, the median"] = [statistics.median_low(each["per_step"]) for each in ways]
        print_table(f"operators, {way}", rows)
    for way in WAYS:
        print_table(f"operators by place, {way}", side_by_side([each[way]["operators_by_place"] for each in counts]))
    print_table("waits in the first step", side_by_side([each["first_step"] for each in waits]))
    print_table("waits later", side_by_side([each["later"] for each in waits]))
    print_table("waits after measuring", side_by_side(measured))


def side_by_side(columns: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """Of what columns name, the rows with the largest numbers, most first."""
    rows = {name: [column.get(name, 0) for column in columns] for column in columns for name in column}
    return dict(sorted(rows.items(), key=lambda row: -max(row[1]))[:MOST_PLACES])


def print_table(title: str, rows: Mapping[str, Sequence[int]]) -> None:
    print(f"{title:<48}" + "".join(f"{setting:>12}" for setting in SETTINGS))
    for name, numbers in rows.items():
        print(f"  {name:<46}" + "".join(f"{number:>12,}" for number in numbers))
    print()


if __name__ == "__main__":
    main()
