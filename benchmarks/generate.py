"""Time generation on whatever device is there, with random weights at a preset's geometry.

    python benchmarks/generate.py --preset embedded --batch-size 1 8
    python benchmarks/generate.py --preset mid --flashu paper-1.5b --batch-size 1 8 --json result.json

Reports, per batch size: images per second end to end (prefix, steps, VAE decode, copy to the host), the median step,
and, on a GPU, the peak memory of that batch (on a CPU, of the whole process so far). With `--flashu` both arms run in
turns, so that what else the machine does falls on both alike; their ratio is of the medians over `--repeats`.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hardware import describe
from random_weights import random_model

from flashu import sampler
from flashu.acceleration.applied import Acceleration, remove_flashu_patch
from flashu.acceleration.plan import Plan, make_plan
from flashu.acceleration.wanda import WandaScores
from flashu.config import FLASHU_PRESETS, GUIDANCE_SCALE, NUM_INFERENCE_STEPS, FlashUConfig, flashu_preset
from flashu.devices import DTYPES, resolve_device, resolve_dtype
from flashu.fingerprint import fingerprint
from flashu.flops import any_text
from flashu.models import Showo2Qwen2_5, WanImageVAE
from flashu.models.geometry import (
    PATCH_SIZE,
    HeadGeometry,
    LlmGeometry,
    Showo2Config,
    VaeGeometry,
    VisionGeometry,
    token_grid,
)
from flashu.models.presets import PRESETS, VAE_PRESETS
from flashu.patch import apply_flashu_patch

# Between the embedded model and 1.5B, in the proportions of the latter, and large enough for arithmetic to dominate.
MID = Showo2Config(
    llm=LlmGeometry(512, 2816, 12, 8, 2, tie_word_embeddings=True),
    llm_vocab_size=1024,
    image_latent_height=16,
    image_latent_width=16,
    num_diffusion_layers=4,
    vision=VisionGeometry(384, 1152, 6, 6, grid=16),
    head=HeadGeometry(640, 2560, 10, 2, 64),
)
MODELS = {**PRESETS, "mid": MID}
VAES = {**VAE_PRESETS, "mid": VaeGeometry(dim=32)}


def random_scores(model: Showo2Qwen2_5) -> WandaScores:
    """Importances at random: how long pruning takes does not depend on which neurons it keeps."""
    generator = torch.Generator().manual_seed(0)
    llm = model.config.llm
    sizes = (llm.intermediate_size, llm.hidden_size)
    ffn, attention = ([torch.rand(size, generator=generator) for _ in range(llm.num_hidden_layers)] for size in sizes)
    return WandaScores(ffn, attention, fingerprint(model))


def plan_of(settings: FlashUConfig | None, config: Showo2Config, options: argparse.Namespace) -> Plan:
    """One arm's plan. Raises `InputError` when the settings do not fit the steps asked for."""
    steps = options.steps
    if settings is None:
        return make_plan(None, NUM_INFERENCE_STEPS if steps is None else steps, options.guidance)
    acceleration = Acceleration.of(settings, config.llm)
    return acceleration.plan(settings.total_steps if steps is None else steps, options.guidance)


class Stopwatch:
    """Seconds of work that has finished on the device, not merely been queued."""

    def __init__(self, device: torch.device):
        waits = {"cuda": partial(torch.cuda.synchronize, device), "mps": torch.mps.synchronize}
        self.wait: Callable[[], object] = waits.get(device.type, lambda: None)

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, float]:
        self.wait()
        start = time.perf_counter()
        result = work()
        self.wait()
        return result, time.perf_counter() - start


@torch.no_grad()
def measure(
    model: Showo2Qwen2_5,
    vae: WanImageVAE,
    plan: Plan,
    batch: int,
    prefix: int,
    grid: tuple[int, int],
) -> dict[str, float]:
    """Seconds of one batch, whole and by part."""
    clock = Stopwatch(model.device)
    rows = any_text(model.config, plan, grid, prefix, batch)
    height, width = (side * PATCH_SIZE for side in grid)
    noise = sampler.initial_noise(range(batch), model.config.image_latent_dim, height, width)
    states = sampler.trajectory(model, noise, rows, sampler.time_grid(plan.num_inference_steps), plan)
    latents = next(states)
    steps_s = []
    for _ in plan.steps:
        latents, seconds = clock(lambda: next(states))
        steps_s.append(seconds)
    _, decode_s = clock(lambda: vae.decode_pixels(latents).cpu())
    seconds = sum(steps_s) + decode_s
    return {"seconds_per_image": seconds / batch, "median_step_s": statistics.median(steps_s), "decode_s": decode_s}


def peak_memory_gib(device: torch.device) -> float:
    """The most memory allocated on the GPU since the last reset, or resident on the CPU since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="embedded", choices=MODELS)
    parser.add_argument("--flashu", choices=FLASHU_PRESETS, help="also time this FlashU preset, in turns with stock")
    parser.add_argument("--joined", action="store_true", help="also time joined projections, which CUDA always has")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each arm (default 3)")
    parser.add_argument("--steps", type=int, help="points of the time grid (default: each arm's own)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE, help="0 or 1 leave the unconditional row out")
    parser.add_argument("--prefix", type=int, default=62, help="tokens of each prompt with bos and boi (default 62)")
    parser.add_argument("--size", type=int, help="pixels per side (default: the preset's own)")
    parser.add_argument("--device", help="default: CUDA if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    options = parser.parse_args()
    try:
        device = resolve_device(options.device)
        config = MODELS[options.preset]
        grid = token_grid(options.size, config.native_grid)
        arms = {"stock": None} | ({"joined": None} if options.joined else {})
        arms |= {options.flashu: flashu_preset(options.flashu)} if options.flashu else {}
        plans = {arm: plan_of(settings, config, options) for arm, settings in arms.items()}
        longest = config.max_text_tokens(grid[0] * grid[1]) + 2
        if not 2 <= options.prefix <= longest:
            parser.error(f"--prefix {options.prefix}: bos and boi are 2, and at most {longest} fit")
    except ValueError as error:
        parser.error(str(error))
    dtype = resolve_dtype(options.dtype, device)
    model = random_model(Showo2Qwen2_5, config, 0, dtype, device, draw_on_device=True)
    vae = random_model(WanImageVAE, VAES[options.preset], 0, dtype, device, draw_on_device=True)
    scores = random_scores(model)
    networks = dict.fromkeys(arms, model)
    if options.joined:
        networks["joined"] = copy.deepcopy(model)
        networks["joined"].join()

    runs: list[dict[str, Any]] = []
    for batch in options.batch_size:
        results: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        memory = {}
        for repeat in range(options.repeats + 1):
            for arm, settings in arms.items():
                if settings:
                    apply_flashu_patch(model, settings, scores=scores)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                warm_up = not repeat and not settings
                plan = make_plan(None, 3, options.guidance) if warm_up else plans[arm]
                result = measure(networks[arm], vae, plan, batch, options.prefix, grid)
                memory[arm] = peak_memory_gib(device)
                remove_flashu_patch(model)
                if repeat:
                    results[arm].append(result)
        for arm in arms:
            stock, median = (
                {key: statistics.median(run[key] for run in results[name]) for key in results[name][0]}
                for name in ("stock", arm)
            )
            runs.append(
                {
                    "arm": arm,
                    "batch_size": batch,
                    "images_per_s": 1 / median["seconds_per_image"],
                    **median,
                    "speed_up": stock["seconds_per_image"] / median["seconds_per_image"],
                    "peak_memory_gib": memory[arm],
                }
            )
            print(
                f"batch {batch:>3}  {arm:<12}{runs[-1]['images_per_s']:9.3f} images/s{runs[-1]['speed_up']:7.2f}x   "
                f"median step {median['median_step_s'] * 1e3:8.1f} ms   decode {median['decode_s'] * 1e3:7.1f} ms   "
                f"peak {memory[arm]:.2f} GiB",
                flush=True,
            )
    if options.json:
        keys = ("preset", "flashu", "joined", "steps", "repeats", "guidance", "prefix", "size")
        settings = {key: getattr(options, key) for key in keys}
        result = {**describe(device), **settings, "dtype": str(dtype).removeprefix("torch."), "runs": runs}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
