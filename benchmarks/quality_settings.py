"""The settings whose quality `benchmarks/quality.py` measures: the paper's, each of its parts, and what goes beyond."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flashu.config import EMBEDDED_GUIDANCE, FLASHU_PRESETS, NUM_INFERENCE_STEPS, FlashUConfig


@dataclass(frozen=True)
class Setting:
    group: str
    flashu: FlashUConfig | None = None
    steps: int = NUM_INFERENCE_STEPS  # of the unaccelerated model; FlashU's settings hold their own
    guidance: float | None = None  # the model's own
    calibration: str = "trajectories"  # "tokens": the release's way; "captions": trajectories of this world's captions
    whole: bool = False  # draws the whole bench

    @property
    def total_steps(self) -> int:
        return self.flashu.total_steps if self.flashu else self.steps


REFERENCE = "stock-50"
SWEEP_PROMPTS = 150
EARLY, LATE = 0.75 * EMBEDDED_GUIDANCE, EMBEDDED_GUIDANCE  # the paper's 7.5 and 10, in proportion
PAPER = replace(FLASHU_PRESETS["paper-1.5b"], schedule=((24, EARLY), (11, LATE)), num_inference_steps=35)
NOTHING = replace(PAPER, r_p=0, r_LS=0, T_cache=None, schedule=None)
OFF: dict[str, dict[str, Any]] = {
    "guidance-schedule": {"schedule": None},
    "ffn-pruning": {"r_p": 0},
    "layer-skipping": {"r_LS": 0},
    "head-cache": {"T_cache": None},
}
ON = {technique: {name: getattr(PAPER, name) for name in off} for technique, off in OFF.items()}
GUIDANCE_SCALES = (1, 1.75, 2.5, 3.5, 5, 7.5, 10)
PRUNED = replace(NOTHING, r_p=0.6)


def order_2(steps: int, **others: Any) -> FlashUConfig:
    """A solver of order 2, with nothing else on but what is named."""
    return replace(FLASHU_PRESETS["off"], solver_order=2, num_inference_steps=steps, **others)


SETTINGS: dict[str, Setting] = {
    REFERENCE: Setting("steps", whole=True),
    **{f"stock-{steps}": Setting("steps", steps=steps) for steps in (35, 20, 12, 8)},
    **{f"stock-20-guidance-{scale:g}": Setting("guidance", None, 20, scale) for scale in GUIDANCE_SCALES},
    "paper": Setting("presets", PAPER, whole=True),
    "embedded": Setting("presets", FLASHU_PRESETS["embedded"], whole=True),
    **{
        name: Setting("presets", replace(FLASHU_PRESETS[name], schedule=PAPER.schedule)) for name in ("fast", "quality")
    },
    "paper-7.5-10": Setting("guidance", FLASHU_PRESETS["paper-1.5b"]),
    "paper-no-lower-first": Setting("guidance", replace(PAPER, schedule=((24, LATE), (11, LATE / 0.75)))),
    **{f"{technique}-alone": Setting("alone", replace(NOTHING, **on)) for technique, on in ON.items()},
    **{f"paper-without-{technique}": Setting("without", replace(PAPER, **off)) for technique, off in OFF.items()},
    "paper-calibrated-by-tokens": Setting("calibration", PAPER, calibration="tokens"),
    "paper-calibrated-by-captions": Setting("calibration", PAPER, calibration="captions"),
    "r_p-0.6-by-trajectories": Setting("calibration", PRUNED),
    "r_p-0.6-by-tokens": Setting("calibration", PRUNED, calibration="tokens"),
    "r_p-0.6-by-captions": Setting("calibration", PRUNED, calibration="captions"),
    **{f"paper-r_LS-{share}": Setting("skipping", replace(PAPER, r_LS=share)) for share in (0.1, 0.3, 0.4)},
    **{f"paper-T_cache-{n}": Setting("cache", replace(PAPER, T_cache=n)) for n in (1, 2, 3, 4, 6, 7, 8)},
    **{f"paper-tau-{tau}": Setting("tau", replace(PAPER, tau=tau)) for tau in (3, 7, 15, 19)},
    **{  # the paper's proportions at other lengths
        f"paper-T-{steps}": Setting(
            "length",
            replace(PAPER, num_inference_steps=steps, tau=tau, schedule=((steps - tau, EARLY), (tau, LATE))),
        )
        for steps, tau in ((12, 4), (20, 6), (50, 16))
    },
    **{f"order-2-{steps}": Setting("order", order_2(steps), whole=True) for steps in (20, 16, 12, 10, 8)},
    "few-steps": Setting("order", FLASHU_PRESETS["few-steps"], whole=True),
    **{
        f"order-2-{name}": Setting("order", order_2(**settings))
        for name, settings in {
            "12-ffn-pruning": {"steps": 12, "r_p": 0.2},
            "12-ffn-pruning-tau-4": {"steps": 12, "r_p": 0.2, "tau": 4},
            "20-T_cache-2": {"steps": 20, "T_cache": 2},
            "35-T_cache-3": {"steps": 35, "T_cache": 3},
            "12-unguided-first": {"steps": 12, "schedule": ((1, 1.0), (11, LATE))},
            "12-unguided-last-3": {"steps": 12, "schedule": ((8, LATE), (4, 1.0))},
            "10-guided-middle": {"steps": 10, "schedule": ((1, 1.0), (5, LATE), (4, 1.0))},
        }.items()
    },
    "paper-order-2": Setting("order", replace(PAPER, solver_order=2)),
    "embedded-order-2": Setting("order", replace(FLASHU_PRESETS["embedded"], solver_order=2)),
}
