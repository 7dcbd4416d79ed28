"""Flow matching, as plain functions over tensors: the time grid, the noise, guidance, and the Euler loop.

Time runs from 0 (noise) to 1 (image). "n inference steps" are n grid points, so n - 1 evaluations (Show-o2, §3 and
its released sampler). Nothing here knows of prompts or of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flashu.errors import InputError
from flashu.models.showo2 import Prefix, Showo2Qwen2_5

TIME_SHIFT = 3.0


def time_grid(num_inference_steps: int, shift: float | None = TIME_SHIFT) -> Tensor:
    """Grid points (num_inference_steps,) from 0 to 1, float32, moved towards the noise by t / (t + f - f·t).

    `shift=None` leaves them even. Raises `InputError` for fewer than 2 points or a shift that is not positive.
    """
    if num_inference_steps < 2:
        raise InputError(
            f"num_inference_steps is {num_inference_steps}; it counts the grid's points, so at least 2 are needed"
        )
    t = torch.linspace(0, 1, num_inference_steps)
    if shift is None:
        return t
    if not (math.isfinite(shift) and shift > 0):
        raise InputError(f"time_shift is {shift}; it must be a positive number, or None for an even grid")
    return t / (t + shift - shift * t)


def check_guidance(scale: float) -> float:
    """Returns `scale`. Raises `InputError` unless it is a finite number ≥ 0."""
    if not (math.isfinite(scale) and scale >= 0):
        raise InputError(f"guidance_scale is {scale}; it must be 0 (prompt only) or more")
    return scale


def needs_unconditional(scale: float) -> bool:
    """Whether guidance at `scale` takes an unconditional row: 0 means none by convention, and at 1 it cancels out."""
    return scale not in (0, 1)


def initial_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> Tensor:
    """(len(seeds), channels, height, width) standard normal, float32, each image from its own CPU generator.

    So an image's noise depends on its seed and size alone: not on the batch, nor on the device.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(channels, height, width, generator=generator) for generator in generators])


def guide(velocity: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in float32: rows (conditional, then unconditional) to one velocity an image."""
    if not needs_unconditional(scale):
        return velocity.float()
    conditional, unconditional = velocity.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def trajectory(
    model: Showo2Qwen2_5, noise: Tensor, prefix: Prefix, grid: Tensor, guidance_scale: float
) -> Iterator[Tensor]:
    """Integrate from `noise` (images, channels, height, width), yielding the float32 state at every grid point.

    `prefix` has a conditional row per image, and an unconditional one where `needs_unconditional(guidance_scale)`.
    """
    state = noise.to(model.device, torch.float32)
    yield state
    times = model.embed_times(grid[:-1])
    for step, interval in enumerate(grid.diff().tolist()):
        velocity = guide(model.velocity(state, times.at(step), prefix), guidance_scale)
        state = state + interval * velocity
        yield state
