"""Measure what compiling costs a worker, and whether new prompts ever compile anything after its warm-up.

    python benchmarks/compiling.py --json result.json
    python benchmarks/compiling.py --preset show-o2-1.5b --batch-size 8 --prompts prompts.txt

Two processes, one after the other, share a compile cache that is empty at first, as two workers of a node do. Each
builds the model with random weights, has it compiled (mode "auto" on CUDA, "max" elsewhere), and makes what a worker
makes before its first lease, by `jobs.worker.warm_up`. Then the second makes images of 200 prompts of natural lengths
in batches, and of the last ones alone. Reported are the seconds to the end of the first batch and of the warm-up, cold
and with the cache, and the graphs that were compiled during the warm-up and after it, which should be none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generate import MODELS, VAES, random_scores
from gpu_bench import Bench
from graphs import fail_past_the_limit, graphs_compiled
from hardware import describe

from flashu.config import FLASHU_PRESETS, flashu_preset
from flashu.devices import DTYPES, resolve_device, resolve_dtype
from flashu.models.blocks import Blocks
from flashu.patch import apply_flashu_patch
from flashu.pipeline import TextToImagePipeline

ALONE = 3  # of the prompts, which make an image once more


def warm_up_as_a_worker(make: Callable[..., object], guidance_scale: float, batch_size: int) -> None:
    """What a worker makes before its first lease, in a run whose manifest gives prompts only."""
    from jobs.worker import warm_up

    warm_up.warm_up(make, warm_up.BatchKinds(guidance_scale), min(batch_size, warm_up.IMAGES))


def work(options: argparse.Namespace) -> dict[str, Any]:
    """What one worker measures."""
    fail_past_the_limit()  # where calls would compile nothing, but not for having been compiled
    # The smallest model reads 60 tokens by itself; here as many as any, for prompts to be of natural lengths.
    config, device = replace(MODELS[options.preset], max_prompt_tokens=None), options.device
    dtype = resolve_dtype(options.dtype, device)
    settings = flashu_preset(options.flashu)
    start = time.perf_counter()
    bench = Bench(config, VAES[options.preset], config.native_grid, settings, device, dtype)
    model = apply_flashu_patch(bench.model, settings, scores=random_scores(bench.model))
    pipe = TextToImagePipeline(model, bench.vae.to(device), bench.tokenizer)
    built_s = time.perf_counter() - start
    prompts = read_prompts(options.prompts)[: options.count] if options.prompts else bench.prompts(options.count)
    scale, size = config.guidance_scale, options.batch_size
    ends: list[float] = []

    def make(some: list[str], negative_prompts: list[str], seeds: list[int], guidance_scale: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of prompts that are cut
            asked = {"negative_prompts": negative_prompts, "seeds": seeds, "guidance_scale": guidance_scale}
            pipe.submit(some, **asked).pictures()
        ends.append(time.perf_counter())

    start = time.perf_counter()
    if options.trace_only:
        pipe.blocks = Blocks.through(partial(torch.compile, backend="eager"))
    else:
        pipe.compile("auto" if device.type == "cuda" else "max")
    if not pipe.blocks.compiled:
        sys.exit("nothing is compiled here")
    warm_up_as_a_worker(make, scale, size)
    warm_up_graphs = graphs_compiled()
    result = {
        "build_s": built_s,
        "first_batch_s": ends[0] - start,
        "warm_up_s": ends[-1] - start,
        "warm_up_graphs": warm_up_graphs,
    }
    if options.work == "second":
        batches = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
        batches += [[prompt] for prompt in prompts[-ALONE:]]
        start = time.perf_counter()
        for number, batch in enumerate(batches):
            make(batch, [""] * len(batch), list(range(number * size, number * size + len(batch))), scale)
        images = sum(map(len, batches))
        lengths = [len(prompt.split()) for prompt in prompts]
        result |= {
            "images": images,
            "images_per_s": images / (time.perf_counter() - start),
            "graphs_after_warm_up": graphs_compiled() - warm_up_graphs,
            "words": {
                "least": min(lengths),
                "median": statistics.median(lengths),
                "most": max(lengths),
                "different": len(set(lengths)),
            },
        }
    return result


def read_prompts(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    options = parse_options()
    if options.work:
        print(json.dumps(work(options)))
        return
    workers = {}
    with tempfile.TemporaryDirectory() as cache:
        for worker in ("second",) if options.trace_only else ("first", "second"):
            command = [sys.executable, __file__, *sys.argv[1:], "--work", worker]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
            done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment, check=False)
            if done.returncode:
                sys.exit(done.returncode)
            workers[worker] = json.loads(done.stdout.splitlines()[-1])
            print(f"{worker} worker: {workers[worker]}", flush=True)
    if options.json:
        settings = {name: getattr(options, name) for name in ("preset", "flashu", "batch_size", "trace_only")}
        prompts = {
            "file": options.prompts and options.prompts.name,
            "count": options.count,
            "words": workers["second"].pop("words"),
        }
        result = {**describe(options.device), **settings, "prompts": prompts, "workers": workers}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="embedded", choices=MODELS)
    parser.add_argument("--flashu", default="paper-1.5b", choices=FLASHU_PRESETS)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, of which the first --count are taken (default: random words, as many as DPG-Bench has)",
    )
    parser.add_argument("--count", type=int, default=200, help="prompts to make images of (default 200)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--trace-only", action="store_true", help="of one worker, and only to count its graphs")
    parser.add_argument("--device", help="default: CUDA if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    parser.add_argument("--work", choices=("first", "second"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.count, options.batch_size) < 1:
        parser.error("--count and --batch-size are numbers from 1")
    try:
        options.device = resolve_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    if options.prompts:
        try:
            found = len(read_prompts(options.prompts))
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--prompts {options.prompts} cannot be read: {error}")
        if found < options.count:
            parser.error(f"--prompts {options.prompts} has {found} prompts, fewer than --count {options.count}")
    return options


if __name__ == "__main__":
    main()
