"""Time generation on whatever device is there, with random weights at a preset's geometry.

    python benchmarks/generate.py --preset embedded --batch-size 1 8 --json result.json

Reports, per batch size: images per second end to end (prefix, evaluations, VAE decode, copy to the host), seconds
per evaluation and per part, and peak memory. Every batch size is run once unmeasured first.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from hardware import describe

from flashu import sampler
from flashu.devices import DTYPES, resolve_device, resolve_dtype
from flashu.models import Showo2Qwen2_5, WanImageVAE
from flashu.models.geometry import PATCH_SIZE, PRESETS, parse_size, preset
from flashu.models.random_weights import random_model
from flashu.pipeline import to_pictures

Result = TypeVar("Result")


class Stopwatch:
    """Seconds of work that has finished on the device, not merely been queued."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, work: Callable[[], Result]) -> tuple[Result, float]:
        self._wait()
        start = time.perf_counter()
        result = work()
        self._wait()
        return result, time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def measure(
    model: Showo2Qwen2_5, vae: WanImageVAE, batch: int, options: argparse.Namespace, token_grid: tuple[int, int]
) -> dict[str, float]:
    """Seconds of one batch, by part."""
    clock = Stopwatch(model.device)
    rows = [[0] * options.prefix for _ in range(batch)]
    if sampler.needs_unconditional(options.guidance):
        rows += [[0, 0] for _ in range(batch)]
    height, width = (side * PATCH_SIZE for side in token_grid)
    noise = sampler.initial_noise(range(batch), model.config.image_latent_dim, height, width)

    prefix, prefix_s = clock(lambda: model.encode_prefix(rows, token_grid))
    states = sampler.trajectory(model, noise, prefix, sampler.time_grid(options.steps), options.guidance)
    latents = next(states)
    evaluations_s = []
    for _ in range(options.steps - 1):
        latents, seconds = clock(lambda: next(states))
        evaluations_s.append(seconds)
    _, decode_s = clock(lambda: to_pictures(vae.decode(latents)))
    seconds = prefix_s + sum(evaluations_s) + decode_s
    return {
        "batch_size": batch,
        "images_per_s": batch / seconds,
        "seconds_per_image": seconds / batch,
        "evaluation_s": statistics.median(evaluations_s),
        "prefix_s": prefix_s,
        "decode_s": decode_s,
    }


def peak_memory_gib(device: torch.device) -> float:
    """The most memory allocated on the GPU, or resident on the CPU, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="embedded", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=50, help="points of the time grid (default 50)")
    parser.add_argument("--guidance", type=float, default=7.5, help="0 or 1 leave the unconditional row out")
    parser.add_argument("--prefix", type=int, default=62, help="tokens of each prompt with bos and boi (default 62)")
    parser.add_argument("--size", type=int, help="pixels per side (default: the preset's own)")
    parser.add_argument("--device", help="default: CUDA if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    options = parser.parse_args()

    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    config, vae_geometry = preset(options.preset)
    token_grid = parse_size(options.size, config.native_grid)
    model = random_model(Showo2Qwen2_5, config, 0, dtype, device)
    vae = random_model(WanImageVAE, vae_geometry, 0, dtype, device)

    runs: list[dict[str, Any]] = []
    for batch in options.batch_size:
        measure(model, vae, batch, argparse.Namespace(**{**vars(options), "steps": 3}), token_grid)
        runs.append(measure(model, vae, batch, options, token_grid))
        print(
            f"batch {batch:>3}: {runs[-1]['images_per_s']:8.3f} images/s   "
            f"evaluation {runs[-1]['evaluation_s'] * 1e3:9.1f} ms   prefix {runs[-1]['prefix_s'] * 1e3:7.1f} ms   "
            f"decode {runs[-1]['decode_s'] * 1e3:7.1f} ms",
            flush=True,
        )
    memory = peak_memory_gib(device)
    print(f"peak memory {memory:.2f} GiB")
    if options.json:
        settings = {key: getattr(options, key) for key in ("preset", "steps", "guidance", "prefix", "size")}
        result = {
            **describe(device),
            **settings,
            "dtype": str(dtype).removeprefix("torch."),
            "peak_memory_gib": memory,
            "runs": runs,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
