"""The plan: what every step of a run does, as a table, before anything runs.

`make_plan` is a pure function of settings; the sampler executes its steps and knows no settings. Dead work never enters
a plan: no LLM on a step that reuses the head's output, no measurement that no later step uses, no store without reuse,
no unconditional rows on a step that is not guided.
Steps are counted from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from flashu.acceleration import guidance_schedule, head_cache, hybrid, multistep
from flashu.acceleration.head_cache import Head
from flashu.config import FLASHU_PRESETS, FlashUConfig

__all__ = ["Head", "Llm", "Plan", "PlannedStep", "make_plan"]


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
    """The steps of a run over `num_inference_steps` grid points, one fewer than points.

    `config=None` is the unaccelerated run. `guidance_scale` holds where the config has no schedule.
    Raises `InputError` when the config does not fit the number of steps.
    """
    (config or FLASHU_PRESETS["off"]).check_steps(num_inference_steps)
    count = num_inference_steps - 1
    if config is None:
        alike = (Llm.FULL, False, False, Head.COMPUTE, guidance_scale)
        return Plan(tuple(PlannedStep(number, *alike) for number in range(1, count + 1)))

    numbers = range(1, count + 1)
    full = [hybrid.is_full(step, num_inference_steps, config.tau) for step in numbers]
    guidance = [guidance_schedule.scale_at(step, config.schedule, guidance_scale) for step in numbers]
    orders = multistep.orders(guidance, config.solver_order)
    heads = head_cache.actions(full, config.T_cache, list(map(guidance_schedule.is_guided, guidance)))
    # A step that is due to measure runs every layer, whether or not its measurement turns out to be of use.
    due = _due(config, full)
    skips = [config.skips_layers and not full[i] and not due[i] for i in range(count)]
    runs = [head is not Head.REUSE for head in heads]
    measures = [due[i] and _is_used(i, due, skips, runs) for i in range(count)]

    steps = []
    for i, number in enumerate(numbers):
        if not runs[i] and not measures[i]:
            llm = Llm.NONE
        else:
            llm = Llm.PRUNED if config.r_p > 0 and not full[i] else Llm.FULL
        steps.append(
            PlannedStep(
                number=number,
                llm=llm,
                skip=skips[i] and llm is not Llm.NONE,
                measure=measures[i],
                head=heads[i],
                guidance=guidance[i],
                order=orders[i],
            )
        )
    return Plan(tuple(steps))


def release_plan(config: FlashUConfig | None, num_inference_steps: int, guidance_scale: float) -> Plan:
    """The steps as the release makes them, dead work and all: the LLM runs on every step, a step that is due measures
    whether or not that is of use, and unconditional rows are there throughout."""
    count = num_inference_steps - 1
    if config is None:
        return make_plan(None, num_inference_steps, guidance_scale)
    full = [hybrid.is_full(step, num_inference_steps, config.tau) for step in range(1, count + 1)]
    due = _due(config, full)
    return Plan(
        tuple(
            PlannedStep(
                number=i + 1,
                llm=Llm.FULL if full[i] else Llm.PRUNED,
                skip=config.skips_layers and not full[i] and not due[i],
                measure=due[i],
                head=head,
                guidance=guidance_schedule.scale_at(i + 1, config.schedule, guidance_scale),
            )
            for i, head in enumerate(head_cache.actions(full, config.T_cache))
        )
    )


def _due(config: FlashUConfig, full: Sequence[bool]) -> list[bool]:
    """Which steps are to measure layers, every `T_LS`-th that is not full, whether or not that is of use."""
    every = config.T_LS if config.skips_layers else None
    return [every is not None and not is_full and i % every == 0 for i, is_full in enumerate(full)]


def _is_used(measured: int, due: Sequence[bool], skips: Sequence[bool], runs: Sequence[bool]) -> bool:
    """Whether a step runs on the layers measured at index `measured`, before the next measurement replaces them."""
    for later in range(measured + 1, len(due)):
        if due[later]:
            return False
        if skips[later] and runs[later]:
            return True
    return False
