"""Time two checkouts of this repository against each other, batch by batch in turns, and compare what they make.

    git worktree add ../before COMMIT
    python benchmarks/paired.py ../before --preset mid --batch-size 1 8 --json result.json

Each checkout runs in a process of its own, which is asked for one batch at a time; so what else the machine does falls
on both alike. Weights, prompts (of several lengths) and noise are the same for both. Timed are the steps of two plans,
from noise to latents: unaccelerated ones, and FlashU's with one of each kind at least: measuring, skipping layers,
pruned, whole, with the head stored and reused. The ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parents[1]
STEPS = {"stock": 3, "flashu": 8}  # points of the time grid
LENGTHS = (62, 80, 71, 90, 66, 100, 75, 85)  # of prompts, in tokens with bos and boi
GUIDANCE = 7.5


class Checkout:
    """One of the two, as a process that waits to be asked."""

    def __init__(self, root: Path, preset: str):
        command = [sys.executable, str(HERE / "benchmarks" / "paired.py"), "--answer", "--preset", preset, str(root)]
        environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'benchmarks'}"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment, cwd=root
        )

    def make(self, arm: str, images: int) -> dict[str, Any]:
        """A batch's seconds, its latents' sum and largest value, and the process's peak memory so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{arm} {images}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.process.args[-1]} ended; what it said is above")
        return dict(json.loads(line))


def answer(preset: str) -> None:
    """Be one of the two: this file, over the library and the scripts that `PYTHONPATH` names."""
    del sys.path[0]  # this file's folder
    from generate import MODELS, peak_memory_gib, random_model, random_scores

    from flashu import FlashUConfig, Showo2Qwen2_5, apply_flashu_patch, remove_flashu_patch, sampler
    from flashu.acceleration.plan import make_plan

    config, cpu = MODELS[preset], torch.device("cpu")
    model = random_model(Showo2Qwen2_5, config, 0)
    scores = random_scores(model)
    settings = FlashUConfig(T_LS=4, T_cache=2, tau=2, schedule=None, num_inference_steps=STEPS["flashu"])
    height, width = config.native_grid
    longest = config.max_text_tokens(height * width)
    for line in sys.stdin:
        arm, images = line.split()[0], int(line.split()[1])
        lengths = [min(LENGTHS[image % len(LENGTHS)], longest + 2) for image in range(images)] + [2] * images
        prefixes = [[token % config.llm_vocab_size for token in range(length)] for length in lengths]
        suffixes = [[0] * (4 + longest - length) for length in lengths]
        rows = sampler.PromptTokens(prefixes, suffixes, config.native_grid)
        noise = sampler.initial_noise(range(images), config.image_latent_dim, 2 * height, 2 * width)
        remove_flashu_patch(model)
        if arm == "flashu":
            apply_flashu_patch(model, settings, scores=scores)
        steps = STEPS[arm]
        plan = model.acceleration.plan(steps, GUIDANCE) if model.acceleration else make_plan(None, steps, GUIDANCE)
        start = time.perf_counter()
        *_, latents = sampler.trajectory(model, noise, rows, sampler.time_grid(steps), plan)
        seconds = time.perf_counter() - start
        sums = {"sum": latents.double().sum().item(), "largest": latents.abs().max().item()}
        print(json.dumps({"seconds": seconds, **sums, "peak_gib": peak_memory_gib(cpu)}), flush=True)


def pair(checkouts: Sequence[Checkout], arm: str, images: int, pairs: int) -> dict[str, Any]:
    """Both in turns, after one batch of each to warm up."""
    made: list[list[dict[str, Any]]] = [[checkout.make(arm, images)] for checkout in checkouts]
    for number in range(pairs):
        for which in ((0, 1), (1, 0))[number % 2]:
            made[which].append(checkouts[which].make(arm, images))
    before, after = ([batch["seconds"] for batch in batches[1:]] for batches in made)
    ratios = sorted(one / other for one, other in zip(before, after, strict=True))
    return {
        "arm": arm,
        "batch_size": images,
        "seconds": {"before": statistics.median(before), "after": statistics.median(after)},
        "speed_up": statistics.median(ratios),
        "speed_up_least_and_most": [ratios[0], ratios[-1]],
        "peak_memory_gib": {"before": made[0][-1]["peak_gib"], "after": made[1][-1]["peak_gib"]},
        "sum_of_latents": {"before": made[0][-1]["sum"], "after": made[1][-1]["sum"]},
        "largest_latent": made[1][-1]["largest"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="CHECKOUT", help="what this one is compared with")
    parser.add_argument("--preset", default="mid")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pairs", type=int, default=5, help="of each arm and batch size (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer(options.preset)
        return
    from generate import MODELS
    from hardware import describe

    if not (options.before / "flashu" / "sampler.py").is_file():
        parser.error(f"{options.before} is no checkout of this repository: it has no flashu/sampler.py")
    if options.preset not in MODELS:
        parser.error(f"--preset {options.preset}: choose one of {', '.join(MODELS)}")
    if min(*options.batch_size, options.pairs) < 1:
        parser.error("--batch-size and --pairs are numbers from 1")
    checkouts = [Checkout(root.resolve(), options.preset) for root in (options.before, HERE)]
    runs = []
    for images in options.batch_size:
        for arm in STEPS:
            runs.append(pair(checkouts, arm, images, options.pairs))
            run = runs[-1]
            print(
                f"{arm:<8} batch {images:>2}: {run['seconds']['before']:.3f} s before, {run['seconds']['after']:.3f} s "
                f"after, {run['speed_up']:.3f}x ({run['speed_up_least_and_most'][0]:.3f} to "
                f"{run['speed_up_least_and_most'][1]:.3f}); peak {run['peak_memory_gib']['before']:.2f} and "
                f"{run['peak_memory_gib']['after']:.2f} GiB",
                flush=True,
            )
    if options.json:
        commits = {name: _commit(root) for name, root in (("before", options.before), ("after", HERE))}
        settings = {"preset": options.preset, "pairs": options.pairs, "commits": commits}
        result = {**describe(torch.device("cpu")), **settings, "runs": runs}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _commit(root: Path) -> str | None:
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
