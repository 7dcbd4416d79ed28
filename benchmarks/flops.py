"""Count the operations of one image, by part of the network and by step of the plan.

    python benchmarks/flops.py --preset show-o2-1.5b --steps 50 --no-flashu
    python benchmarks/flops.py --preset show-o2-1.5b --flashu paper-1.5b
    python benchmarks/flops.py --all --json                 # every size of the release, as README's table has them

Runs the real sampler and VAE on PyTorch's `meta` device (see `flashu.flops`): no weights, no GPU. Beside it stands the
same image as the release makes it.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from hardware import describe

from flashu.acceleration.plan import Plan, make_plan
from flashu.config import FLASHU_PRESETS, GUIDANCE_SCALE, NUM_INFERENCE_STEPS, flashu_preset
from flashu.flops import ONCE, FlopCount, count_image, count_release, format_plan
from flashu.models.geometry import PRESETS, parse_size, preset
from flashu.patch import Acceleration

RELEASED = [name for name in PRESETS if name.startswith("show-o2-")]
SETTINGS = (None, "paper-1.5b", "few-steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="show-o2-1.5b", choices=PRESETS, help="the model's size")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--flashu", choices=FLASHU_PRESETS, help="FlashU settings")
    chosen.add_argument("--no-flashu", action="store_true", help="the unaccelerated model (the default)")
    chosen.add_argument("--all", action="store_true", help="every size of the release, with and without FlashU")
    parser.add_argument("--steps", type=int, help="points of the time grid (default: the settings', or 50)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE, help="0 or 1 leave the unconditional row out")
    parser.add_argument("--prefix", type=int, default=62, help="tokens of the prompt with bos and boi (default 62)")
    parser.add_argument("--size", type=int, help="pixels per side (default: the preset's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    try:
        if options.all:
            print_all([count(name, flashu, options)[2] for name in RELEASED for flashu in SETTINGS], options.json)
            return
        plan, cost, result = count(options.preset, options.flashu, options)
    except ValueError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_one(plan, cost, result)


def count(name: str, flashu: str | None, options: argparse.Namespace) -> tuple[Plan, FlopCount, dict[str, Any]]:
    """The plan, its cost, and both as what JSON holds. Raises `ValueError` for settings that do not go together."""
    settings = flashu_preset(flashu) if flashu else None
    steps = options.steps
    if steps is None:
        steps = settings.total_steps if settings else NUM_INFERENCE_STEPS
    config, vae = preset(name)
    plan = (
        Acceleration.of(settings, config.llm).plan(steps, options.guidance)
        if settings
        else make_plan(None, steps, options.guidance)
    )
    grid = parse_size(options.size, config.native_grid)
    cost = count_image(config, vae, plan, grid, options.prefix)
    return (
        plan,
        cost,
        {
            "preset": name,
            "flashu": flashu,
            "steps": steps,
            "guidance": options.guidance,
            "prefix_tokens": options.prefix,
            "tflop_per_image": cost.total / 1e12,
            "tflop_release_without_vae": sum(count_release(config, settings, steps, grid)) / 1e12,
            "parts": {part: flop / 1e12 for part, flop in cost.parts.items()},
            "tflop_per_step": [flop / 1e12 for flop in cost.rows],
        },
    )


def print_all(counts: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(describe(torch.device("meta")) | {"counts": counts}, indent=1))
        return
    print(f"{'preset':<24}{'FlashU':<12}{'TFLOP':>9}{'release':>9}")
    for each in counts:
        total, release = each["tflop_per_image"], each["tflop_release_without_vae"]
        print(f"{each['preset']:<24}{each['flashu'] or 'off':<12}{total:>9.1f}{release:>9.1f}")


def print_one(plan: Plan, cost: FlopCount, result: dict[str, Any]) -> None:
    print(
        f"{result['preset']}, {len(plan.rows)} steps, prefix {result['prefix_tokens']} tokens; "
        f"FlashU: {result['flashu'] or 'off'}\n"
    )
    if result["flashu"]:
        print(format_plan(plan, cost.rows))
    total, release = result["tflop_per_image"], result["tflop_release_without_vae"]
    print(f"{'part':<12}{'TFLOP':>10}{'share':>9}{'per step':>11}")
    for part, tflop in sorted(result["parts"].items(), key=lambda item: -item[1]):
        each = "" if part in ONCE else f"{tflop / len(plan.rows):>11.4f}"
        print(f"{part:<12}{tflop:>10.3f}{tflop / total:>9.1%}{each}")
    print(f"{'one image':<12}{total:>10.3f}")
    print(f"{'the release':<12}{release:>10.3f} without its VAE, with the same settings ({release / total:.2f}x)")


if __name__ == "__main__":
    main()
