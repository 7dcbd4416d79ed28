"""Measure what compiling costs a worker, and whether new prompts ever compile anything again.

    python benchmarks/compiling.py --json result.json
    python benchmarks/compiling.py --preset embedded --prompts prompts.txt --batch-size 4

Two processes, one after the other, share a compile cache that is empty at first, as two workers of a node do. Each
builds the model with random weights, compiles it in mode "auto" on CUDA and "max" elsewhere, and makes an image, and a
few batches; these are its warm-up. Then the second makes images of 200 prompts of natural lengths in batches, and the
last ones alone. Reported are the seconds to the first image and of the warm-up, cold and with the cache, and the graphs
that were compiled during the warm-up and after it, which should be none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from generate import MODELS, VAES, random_scores
from gpu_bench import Bench
from hardware import describe

from flashu.config import FLASHU_PRESETS, flashu_preset
from flashu.devices import DTYPES, resolve_device, resolve_dtype
from flashu.patch import apply_flashu_patch
from flashu.pipeline import TextToImagePipeline

WARM_UP_BATCHES = 4


def work(options: argparse.Namespace) -> dict[str, Any]:
    """What one worker measures."""
    from torch._dynamo.utils import counters

    # The smallest model reads 60 tokens by itself; here as many as any, for prompts to be of natural lengths.
    config, device = replace(MODELS[options.preset], max_prompt_tokens=None), options.device
    dtype = resolve_dtype(options.dtype, device)
    settings = flashu_preset(options.flashu)
    start = time.perf_counter()
    bench = Bench(config, VAES[options.preset], config.native_grid, settings, device, dtype)
    model = apply_flashu_patch(bench.model, settings, scores=random_scores(bench.model))
    pipe = TextToImagePipeline(model, bench.vae.to(device), bench.tokenizer)
    built_s = time.perf_counter() - start
    start = time.perf_counter()
    pipe.compile("auto" if device.type == "cuda" else "max")
    if options.prompts:
        prompts = [line for line in options.prompts.read_text().splitlines() if line.strip()]
    else:
        prompts = bench.prompts(options.count + 1)
    if not pipe.blocks.compiled:
        sys.exit("nothing is compiled here")

    def make(some: list[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of prompts that are cut
            pipe(some, seeds=0, batch_size=len(some))

    def graphs() -> int:
        return counters["stats"]["unique_graphs"]

    size, last = options.batch_size, prompts[-1:]
    make(last)
    first_image_s = time.perf_counter() - start
    make(last * size)  # of one length
    for number in range(WARM_UP_BATCHES):
        make(prompts[number * size : (number + 1) * size])
    warm_up_s = time.perf_counter() - start
    result = {"build_s": built_s, "first_image_s": first_image_s, "warm_up_s": warm_up_s, "warm_up_graphs": graphs()}
    if options.work == "second":
        start = time.perf_counter()
        chosen = prompts[: options.count]
        for begin in range(0, len(chosen), size):
            make(chosen[begin : begin + size])
        for prompt in chosen[-3:]:
            make([prompt])
        images = len(chosen) + 3
        lengths = [len(prompt.split()) for prompt in chosen]
        result |= {
            "images": images,
            "words": {"least": min(lengths), "most": max(lengths), "different": len(set(lengths))},
            "images_per_s": images / (time.perf_counter() - start),
            "graphs_after_warm_up": graphs() - result["warm_up_graphs"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="show-o2-1.5b", choices=MODELS)
    parser.add_argument("--flashu", default="paper-1.5b", choices=FLASHU_PRESETS)
    parser.add_argument(
        "--prompts", type=Path, help="a prompt a line (default: random words, as many as DPG-Bench has)"
    )
    parser.add_argument("--count", type=int, default=200, help="prompts to make images of (default 200)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", help="default: CUDA if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    parser.add_argument("--work", choices=("first", "second"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        options.device = resolve_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    if options.work:
        print(json.dumps(work(options)))
        return

    workers = {}
    with tempfile.TemporaryDirectory() as cache:
        for worker in ("first", "second"):
            command = [sys.executable, __file__, *sys.argv[1:], "--work", worker]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
            if done.returncode:
                sys.exit(done.returncode)
            workers[worker] = json.loads(done.stdout.splitlines()[-1])
            print(f"{worker} worker: {workers[worker]}", flush=True)
    if options.json:
        settings = {"preset": options.preset, "flashu": options.flashu, "batch_size": options.batch_size}
        result = {**describe(options.device), **settings, "workers": workers}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
