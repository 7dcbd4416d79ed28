"""FlashU's settings, as the sections of a config come to them."""

from __future__ import annotations

from flashu import arguments
from flashu.config import FlashUConfig, flashu_preset
from flashu.errors import InputError
from jobs.settings.config import FlashUSection, SamplingSection

OFF = "off"
SETTINGS = ("r_p", "head_prune_ratio", "r_LS", "T_LS", "T_cache", "tau", "schedule", "solver_order")
TRAJECTORIES, RELEASE = "trajectories", "release"
CALIBRATIONS = {TRAJECTORIES: "trajectories", RELEASE: "tokens"}  # as `flashu.calibration` calls the methods


def flashu_settings(section: FlashUSection, sampling: SamplingSection) -> FlashUConfig | None:
    """The section's settings, or None for stock Show-o2. Raises `InputError`.

    A preset's schedule is in proportion to the guidance scale, where one is set: it ends there (§3.6).
    """
    given = {name: getattr(section, name) for name in SETTINGS if getattr(section, name) is not None}
    if section.preset == OFF:
        others = ("num_inference_steps", "scores", "calibration")
        idle = [*given, *(name for name in others if getattr(section, name) is not None)]
        if idle:
            raise InputError(
                f"flashu.preset is off, so {', '.join(idle)} would do nothing; choose another preset, or drop "
                f"them (where a config sets them: {' '.join(f'flashu.{name}=null' for name in idle)})"
            )
        return None
    if section.calibration not in (None, *CALIBRATIONS):
        raise InputError(f"flashu.calibration is {section.calibration!r}; choose one of: {', '.join(CALIBRATIONS)}")
    if section.calibration and section.scores:
        raise InputError("flashu.scores names scores, so flashu.calibration would do nothing; drop one of them")
    preset, guidance = flashu_preset(section.preset), sampling.guidance_scale
    if guidance is not None:
        arguments.finite("sampling.guidance_scale", guidance, zero=True)
    own_steps = section.num_inference_steps is not None
    asked = section.num_inference_steps if own_steps else sampling.num_inference_steps
    num_inference_steps = preset.num_inference_steps if asked is None else asked
    values = {name: getattr(preset, name) for name in SETTINGS}
    if "schedule" in given:
        given["schedule"] = given["schedule"] or None
    try:
        settings = FlashUConfig(**(values | given), num_inference_steps=num_inference_steps)
        return settings if guidance is None or "schedule" in given else settings.at_guidance(guidance)
    except InputError as error:
        if given or asked is None:
            raise
        name = "flashu" if own_steps else "sampling"
        raise InputError(
            f"{name}.num_inference_steps is {asked}, and flashu.preset={section.preset} is made for "
            f"{preset.total_steps}: {error}. Set flashu.tau or flashu.schedule to fit, or another flashu.preset "
            "(few-steps, off)"
        ) from None
