"""What generation does unless told otherwise; FlashU's settings, under the paper's names, and presets. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashu.arguments import is_finite, is_whole
from flashu.errors import InputError

NUM_INFERENCE_STEPS = 50
GUIDANCE_SCALE, EMBEDDED_GUIDANCE = 7.5, 2.5  # of the released models, and of the one that ships with the package
BATCH_SIZE = 8
MAX_NEW_TOKENS = 128
SOLVER_ORDERS = (1, 2)  # a third falls apart on a time grid whose intervals grow

Schedule = Sequence[tuple[int, float]]

_NOT_GIVEN: Any = object()
_TABLE_7: Schedule = ((24, 7.5), (11, 10.0))


@dataclass(frozen=True, init=False)
class FlashUConfig:
    """What FlashU may do while generating, and while answering. The defaults are the paper's Table 7, for Show-o2 1.5B.

    r_p: share of each FFN's neurons left out on steps that are not full (§3.2); 0 turns it off.
    head_prune_ratio: share of each layer's KV groups left out on every step (§3.2); 0 turns it off.
    r_LS, T_LS: share of layers skipped, and the steps between measurements of which (§3.3); 0, or None, is off.
    T_cache: the head's output is stored on every such step and reused between (§3.4); None is off.
    tau: this many last grid points run full: whole FFNs, every layer, no stored head output (§3.5).
    schedule: (steps, guidance scale) phases, in order (§3.6); None keeps the call's guidance throughout.
        A phase at scale 0 or 1 follows the prompt alone, at half the cost. `adaptive_guidance_schedule` is the
        release's other name for it.
    num_inference_steps: grid points T. Without it, the schedule's length; without that, 50.
    solver_order: 1 takes Euler steps, as the paper; 2 leans on the step before (Adams-Bashforth), so that fewer do.

    While answering questions about images, a model goes by these instead, all off by default:

    und_r_p: share of each FFN's neurons left out.
    und_r_LS: share of layers left out: always the same ones, by calibration.
    und_r_tok, und_tok_layer: share of an image's tokens dropped after that layer (from 0), by their value vectors.

    T_LS and T_cache also take the release's -1 for off. Raises `InputError` saying what does not fit.
    """

    r_p: float
    head_prune_ratio: float
    r_LS: float  # noqa: N815 - the paper's name
    T_LS: int | None
    T_cache: int | None
    tau: int
    schedule: tuple[tuple[int, float], ...] | None
    num_inference_steps: int | None
    solver_order: int
    und_r_p: float
    und_r_LS: float  # noqa: N815
    und_r_tok: float
    und_tok_layer: int

    def __init__(
        self,
        r_p: float = 0.20,
        head_prune_ratio: float = 0.0,
        r_LS: float = 0.20,  # noqa: N803
        T_LS: int | None = 10,  # noqa: N803
        T_cache: int | None = 5,  # noqa: N803
        tau: int = 11,
        schedule: Schedule | None = _NOT_GIVEN,
        num_inference_steps: int | None = None,
        *,
        adaptive_guidance_schedule: Schedule | None = _NOT_GIVEN,
        solver_order: int = 1,
        und_r_p: float = 0.0,
        und_r_LS: float = 0.0,  # noqa: N803
        und_r_tok: float = 0.0,
        und_tok_layer: int = 2,
    ):
        if schedule is not _NOT_GIVEN and adaptive_guidance_schedule is not _NOT_GIVEN:
            raise InputError("schedule and adaptive_guidance_schedule are two names for one setting; give one")
        if schedule is _NOT_GIVEN:
            schedule = _TABLE_7 if adaptive_guidance_schedule is _NOT_GIVEN else adaptive_guidance_schedule
        values = {
            "r_p": _ratio("r_p", r_p),
            "head_prune_ratio": _ratio("head_prune_ratio", head_prune_ratio),
            "r_LS": _ratio("r_LS", r_LS),
            "T_LS": _interval("T_LS", T_LS),
            "T_cache": _interval("T_cache", T_cache),
            "tau": tau,
            "schedule": _phases(schedule),
            "num_inference_steps": num_inference_steps,
            "solver_order": solver_order,
            "und_r_p": _ratio("und_r_p", und_r_p),
            "und_r_LS": _ratio("und_r_LS", und_r_LS),
            "und_r_tok": _ratio("und_r_tok", und_r_tok),
            "und_tok_layer": und_tok_layer,
        }
        if not is_whole(solver_order) or solver_order not in SOLVER_ORDERS:
            raise InputError(f"solver_order is {solver_order}; it is 1 (Euler) or 2 (Adams-Bashforth)")
        if not is_whole(und_tok_layer) or und_tok_layer < 0:
            raise InputError(f"und_tok_layer is {und_tok_layer}; it is the number of a layer, counted from 0")
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.check_steps(self.total_steps)

    @property
    def adaptive_guidance_schedule(self) -> tuple[tuple[int, float], ...] | None:
        return self.schedule

    @property
    def total_steps(self) -> int:
        """T: grid points of a run that asks for no other number."""
        if self.num_inference_steps is not None:
            return self.num_inference_steps
        return sum(steps for steps, _ in self.schedule) if self.schedule else NUM_INFERENCE_STEPS

    @property
    def final_guidance(self) -> float | None:
        """The scale of the last step, the paper's s0 (§3.6), which is the baseline's; None without a schedule."""
        left = self.total_steps - 1
        for steps, scale in self.schedule or ():
            left -= steps
            if left <= 0:
                return scale
        return None

    def at_guidance(self, scale: float) -> FlashUConfig:
        """The same, with the schedule's scales in proportion and the last step's `scale`; unchanged without one."""
        last = self.final_guidance
        if not last or self.schedule is None:
            return self
        return replace(self, schedule=tuple((steps, scale * (phase / last)) for steps, phase in self.schedule))

    @property
    def skips_layers(self) -> bool:
        return self.r_LS > 0 and self.T_LS is not None

    def check_steps(self, num_inference_steps: int) -> None:
        """Raises `InputError` unless these settings fit a grid of that many points."""
        if not is_whole(num_inference_steps) or num_inference_steps < 2:
            raise InputError(f"num_inference_steps is {num_inference_steps}; it must be a whole number, at least 2")
        if not is_whole(self.tau) or not 0 <= self.tau <= num_inference_steps:
            raise InputError(
                f"tau is {self.tau}; it counts full steps, so it must be a whole number "
                f"from 0 to num_inference_steps ({num_inference_steps})"
            )
        covered = sum(steps for steps, _ in self.schedule) if self.schedule else num_inference_steps
        if covered < num_inference_steps - 1:
            raise InputError(
                f"the guidance schedule covers {covered} steps, but {num_inference_steps} grid points take "
                f"{num_inference_steps - 1}; lengthen a phase, or give schedule=None for one scale throughout"
            )

    def describe(self) -> str:
        """The techniques that are on, in a line."""
        parts = []
        if self.r_p:
            parts.append(f"FFN pruning r_p={self.r_p:g}")
        if self.head_prune_ratio:
            parts.append(f"KV-group pruning {self.head_prune_ratio:g}")
        if self.skips_layers:
            parts.append(f"layer skipping r_LS={self.r_LS:g} every T_LS={self.T_LS}")
        if self.T_cache:
            parts.append(f"head cache T_cache={self.T_cache}")
        if parts and self.tau:
            parts.append(f"tau={self.tau} full steps")
        if self.schedule:
            parts.append("guidance " + ", ".join(f"{steps}x{scale:g}" for steps, scale in self.schedule))
        if self.solver_order > 1:
            parts.append(f"solver of order {self.solver_order}")
        understanding = []
        if self.und_r_p:
            understanding.append(f"FFN pruning und_r_p={self.und_r_p:g}")
        if self.und_r_LS:
            understanding.append(f"layer skipping und_r_LS={self.und_r_LS:g}")
        if self.und_r_tok:
            understanding.append(f"token pruning und_r_tok={self.und_r_tok:g} after layer {self.und_tok_layer}")
        if understanding:
            parts.append("answering with " + ", ".join(understanding))
        return "; ".join(parts) or "off"


def _ratio(name: str, value: float) -> float:
    if not is_finite(value) or not 0 <= value < 1:
        raise InputError(f"{name} is {value}; it is the share left out, so it must be at least 0 and below 1")
    return float(value)


def _interval(name: str, value: int | None) -> int | None:
    if value is None or value == -1:
        return None
    if not is_whole(value) or value < 1:
        raise InputError(f"{name} is {value}; it is a number of steps, so it must be at least 1, or None for off")
    return value


def _phases(schedule: Schedule | None) -> tuple[tuple[int, float], ...] | None:
    if schedule is None:
        return None
    try:
        phases = tuple((steps, scale) for steps, scale in schedule)
    except (TypeError, ValueError):
        raise InputError(f"schedule is {schedule!r}; it must be a list of (steps, guidance scale) pairs") from None
    for steps, scale in phases:
        if not is_whole(steps) or steps < 1:
            raise InputError(f"schedule has a phase of {steps} steps; each must be a whole number, at least 1")
        if not is_finite(scale) or scale < 0:
            raise InputError(f"schedule has guidance scale {scale}; each must be a number, 0 or more")
    if not phases:
        raise InputError("schedule is empty; give at least one (steps, guidance scale) phase, or None")
    return tuple((steps, float(scale)) for steps, scale in phases)


_PAPER = FlashUConfig()
_OFF = FlashUConfig(r_p=0, r_LS=0, T_LS=None, T_cache=None, tau=0, schedule=None, num_inference_steps=50)

FLASHU_PRESETS = {
    "paper-1.5b": _PAPER,
    # The paper gives settings for 1.5B only. The ratios are the same for the others until something better is measured.
    "paper-1.5b-hq": _PAPER,
    "paper-7b": _PAPER,
    "fast": FlashUConfig(r_p=0.30, r_LS=0.30, tau=5),
    "quality": FlashUConfig(r_p=0.10, r_LS=0.10, tau=15),
    # What benchmarks/quality.py found for the built-in model, whose ten layers can spare none.
    "embedded": FlashUConfig(r_LS=0, T_cache=3, schedule=None, num_inference_steps=35),
    # The whole network, on few steps of order 2: what beat every technique above on the built-in model.
    "few-steps": replace(_OFF, solver_order=2, num_inference_steps=14),
    "off": _OFF,
}


def preset_for(model: str) -> str:
    """The name of the preset that is meant for a model, by its path or hub id."""
    return "embedded" if model == "embedded" else "paper-1.5b"


def flashu_preset(name: str) -> FlashUConfig:
    """The settings known by `name`. Raises `InputError` with the list of names."""
    if name not in FLASHU_PRESETS:
        raise InputError(f"no FlashU preset {name!r}; there are: {', '.join(FLASHU_PRESETS)}")
    return FLASHU_PRESETS[name]
