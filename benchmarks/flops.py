"""Count the operations of one image, by part of the network and by step of the plan.

    python benchmarks/flops.py --preset show-o2-1.5b --steps 50 --no-flashu
    python benchmarks/flops.py --preset show-o2-1.5b --flashu paper-1.5b
    python benchmarks/flops.py --all --json                 # every size of the release, as the docs have them
    python benchmarks/flops.py --all --lengths benchmarks/results/2026-11-28-dpg-lengths.json    # over real prompts
    python benchmarks/flops.py --count-lengths prompts.txt --tokenizer Qwen/Qwen2.5-1.5B-Instruct > lengths.json

Runs the real sampler and VAE on PyTorch's `meta` device (see `flashu.flops`): no weights, no GPU. Beside it stands the
same image as the release makes it. What an image costs goes by the length of its prompt, and `--lengths` gives the mean
over many.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from hardware import describe, describe_host

from flashu.acceleration.applied import Acceleration
from flashu.acceleration.plan import Plan, make_plan
from flashu.config import FLASHU_PRESETS, GUIDANCE_SCALE, NUM_INFERENCE_STEPS, flashu_preset
from flashu.flops import ONCE, FlopCount, count_image, count_release, format_plan
from flashu.models.geometry import token_grid
from flashu.models.presets import PRESETS, preset
from flashu.tokenizer import PromptTokenizer

RELEASED = [name for name in PRESETS if name.startswith("show-o2-")]
SETTINGS = (None, "paper-1.5b", "few-steps")
FRAME = 2  # bos and boi, which stand around a prompt's text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="show-o2-1.5b", choices=PRESETS, help="the model's size")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--flashu", choices=FLASHU_PRESETS, help="FlashU settings")
    chosen.add_argument("--no-flashu", action="store_true", help="the unaccelerated model (the default)")
    chosen.add_argument("--all", action="store_true", help="every size of the release, with and without FlashU")
    parser.add_argument("--steps", type=int, help="points of the time grid (default: the settings', or 50)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE, help="0 or 1 leave the unconditional row out")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--prefix", type=int, default=62, help="tokens of the prompt with bos and boi (default 62)")
    length.add_argument("--lengths", type=Path, metavar="FILE", help="the mean over prompts of these lengths")
    length.add_argument("--count-lengths", metavar="PROMPTS", help="print what --lengths reads, of a file of prompts")
    parser.add_argument("--tokenizer", help="of --count-lengths: a folder or hub id of Qwen2.5 or Show-o2")
    parser.add_argument("--size", type=int, help="pixels per side (default: the preset's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    if bool(options.count_lengths) != bool(options.tokenizer):
        parser.error("--count-lengths and --tokenizer go together")
    try:
        if options.count_lengths:
            print(json.dumps(count_lengths(options.count_lengths, options.tokenizer), indent=1))
            return
        lengths = read_lengths(options.lengths) if options.lengths else None
        if options.all:
            counts = [count(name, flashu, options, lengths)[2] for name in RELEASED for flashu in SETTINGS]
            print_all(counts, options.json)
            return
        plan, cost, result = count(options.preset, options.flashu, options, lengths)
    except ValueError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_one(plan, cost, result)


def count(
    name: str, flashu: str | None, options: argparse.Namespace, lengths: Counter[int] | None = None
) -> tuple[Plan, FlopCount, dict[str, Any]]:
    """The plan, its cost, and both as what JSON holds. Raises `ValueError` for settings that do not go together.

    lengths: how many prompts have how many tokens of text; the cost is then the mean over them.
    """
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
    grid = token_grid(options.size, config.native_grid)
    limit = config.max_text_tokens(math.prod(grid))
    prefixes, prompts = Counter([options.prefix]), {}
    if lengths:
        prefixes = Counter(FRAME + min(length, limit) for length in lengths.elements())
        prompts = {"prompts": summary(lengths) | {"cut": sum(length > limit for length in lengths.elements())}}
    shares = mean_shares(prefixes)
    cost = mean_cost({prefix: count_image(config, vae, plan, grid, prefix) for prefix in shares}, shares)
    return (
        plan,
        cost,
        {
            "preset": name,
            "flashu": flashu,
            "steps": steps,
            "guidance": options.guidance,
            "prefix_tokens": statistics.mean(prefixes.elements()),
            **prompts,
            "tflop_per_image": cost.total / 1e12,
            "tflop_release_without_vae": sum(count_release(config, settings, steps, grid)) / 1e12,
            "parts": {part: flop / 1e12 for part, flop in cost.parts.items()},
            "tflop_per_step": [flop / 1e12 for flop in cost.steps],
        },
    )


def mean_shares(prefixes: Counter[int]) -> dict[int, Fraction]:
    """What to multiply the costs of at most four prefixes by, so that their sum is the mean cost over all.

    That is exact, as the cost is a quadratic of the prefix's length: what attends and what is attended to both grow
    with it. These are the means of the Lagrange polynomials through the shortest, the middle and the longest. A prompt
    without text stands apart: its prefix is also guidance's, and run once.
    """
    empty, ordered = prefixes[FRAME], sorted(length for length in prefixes if length != FRAME)
    shares = {FRAME: Fraction(empty, prefixes.total())} if empty else {}
    nodes = {ordered[0], ordered[len(ordered) // 2], ordered[-1]} if ordered else set()
    for node in sorted(nodes):
        others = nodes - {node}
        shares[node] = sum(
            Fraction(prefixes[length], prefixes.total())
            * math.prod(Fraction(length - other, node - other) for other in others)
            for length in ordered
        )
    return shares


def mean_cost(costs: Mapping[int, FlopCount], shares: Mapping[int, Fraction]) -> FlopCount:
    """The mean of `costs`, by prefix, as `mean_shares` weighs them."""

    def mean(flop: Mapping[int, int]) -> int:
        return round(sum(shares[prefix] * flop[prefix] for prefix in shares))

    first, *_ = costs.values()
    return FlopCount(
        [mean({prefix: cost.steps[row] for prefix, cost in costs.items()}) for row in range(len(first.steps))],
        {part: mean({prefix: cost.parts[part] for prefix, cost in costs.items()}) for part in first.parts},
    )


def count_lengths(file: str, tokenizer: str) -> dict[str, Any]:
    """How many prompts of a file that a manifest can be built from have how many tokens of text.

    Raises `ValueError` where there are none, or no tokenizer.
    """
    from manifests.sources import read_sources

    encoder = PromptTokenizer.from_pretrained(tokenizer)
    prompts = [prompt for batch in read_sources([file], {}) for prompt in batch.known["prompt"]]
    lengths = Counter(len(encoder.tokenizer.encode(prompt, add_special_tokens=False).ids) for prompt in prompts)
    if not lengths:
        raise ValueError(f"{file} has no prompts")
    names = Path(file).name, Path(tokenizer).name
    return {
        **describe_host(),
        "command": "python benchmarks/flops.py --count-lengths {} --tokenizer {}".format(*names),
        "vocabulary": len(encoder),
        **summary(lengths),
        "prompts_of_tokens": {str(length): lengths[length] for length in sorted(lengths)},
    }


def read_lengths(file: Path) -> Counter[int]:
    """What `count_lengths` counted. Raises `ValueError` for anything else."""
    try:
        counted = json.loads(file.read_text(encoding="utf-8"))["prompts_of_tokens"]
        lengths = Counter({int(length): int(prompts) for length, prompts in counted.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--lengths {file} is not what --count-lengths prints: {error!r}") from None
    if not lengths or min(lengths) < 0 or min(lengths.values()) < 1:
        raise ValueError(f"--lengths {file} has no prompts, or lengths that cannot be")
    return lengths


def summary(lengths: Counter[int]) -> dict[str, Any]:
    every = list(lengths.elements())
    return {
        "count": len(every),
        "text_tokens": {
            "mean": statistics.mean(every), "median": statistics.median(every), "least": min(every), "most": max(every)
        },
    }  # fmt: skip


def print_all(counts: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(describe(torch.device("meta")) | {"counts": counts}, indent=1))
        return
    print(f"prefix {told_prefix(counts[0])}\n")
    print(f"{'preset':<24}{'FlashU':<12}{'TFLOP':>9}{'release':>9}")
    for each in counts:
        total, release = each["tflop_per_image"], each["tflop_release_without_vae"]
        print(f"{each['preset']:<24}{each['flashu'] or 'off':<12}{total:>9.1f}{release:>9.1f}")


def told_prefix(result: dict[str, Any]) -> str:
    told, prompts = f"{result['prefix_tokens']:.4g} tokens", result.get("prompts")
    if prompts:
        least, most = (FRAME + prompts["text_tokens"][end] for end in ("least", "most"))
        told += f", the mean of {prompts['count']:,} prompts of {least} to {most}"
        told += f", {prompts['cut']:,} of them cut" if prompts["cut"] else ""
    return told


def print_one(plan: Plan, cost: FlopCount, result: dict[str, Any]) -> None:
    print(
        f"{result['preset']}, {len(plan.steps)} steps, prefix {told_prefix(result)}; "
        f"FlashU: {result['flashu'] or 'off'}\n"
    )
    if result["flashu"]:
        print(format_plan(plan, cost.steps))
    total, release = result["tflop_per_image"], result["tflop_release_without_vae"]
    print(f"{'part':<12}{'TFLOP':>10}{'share':>9}{'per step':>11}")
    for part, tflop in sorted(result["parts"].items(), key=lambda item: -item[1]):
        each = "" if part in ONCE else f"{tflop / len(plan.steps):>11.4f}"
        print(f"{part:<12}{tflop:>10.3f}{tflop / total:>9.1%}{each}")
    print(f"{'one image':<12}{total:>10.3f}")
    print(f"{'the release':<12}{release:>10.3f} without its VAE, with the same settings ({release / total:.2f}x)")


if __name__ == "__main__":
    main()
