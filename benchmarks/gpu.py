"""Measure generation on a GPU, against the same network run as its release runs it, in one command of minutes.

    python benchmarks/gpu.py --json result.json
    python benchmarks/gpu.py --preset show-o2-7b --batch-size 1 4 16 --json 7b.json
    python benchmarks/gpu.py --device cpu --preset embedded --budget-s 60     # tries the script out

Weights are random. It needs torch, transformers, pillow and what these bring, no download and no cluster; say
`PYTHONPATH=.` where `flashu` is not installed. Measured are, in this order and as far as `--budget-s` goes:

    cold      building the model, calibrating on a few prompts, patching, the first image
    ceilings  the device's large matrix product, and its copy of memory
    speed     every arm at the smallest batch size, and at the one that is best for ours with FlashU
    split     time by part of the network, and time in which the GPU had nothing to do, at these two
    speed     the other batch sizes until time or memory is out; then more repeats
    load      the checkpoint written to disk, and loaded from files that the system has just seen

The arms are in `gpu_arms.py`, the release's way in `release_shaped.py`. What was left out is said, and why.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from ceilings import measure_ceilings
from generate import MODELS, VAES, Stopwatch
from gpu_arms import ARMS, LEADER
from gpu_bench import Bench
from gpu_report import entries, text
from gpu_series import Budget, Series
from hardware import describe

from flashu.calibration import calibrate
from flashu.config import FLASHU_PRESETS, flashu_preset
from flashu.devices import DTYPES, resolve_device, resolve_dtype
from flashu.models.geometry import parse_size
from flashu.patch import Acceleration
from flashu.pipeline import TextToImagePipeline

PARTS = ("cold", "ceilings", "speed", "split", "load")
BATCH_SIZES = {"cuda": [1, 4, 8, 16, 32, 64], "cpu": [1, 2]}
CALIBRATION_PROMPTS = 2
LOAD_S_PER_GIB = 8.0  # to write and load, roughly


def main() -> None:
    options = parse_options()
    budget, started = Budget(options.budget_s), time.monotonic()
    settings, config, device = flashu_preset(options.flashu), MODELS[options.preset], options.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    clock = Stopwatch(device)
    bench, build_s = clock(lambda: Bench(config, VAES[options.preset], options.grid, settings, device, options.dtype))
    cold: dict[str, Any] = {"build_s": build_s, **prepare(bench, clock, first_image="cold" in options.parts)}
    lengths = bench.prompt_lengths(max(options.batch_size))
    result = {
        **describe(device),
        "cudnn": torch.backends.cudnn.version(),
        "transformers": transformers.__version__,
        "dtype": str(options.dtype).removeprefix("torch."),
        "preset": options.preset,
        "size": list(bench.size),
        "flashu": options.flashu,
        "prompt_tokens": {"least": min(lengths), "median": statistics.median(lengths), "most": max(lengths)},
        "budget_s": options.budget_s,
        "cold": cold,
        "ceilings": measure_ceilings(device, options.dtype) if "ceilings" in options.parts else None,
    }

    def save() -> None:
        result.update(entries(series, result["ceilings"]), took_s=time.monotonic() - started)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")

    series = Series(bench, options.arms, budget, options.repeats, on_change=save)
    try:
        measure(series, sorted(options.batch_size), options.parts)
        if "load" in options.parts:
            cold |= load(bench, clock, budget)
    finally:  # what was measured before anything went wrong is of use
        save()
        print(text(result))


def measure(series: Series, batches: list[int], parts: list[str]) -> None:
    """The speeds and splits that were asked for, what matters most first."""
    arms = list(series.ways)
    for arm in arms:
        series.measure(arm, batches[0])
    essential = [batches[0]]
    if "speed" in parts:
        best = series.best_batch(LEADER if LEADER in arms else arms[-1], batches)
        essential += [best] if best not in (None, batches[0]) else []
    for step in (series.measure, *([series.split] if "split" in parts else [])):
        for batch in essential:
            for arm in arms:
                step(arm, batch)
    if "speed" in parts:
        for batch in batches:
            for arm in arms:
                series.measure(arm, batch)
        series.repeat()


def prepare(bench: Bench, clock: Stopwatch, first_image: bool) -> dict[str, Any]:
    """Calibrate, which all that follows needs; with `first_image`, go on to a first image as a worker does."""
    bench.scores, calibrate_s = clock(
        lambda: calibrate(bench.model, bench.prompts(CALIBRATION_PROMPTS), tokenizer=bench.tokenizer, size=bench.size)
    )
    took: dict[str, Any] = {"calibration_prompts": CALIBRATION_PROMPTS, "calibrate_s": calibrate_s}
    if first_image:
        with ExitStack() as stack:
            way, took["patch_s"] = clock(lambda: stack.enter_context(ARMS[LEADER].on(bench)))
            _, took["first_image_s"] = clock(lambda: way.generate(1))
    return took


def load(bench: Bench, clock: Stopwatch, budget: Budget) -> dict[str, Any]:
    """Write the checkpoint to a temporary folder and load it as a user does."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in bench.model.parameters())
    needed_s = LOAD_S_PER_GIB * size / 2**30
    if needed_s > budget.left_s():
        return {"load": f"left out: about {needed_s:.0f} s of {max(budget.left_s(), 0):.0f} s left"}
    if 2 * size > shutil.disk_usage(tempfile.gettempdir()).free:
        return {"load": f"left out: no room for {size / 2**30:.1f} GiB in {tempfile.gettempdir()}"}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        TextToImagePipeline(bench.model, bench.vae, bench.tokenizer).save_pretrained(checkpoint)
        _, load_s = clock(
            lambda: TextToImagePipeline.from_pretrained(checkpoint, device=bench.device, dtype=bench.dtype)
        )
    return {"load_gib": size / 2**30, "load_s": load_s}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="show-o2-1.5b", choices=MODELS)
    parser.add_argument("--size", type=int, help="pixels per side (default: the preset's own)")
    euler = [name for name, settings in FLASHU_PRESETS.items() if settings.solver_order == 1]  # as the release's steps
    parser.add_argument("--flashu", default="paper-1.5b", choices=euler, help="of the accelerated arms")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all but ours-flashu-max, on CUDA")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batch-size", type=int, nargs="+", help="default: 1 4 8 16 32 64")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each arm and batch size (default 3)")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds to take, imports left aside (default 480)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there, as it comes in")
    options = parser.parse_args()
    try_out = "`--device cpu --preset embedded` tries this script out on a small model"
    try:
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            parser.exit(2, f"{parser.prog}: there is no CUDA device here; {try_out}\n")
        options.device = resolve_device(options.device)
        if options.device.type != "cuda" and (options.device.type, options.preset) != ("cpu", "embedded"):
            parser.exit(2, f"{parser.prog}: {options.preset} is measured on a CUDA device; {try_out}\n")
        options.dtype = resolve_dtype(options.dtype, options.device)
        options.grid = parse_size(options.size, MODELS[options.preset].native_grid)
        Acceleration.of(flashu_preset(options.flashu), MODELS[options.preset].llm)
    except ValueError as error:
        parser.error(str(error))
    options.arms = options.arms or [name for name, arm in ARMS.items() if options.device.type in arm.by_default]
    options.batch_size = options.batch_size or BATCH_SIZES[options.device.type]
    if min(*options.batch_size, options.repeats) < 1:
        parser.error("--batch-size and --repeats are numbers from 1")
    return options


if __name__ == "__main__":
    main()
