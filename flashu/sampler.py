"""Flow matching: the time grid, the noise, guidance, and the loop over the steps with the prefixes that they run on.

Time runs from 0 (noise) to 1 (image). "n inference steps" are n grid points, so n - 1 evaluations (Show-o2, §3 and
its released sampler). What each step runs stands in a plan (`flashu.acceleration.plan`); the loop executes it and knows
of no settings. Nothing here knows of words or of pictures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flashu import arguments
from flashu.acceleration import layer_skipping, multistep
from flashu.acceleration.head_cache import Head
from flashu.acceleration.layer_skipping import SkipSets
from flashu.acceleration.plan import Llm, Plan, PlannedStep
from flashu.devices import send
from flashu.errors import InputError
from flashu.models.blocks import AS_THEY_ARE, Blocks
from flashu.models.prefix import Prefix, TextLayout
from flashu.models.qwen2 import Subnetwork
from flashu.models.showo2 import Showo2

TIME_SHIFT = 3.0


@dataclass(frozen=True)
class PromptTokens:
    """A batch's text, as rows of token ids: a conditional one per image, then, if guided, an unconditional one."""

    prefixes: Sequence[Sequence[int]]  # bos to boi
    suffixes: Sequence[Sequence[int]]  # eoi to padding; looked at by measuring steps only
    grid: tuple[int, int]  # the images' (height, width) in tokens


def time_grid(num_inference_steps: int, shift: float | None = TIME_SHIFT) -> Tensor:
    """Grid points (num_inference_steps,) from 0 to 1, float32, moved towards the noise by t / (t + f - f·t).

    `shift=None` leaves them even. Raises `InputError` for fewer than 2 points, a shift that is not positive, and one
    that moves points onto each other.
    """
    t = torch.linspace(0, 1, arguments.whole("num_inference_steps", num_inference_steps, least=2))
    if shift is None:
        return t
    shift = arguments.finite("time_shift", shift, zero=False)
    grid = t / (t + shift - shift * t)
    if not (grid.diff() > 0).all():
        raise InputError(f"time_shift is {shift}, with which steps of {num_inference_steps} fall on one point of time")
    return grid


def initial_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> Tensor:
    """(len(seeds), channels, height, width) standard normal, float32, each image from its own CPU generator.

    So an image's noise depends on its seed and size alone: not on the batch, nor on the device.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(channels, height, width, generator=generator) for generator in generators])


def guide(velocity: Tensor, scale: float | Tensor, images: int) -> Tensor:
    """Classifier-free guidance in float32: rows (conditional, then unconditional, if any) to one velocity an image.

    Without unconditional rows it is the conditional row alone.
    """
    conditional, unconditional = velocity[:images].float(), velocity[images:].float()
    if not len(unconditional):
        return conditional
    return unconditional + scale * (conditional - unconditional)


def advance(
    model: Showo2,
    features: Tensor,
    modulation: Tensor,
    numbers: Tensor,
    state: Tensor,
    earlier: Tensor | None,
    grid: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """From the head's output to the next state: the velocity, guided, and a step of the solver, in float32.

    features: (rows, tokens, head hidden), with unconditional rows where the step is guided. modulation: of the final
    layer, at the step's time. numbers: the step's (4,), see `_numbers`. state, and earlier, the velocity of the step
    before where the solver leans on it: (images, channels, height, width).
    Returns the state and the velocity.
    """
    scale, interval, share, _ = numbers
    velocity = guide(model.run_final(features, modulation, grid), scale, len(state))
    mean = velocity if earlier is None else multistep.continued(velocity, earlier, share)
    return state + interval * mean, velocity


@torch.no_grad()
def trajectory(
    model: Showo2,
    noise: Tensor,
    text: PromptTokens | Prefix,
    time_points: Tensor,
    plan: Plan,
    blocks: Blocks = AS_THEY_ARE,
    on_head: Callable[[int, Tensor], object] | None = None,
) -> Iterator[Tensor]:
    """Integrate from `noise` (images, channels, height, width), yielding the float32 state at every grid point.

    `text` has unconditional rows where `plan.guided`; for a plan whose steps all run alike it may be a prefix that is
    made already, so that only image spans run. `plan` has a step for every interval of `time_points`. `blocks` is how
    the network's blocks are called. `on_head` is shown the number of each step, from 1, and the head's output (rows,
    tokens, hidden).
    """
    images = len(noise)
    blocks = blocks.for_batch(model, images * (1 + plan.guided) * (1 + math.prod(text.grid)))
    state = send(noise, model.device, torch.float32)
    yield state
    times = model.embed_times(time_points[:-1])
    prefixes = _Prefixes(model, text, images, plan, blocks)
    numbers = send(_numbers(plan, time_points), model.device)
    hidden: Tensor  # which a plan's first step makes
    stored: Tensor | None = None
    velocity: Tensor | None = None
    for index, step in enumerate(plan.steps):
        time = times.at(index)
        with blocks.compiling():
            if step.llm is not Llm.NONE:
                prefix = prefixes.of(index)
                if step.measure:
                    hidden, similarity = model.measure_llm(state, time, prefix, blocks)
                    prefixes.skip_least_important(similarity)
                else:
                    hidden = model.run_llm(state, time, prefix, blocks)
            if step.head is Head.REUSE:
                features = cast("Tensor", stored)
            else:
                features = model.run_head(hidden, time, prefix, blocks)
                stored = blocks.kept(features) if step.head is Head.STORE else None
            if on_head:
                on_head(step.number, features)
            if not step.guided:
                features = features[:images]
            earlier = velocity if step.order == 2 else None
            blocks.mark_dynamic((0,), features, state, earlier)
            values = features, time.final, numbers[index], state, earlier
            following = blocks.run(blocks.compile(advance), model, *values, text.grid)
        state, velocity = blocks.kept(following[0]), following[1]
        yield state


def _numbers(plan: Plan, time_points: Tensor) -> Tensor:
    """What each step calculates with, (steps, 4) float32: its guidance scale, the interval of time, and, for order 2,
    the share of the way from the velocity before to this one by which to go on; and 0, to fill 16 bytes."""
    intervals = time_points.diff().tolist()
    shares = [0.0, *(multistep.share(now, before) for before, now in itertools.pairwise(intervals))]
    rows = [(step.guidance, *both, 0.0) for step, *both in zip(plan.steps, intervals, shares, strict=True)]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


class _Kind(NamedTuple):
    """What tells the prefixes of a run apart."""

    llm: Llm
    skip: bool
    guided: bool  # with the unconditional rows


def _kind_of(step: PlannedStep) -> _Kind:
    return _Kind(step.llm, step.skip, step.guided)


class _Prefixes:
    """The batch's prefix under each part of the LLM, made when a step first needs it, dropped after the last.

    Steps without guidance take the conditional rows of what guided steps run on, where there are or were such.
    """

    def __init__(self, model: Showo2, text: PromptTokens | Prefix, images: int, plan: Plan, blocks: Blocks):
        self.model, self.images, self.plan, self.blocks = model, images, plan, blocks
        if isinstance(text, Prefix) and len({_kind_of(step) for step in plan.steps}) > 1:
            raise ValueError("one prefix serves a plan whose steps all run alike; give the text's tokens")
        self.text = text
        self.layouts: dict[bool, TextLayout] = {}  # by whether with the unconditional rows
        self.skipped: SkipSets | None = None
        self.made: dict[_Kind, Prefix] = {}
        self.measures_left = sum(step.measure for step in plan.steps)

    def of(self, index: int) -> Prefix:
        """The prefix that the plan's step at `index` runs on."""
        if isinstance(self.text, Prefix):
            return self.text
        kind = _kind_of(self.plan.steps[index])
        if kind not in self.made:
            later = self._kinds_from(index)
            useful = later | {other._replace(guided=True) for other in later}
            self.made = {made: prefix for made, prefix in self.made.items() if made in useful}
            both = kind._replace(guided=True)
            if both in later and both not in self.made:
                self.made[both] = self._encode(both)
            if kind not in self.made:
                whole = self.made.get(both)
                self.made[kind] = whole.conditional(self._subnetwork(kind)) if whole else self._encode(kind)
        return self.made[kind]

    def _kinds_from(self, index: int) -> set[_Kind]:
        """Of the steps from `index` on; of those that skip layers, up to a measurement, which chooses others."""
        kinds, measured = set(), False
        for step in self.plan.steps[index:]:
            if not (step.skip and measured):
                kinds.add(_kind_of(step))
            measured = measured or step.measure
        return kinds

    def _encode(self, kind: _Kind) -> Prefix:
        measured = self.measures_left > 0 and not kind.skip
        return self.model.read_text(self._layout(kind.guided), self._subnetwork(kind), measured, self.blocks)

    def _layout(self, guided: bool) -> TextLayout:
        if guided not in self.layouts:
            assert isinstance(self.text, PromptTokens)
            rows = slice(None if guided else self.images)
            suffixes = self.text.suffixes[rows] if any(step.measure for step in self.plan.steps) else None
            self.layouts[guided] = self.model.lay_out_text(
                self.text.prefixes[rows], self.text.grid, suffixes, guided, self.blocks
            )
        return self.layouts[guided]

    def skip_least_important(self, similarity: Tensor) -> None:
        """Choose anew which layers each image skips, from a measurement (rows, layers)."""
        importances = layer_skipping.importance(similarity, self.images)
        self.skipped = layer_skipping.least_important(importances, self.plan.layers_to_skip)
        self.measures_left -= 1
        for kind in [kind for kind in self.made if kind.skip or not self.measures_left]:
            del self.made[kind]

    def _subnetwork(self, kind: _Kind) -> Subnetwork:
        ran_by, layers = None, len(self.model.showo.model.layers)
        if kind.skip:
            least = self.blocks.least_images
            assert self.skipped is not None, "a plan measures before it skips"
            ran_by = layer_skipping.rows_that_run(self.skipped, layers, 1 + kind.guided, self.model.device, least)
        return Subnetwork(
            neurons=((0, self.plan.ffn_width),) * layers if kind.llm is Llm.PRUNED and self.plan.ffn_width else None,
            kv_heads=self.plan.kv_heads,
            running_rows=ran_by,
        )
