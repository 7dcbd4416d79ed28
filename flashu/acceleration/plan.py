"""The plan: what every step of a run does, as a table, before anything runs.

`make_plan` is a pure function of settings; the sampler executes its steps and knows no settings. Dead work never enters
a plan: no LLM on a step that reuses the head's output, no measurement that no later step uses, no store without reuse,
no unconditional rows on a step that is not guided.
Steps are counted from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from flashu.acceleration import guidance_schedule, head_cache, hybrid, multistep
from flashu.acceleration.head_cache import Head
from flashu.config import FLASHU_PRESETS, FlashUConfig


class Llm(str, Enum):
    """Which LLM a step runs."""

    NONE = "-"
    FULL = "full"  # whole FFNs
    PRUNED = "pruned"  # the leading slice of each FFN


@dataclass(frozen=True)
class PlannedStep:
    number: int  # from 1
    llm: Llm
    skip: bool  # leave out the layers that the last measurement found least important
    measure: bool  # run every layer over whole rows, and find the least important ones
    head: Head
    guidance: float
    order: int = 1  # of the solver: 1 is Euler, 2 leans on the velocity of the step before

    @property
    def guided(self) -> bool:
        """Whether the step runs unconditional rows."""
        return guidance_schedule.is_guided(self.guidance)


@dataclass(frozen=True)
class Plan:
    steps: tuple[PlannedStep, ...]
    ffn_width: int | None = None  # neurons that a pruned FFN runs; None for all
    kv_heads: int | None = None  # KV groups that every attention runs; None for all
    layers_to_skip: int = 0

    @property
    def num_inference_steps(self) -> int:
        return len(self.steps) + 1

    @property
    def guided(self) -> bool:
        """Whether any step needs unconditional rows."""
        return any(step.guided for step in self.steps)


def make_plan(config: FlashUConfig | None, num_inference_steps: int, guidance_scale: float) -> Plan:
    """The steps of a run over `num_inference_steps` grid points, one fewer than points: the release's, without its dead
    work.

    `config=None` is the unaccelerated run. `guidance_scale` holds where the config has no schedule.
    Raises `InputError` when the config does not fit the number of steps.
    """
    (config or FLASHU_PRESETS["off"]).check_steps(num_inference_steps)
    released = release_plan(config, num_inference_steps, guidance_scale)
    if config is None:
        return released
    full = [step.llm is Llm.FULL for step in released.steps]
    orders = multistep.orders([step.guidance for step in released.steps], config.solver_order)
    heads = head_cache.actions(full, config.T_cache, [step.guided for step in released.steps])
    runs = [head is not Head.REUSE for head in heads]
    steps = []
    for i, step in enumerate(released.steps):
        # A step that is due to measure runs every layer, whether or not its measurement turns out to be of use.
        measure = step.measure and _is_used(i, released.steps, runs)
        llm = Llm.NONE if not runs[i] and not measure else step.llm if config.r_p > 0 else Llm.FULL
        skip = step.skip and llm is not Llm.NONE
        steps.append(replace(step, llm=llm, skip=skip, measure=measure, head=heads[i], order=orders[i]))
    return Plan(tuple(steps))


def release_plan(config: FlashUConfig | None, num_inference_steps: int, guidance_scale: float) -> Plan:
    """The steps as the release makes them, dead work and all: the LLM runs on every step, a step that is due measures
    whether or not that is of use, and a step reuses what one with or without unconditional rows stored."""
    count = num_inference_steps - 1
    if config is None:
        alike = (Llm.FULL, False, False, Head.COMPUTE, guidance_scale)
        return Plan(tuple(PlannedStep(number, *alike) for number in range(1, count + 1)))
    full = [hybrid.is_full(number, num_inference_steps, config.tau) for number in range(1, count + 1)]
    every = config.T_LS if config.skips_layers else None
    steps = []
    for i, head in enumerate(head_cache.actions(full, config.T_cache)):
        may_skip = every is not None and not full[i]
        due = every is not None and not full[i] and i % every == 0
        guidance = guidance_schedule.scale_at(i + 1, config.schedule, guidance_scale)
        llm = Llm.FULL if full[i] else Llm.PRUNED
        steps.append(PlannedStep(i + 1, llm, may_skip and not due, due, head, guidance))
    return Plan(tuple(steps))


def _is_used(measured: int, steps: Sequence[PlannedStep], runs: Sequence[bool]) -> bool:
    """Whether a step runs on the layers measured at index `measured`, before the next measurement replaces them."""
    for later in range(measured + 1, len(steps)):
        if steps[later].measure:
            return False
        if steps[later].skip and runs[later]:
            return True
    return False
