"""The arms of a comparison: unaccelerated Show-o2 and FlashU, as two ordinary runs that are alike in all else.

    OUT/baseline/    a run
    OUT/flashu/      a run

What a benchmark makes of their images is its own: `jobs.dpg.benchmark`, `jobs.geneval_benchmark`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from flashu.config import NUM_INFERENCE_STEPS
from flashu.errors import InputError
from jobs.config import FlashUSection, RunConfig, SamplingSection
from jobs.generate import EXIT_INCOMPLETE, GenerationJob
from jobs.prepare import PreparedRun
from jobs.progress import Progress
from jobs.worker_model import OFF, TRAJECTORIES, flashu_settings
from manifests.dpg import IMAGES

BASELINE, FLASHU = "baseline", "flashu"


@dataclass
class ArmsConfig(RunConfig):
    """A run's settings, and which arms there are.

    Both are guided alike: to the scale s0 that FlashU's schedule ends at (§3.6), or `sampling.guidance_scale`, at which
    the schedule then ends. The baseline takes `sampling.num_inference_steps`, FlashU `flashu.num_inference_steps`.
    """

    sampling: SamplingSection = field(default_factory=lambda: SamplingSection(num_images=IMAGES))
    arms: Any = f"{BASELINE},{FLASHU}"  # or one of them

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.arms, str):
            self.arms = [arm.strip() for arm in self.arms.split(",")]

    def run_config(self, arm: str, manifest: str) -> RunConfig:
        """The run of an arm. Raises `InputError` for FlashU's settings."""
        settings = flashu_settings(self.flashu, self.sampling)
        sections = {section.name: getattr(self, section.name) for section in fields(RunConfig)}
        sections["output"] = replace(self.output, path=f"{self.output.path.rstrip('/')}/{arm}")
        sections["manifest"] = replace(self.manifest, path=manifest)
        if arm == BASELINE:
            guidance = self.sampling.guidance_scale
            if guidance is None and settings:
                guidance = settings.final_guidance
            sections["sampling"] = replace(self.sampling, guidance_scale=guidance)
            sections["flashu"] = FlashUSection(preset=OFF)
        elif self.flashu.num_inference_steps:
            sections["sampling"] = replace(self.sampling, num_inference_steps=self.flashu.num_inference_steps)
            sections["flashu"] = replace(self.flashu, num_inference_steps=None)
        return RunConfig(**sections)


def check_arms(config: ArmsConfig) -> None:
    """Raises `InputError` for arms that there are not, or that could not be compared."""
    if config.arms not in ([BASELINE], [FLASHU], [BASELINE, FLASHU]):
        given = ",".join(map(str, config.arms)) if isinstance(config.arms, list) else config.arms
        raise InputError(f"arms is {given!r}; give {BASELINE}, {FLASHU}, or both as {BASELINE},{FLASHU}")
    if FLASHU in config.arms and config.flashu.preset == OFF:
        raise InputError(f"flashu.preset is off, so the arm {FLASHU} would be the {BASELINE}; choose a preset, or arms")
    settings, guidance = flashu_settings(config.flashu, config.sampling), config.sampling.guidance_scale
    final = settings and settings.final_guidance
    if len(config.arms) > 1 and None not in (final, guidance) and final != guidance:
        raise InputError(
            f"flashu.schedule ends at guidance {final:g} and sampling.guidance_scale is {guidance:g}, so the arms "
            "would not be guided alike; set one of them alone"
        )


def resolved(config: ArmsConfig) -> dict[str, Any]:
    """The settings, with what null comes to where the files here say it."""
    settings = flashu_settings(config.flashu, config.sampling)
    told = config.to_dict()
    if settings:
        told["flashu"]["num_inference_steps"] = settings.total_steps
        told["flashu"]["calibration"] = config.flashu.calibration or TRAJECTORIES
        if config.sampling.guidance_scale is None:
            told["sampling"]["guidance_scale"] = settings.final_guidance
    told["sampling"]["num_inference_steps"] = config.sampling.num_inference_steps or NUM_INFERENCE_STEPS
    return told


def describe_arms(config: ArmsConfig) -> str:
    """What each arm does, in a line each."""
    lines = []
    for arm in config.arms:
        run = config.run_config(arm, "")
        settings = flashu_settings(run.flashu, run.sampling)
        steps = settings.total_steps if settings else run.sampling.num_inference_steps or NUM_INFERENCE_STEPS
        guidance = "the model's own" if run.sampling.guidance_scale is None else f"{run.sampling.guidance_scale:g}"
        if settings and settings.schedule:
            lines.append(f"{arm}: {steps} points; {settings.describe()}")
        else:
            lines.append(
                f"{arm}: {steps} points, guidance {guidance}" + (f"; {settings.describe()}" if settings else "")
            )
    return "\n".join(lines)


def make_images(runs: Mapping[str, PreparedRun], stages: int) -> tuple[bool, int]:
    """Make what is left of the arms' images, one arm after the other, as the first of so many stages.

    Returns whether to go on, and the exit code so far.
    """
    code = 0
    for number, (name, prepared) in enumerate(runs.items(), start=1):
        with Progress() as progress:
            progress.note(f"Stage {number} of {stages}: images, {name}")
            job = GenerationJob(prepared, progress)
            of_arm = job.run()
        if job.state != "complete":
            return False, of_arm or EXIT_INCOMPLETE
        code = max(code, of_arm)
    return True, code
