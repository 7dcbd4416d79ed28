"""Measure generation on a GPU, against the same network run as its release runs it, in one command of minutes.

    python benchmarks/gpu.py --json result.json
    python benchmarks/gpu.py --preset show-o2-7b --batch-size 1 4 16 --json 7b.json
    python benchmarks/gpu.py --device cpu --preset embedded --budget-s 60     # tries the script out; or mid, in minutes

Weights are random. It needs torch, transformers, einops, pillow and what these bring, no download and no cluster; say
`PYTHONPATH=.` where `flashu` is not installed. Measured are, in this order and as far as `--budget-s` goes:

    cold      building the model, calibrating on a few prompts, patching, compiling from nothing, the first image
    ceilings  the device's large matrix product, and its copy of memory
    speed     release and ours, without FlashU and with it, at the smallest batch size, and up to each one's best
    speed     ours with FlashU on prompts that are all of other lengths, where kernels show that plan anew for each
              shape, with cuDNN's attention and without it
    split     time by part of the network, and time in which the GPU had nothing to do, of all four at the smallest
              batch size, and of ours at its best
    speed     ours with FlashU, several batches back to back; ours on few steps, and uncompiled
    load      the checkpoint written to disk, and loaded from files that the system has just seen
    speed     ours as CUDA graphs and in float8, which a GPU might not survive, as it might not the matrix product in
              float8
    split     of the arms that came after the first four
    speed     each one's best batch size; repeats of the first four; until time or memory is out, the other batch sizes
              and their repeats

The arms are in `gpu_arms.py`, the release's way in `release_shaped.py`. A measurement that fails, or that there is no
time for, is left out, and it is said why; the JSON is written after each. Nothing is begun that is not expected to end
within `--budget-s`, and what is under way 90 s later is broken off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from ceilings import measure_ceilings, measure_float8_ceiling
from generate import MODELS, VAES, Stopwatch
from gpu_arms import ARMS, BASELINES, LEADER, MAIN
from gpu_attempts import Attempts, Budget, OutOfTime, time_limit
from gpu_bench import NATURAL_PROMPTS, Bench
from gpu_cold import empty_compile_caches, first_images, load, prepare
from gpu_report import entries, text
from gpu_series import Series
from hardware import describe

from flashu.acceleration.applied import Acceleration
from flashu.config import FLASHU_PRESETS, flashu_preset
from flashu.devices import DTYPES, resolve_device, resolve_dtype
from flashu.models.geometry import token_grid

PARTS = ("cold", "ceilings", "speed", "split", "load")
CPU_PRESETS = ("embedded", "mid")  # the others would take hours there
BATCH_SIZES = {"cuda": [1, 4, 8, 16, 32, 64], "cpu": [1, 2]}
OVERRUN_S = 90.0  # past the budget, after which what is under way is broken off


def main() -> None:
    options = parse_options()
    started, device = time.monotonic(), options.device
    budget = Budget(options.budget_s)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    settings, config = flashu_preset(options.flashu), MODELS[options.preset]
    bench, build_s = Stopwatch(device)(
        lambda: Bench(
            config, VAES[options.preset], options.grid, settings, device, options.dtype, options.natural_prompts
        )
    )
    lengths = bench.prompt_lengths(max(options.batch_size))
    result: dict[str, Any] = {
        **describe(device),
        "cudnn": torch.backends.cudnn.version(),
        "transformers": transformers.__version__,
        "blocks_compiled": None,
        "why_uncompiled": None,
        "dtype": str(options.dtype).removeprefix("torch."),
        "preset": options.preset,
        "size": list(bench.size),
        "flashu": options.flashu,
        "prompt_tokens": {"least": min(lengths), "median": statistics.median(lengths), "most": max(lengths)},
        "budget_s": options.budget_s,
        "cold": {"build_s": build_s},
        "ceilings": {},
    }
    attempts = Attempts(device, budget)
    series = Series(bench, options.arms, options.batch_size, attempts, options.repeats)

    def save() -> None:
        result.update(entries(series, result["ceilings"]), took_s=time.monotonic() - started)
        if options.json:
            partial = options.json.with_name(f".{options.json.name}.partial")
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, options.json)

    attempts.on_change = save
    save()
    try:
        with empty_compile_caches(), time_limit(budget.left_s() + OVERRUN_S):
            measure(series, options.parts, result["cold"], result["ceilings"])
    except OutOfTime as over:
        attempts.leave_out("the rest", str(over))
    finally:  # what was measured before anything went wrong is of use; neither of these asks the device anything
        save()
        print(text(result), flush=True)


def measure(series: Series, parts: list[str], cold: dict[str, Any], ceilings: dict[str, float]) -> None:
    """What was asked for, what matters most first, and what may break the device after that."""
    attempts, device = series.attempts, series.bench.device
    prepare(series, cold)
    if "cold" in parts:
        first_images(series, cold)
    if "ceilings" in parts:
        attempts.attempt("ceilings", lambda: ceilings.update(measure_ceilings(device, series.bench.dtype)))
    main_arms = [arm for arm in MAIN if arm in series.ways]
    hazardous = [arm for arm in series.ways if ARMS[arm].hazardous]
    aside = [arm for arm in series.ways if ARMS[arm].aside and arm not in hazardous]
    others = [arm for arm in series.ways if arm not in main_arms + aside + hazardous]
    speed, split = "speed" in parts, "split" in parts
    for arm in main_arms:
        series.measure(arm, series.batches[0])
    if speed:
        for arm in main_arms:
            series.find_best(arm)
    measure_beside_leader(series, aside, speed)
    if split:
        split_arms(series, main_arms)
    if speed and LEADER in main_arms:
        series.stream(LEADER)
    measure_beside_leader(series, others, speed)
    if "load" in parts:
        load(series, cold)
    measure_beside_leader(series, hazardous, speed)
    if hazardous and "ceilings" in parts and device.type == "cuda":
        attempts.attempt("float8 ceiling", lambda: ceilings.update(measure_float8_ceiling(device)))
    if split:
        split_arms(series, others + hazardous)
    if speed:
        arms = [arm for arm in series.ways if not ARMS[arm].aside]
        for arm in arms:
            series.find_best(arm)
        series.repeat(main_arms)
        for batch in series.batches:
            for arm in arms:
                series.measure(arm, batch)
        series.repeat()


def split_arms(series: Series, arms: list[str]) -> None:
    """The time split of each at the smallest batch size, then of what is ours at its best so far."""
    for arm in arms:
        series.split(arm, series.batches[0])
    for arm in arms:
        if (best := series.best(arm)) and arm not in BASELINES:
            series.split(arm, best.cell.batch)


def measure_beside_leader(series: Series, arms: list[str], speed: bool) -> None:
    """At the smallest batch size and, for their `speed`, at the one that is best for the leader."""
    leader = series.best(LEADER)
    for arm in arms:
        for batch in sorted({series.batches[0], leader.cell.batch} if speed and leader else {series.batches[0]}):
            series.measure(arm, batch)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="show-o2-1.5b", choices=MODELS)
    parser.add_argument("--size", type=int, help="pixels per side (default: the preset's own)")
    euler = [name for name, settings in FLASHU_PRESETS.items() if settings.solver_order == 1]  # as the release's steps
    parser.add_argument(
        "--flashu", default="paper-1.5b", choices=euler, help="of the arms with flashu; few-steps is an arm of its own"
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        help="default: on CUDA all but ours-flashu-max and those that switch one thing of ours-flashu",
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batch-size", type=int, nargs="+", help="default: 1 4 8 16 32 64")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each arm and batch size (default 3)")
    parser.add_argument(
        "--natural-prompts", type=int, default=NATURAL_PROMPTS, help="made by arms of that name (default %(default)s)"
    )
    parser.add_argument(
        "--budget-s", type=float, default=420, help="seconds after which nothing more is begun (default 420)"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there, as it comes in")
    options = parser.parse_args()
    try_out = "`--device cpu --preset embedded` tries this script out on a small model"
    try:
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            parser.exit(2, f"{parser.prog}: there is no CUDA device here; {try_out}\n")
        options.device = resolve_device(options.device)
        if options.device.type != "cuda" and not (options.device.type == "cpu" and options.preset in CPU_PRESETS):
            parser.exit(2, f"{parser.prog}: {options.preset} is measured on a CUDA device; {try_out}\n")
        options.dtype = resolve_dtype(options.dtype, options.device)
        options.grid = token_grid(options.size, MODELS[options.preset].native_grid)
        Acceleration.of(flashu_preset(options.flashu), MODELS[options.preset].llm)
    except ValueError as error:
        parser.error(str(error))
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    options.arms = options.arms or [name for name, arm in ARMS.items() if options.device.type in arm.by_default]
    options.batch_size = options.batch_size or BATCH_SIZES[options.device.type]
    if min(*options.batch_size, options.repeats, options.natural_prompts) < 1:
        parser.error("--batch-size, --repeats and --natural-prompts are numbers from 1")
    return options


if __name__ == "__main__":
    main()
