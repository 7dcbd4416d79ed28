"""Count the operations of one image, part by part.

    python benchmarks/flops.py --preset show-o2-1.5b --steps 50 --no-flashu

Runs the real sampler and VAE on PyTorch's `meta` device under its FLOP counter: no weights, no GPU, and the count is
of the operations that a generation dispatches. A multiply-add counts as two. All evaluations of an unaccelerated run
are alike, so two of them are run and multiplied; `--every-step` runs them all (a minute for the 1.5B model).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flashu import sampler
from flashu.models import Showo2Qwen2_5, WanImageVAE
from flashu.models.geometry import PATCH_SIZE, PRESETS, parse_size, preset

ONCE = ("prefix", "VAE decode")  # parts that an image takes once, not at every evaluation


class PartCounter:
    """Attributes a FLOP counter's growth to the modules it grew in, or to a stretch of code."""

    def __init__(self, counter: FlopCounterMode):
        self.counter = counter
        self.parts: dict[str, int] = {}

    def watch(self, part: str, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            module.register_forward_pre_hook(lambda *_, part=part: self._add(part, -1))
            module.register_forward_hook(lambda *_, part=part: self._add(part, 1))

    def _add(self, part: str, sign: int) -> None:
        self.parts[part] = self.parts.get(part, 0) + sign * self.counter.get_total_flops()

    def stretch(self, part: str) -> None:
        """Everything counted so far and not attributed yet was `part`."""
        self.parts[part] = self.counter.get_total_flops() - sum(self.parts.values())


@torch.no_grad()
def count(
    name: str, steps: int, guidance: float, prefix_tokens: int, size: int | None, every_step: bool
) -> dict[str, float]:
    """FLOP of one image by part, for the preset `name`."""
    config, vae_geometry = preset(name)
    with torch.device("meta"):
        model, vae = Showo2Qwen2_5(config).bfloat16(), WanImageVAE(vae_geometry).bfloat16()
    token_grid = parse_size(size, config.native_grid)
    rows = [[0] * prefix_tokens]
    if sampler.needs_unconditional(guidance):
        rows.append([0, 0])  # bos and boi
    noise = torch.empty(1, config.image_latent_dim, *(side * PATCH_SIZE for side in token_grid), device="meta")

    with FlopCounterMode(display=False) as counter:
        parts = PartCounter(counter)
        prefix = model.encode_prefix(rows, token_grid)
        parts.stretch("prefix")
        image_path = (model.image_embedder_und, model.image_embedder_gen, model.und_trans, model.fusion_proj)
        parts.watch("image path", image_path)
        parts.watch("LLM", [model.showo.model])
        parts.watch("head", [model.diff_proj, model.diffusion_head_a, model.diffusion_head_b])
        run = steps if every_step else min(steps, 3)
        *_, latents = sampler.trajectory(model, noise, prefix, sampler.time_grid(run), guidance)
        parts.stretch("time")
        vae.decode(latents)
        parts.stretch("VAE decode")
    repeats = (steps - 1) / (run - 1)
    return {part: flop * (1 if part in ONCE else repeats) for part, flop in parts.parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="show-o2-1.5b", choices=PRESETS)
    parser.add_argument("--steps", type=int, default=50, help="points of the time grid (default 50)")
    parser.add_argument("--guidance", type=float, default=7.5, help="0 or 1 leave the unconditional row out")
    parser.add_argument("--prefix", type=int, default=62, help="tokens of the prompt with bos and boi (default 62)")
    parser.add_argument("--size", type=int, help="pixels per side (default: the preset's own)")
    parser.add_argument("--no-flashu", action="store_true", help="count the unaccelerated model (the only one so far)")
    parser.add_argument("--every-step", action="store_true", help="run every evaluation instead of two")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()

    flop_of = count(options.preset, options.steps, options.guidance, options.prefix, options.size, options.every_step)
    parts = {part: flop / 1e12 for part, flop in flop_of.items()}
    total = sum(parts.values())
    evaluations = options.steps - 1
    if options.json:
        result = {
            "preset": options.preset,
            "steps": options.steps,
            "guidance": options.guidance,
            "prefix_tokens": options.prefix,
            "flashu": None,
            "tflop_per_image": total,
            "tflop_per_evaluation": (total - sum(parts[part] for part in ONCE)) / evaluations,
            "parts": parts,
        }
        print(json.dumps(result, indent=2))
        return
    print(f"{options.preset}, {evaluations} evaluations, guidance {options.guidance}, prefix {options.prefix} tokens\n")
    print(f"{'part':<12}{'TFLOP':>10}{'share':>9}{'per evaluation':>17}")
    for part, tflop in sorted(parts.items(), key=lambda item: -item[1]):
        each = f"{tflop / evaluations:>17.4f}" if part not in ONCE else ""
        print(f"{part:<12}{tflop:>10.3f}{tflop / total:>9.1%}{each}")
    print(f"{'one image':<12}{total:>10.3f}")


if __name__ == "__main__":
    main()
