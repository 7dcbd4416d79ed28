"""The arms of a comparison: unaccelerated Show-o2 and FlashU, as two ordinary runs that are alike in all else.

    OUT/baseline/    a run
    OUT/flashu/      a run

What a benchmark makes of their images is its own: `jobs.scoring.benchmark`, `jobs.scoring.geneval`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.open_storage import open_storage
from cluster.storage import NotFound, Storage
from flashu.config import NUM_INFERENCE_STEPS
from flashu.errors import InputError
from jobs.dataset.keys import RUN
from jobs.driver.prepare import PreparedRun
from jobs.driver.progress import Progress
from jobs.driver.run import EXIT_INCOMPLETE, GenerationJob
from jobs.settings.acceleration import OFF, TRAJECTORIES, flashu_settings
from jobs.settings.checks import check_settings
from jobs.settings.config import BASELINE, FLASHU, FlashUSection, RunConfig, SamplingSection
from jobs.settings.inputs import check_inputs
from jobs.statistics.collect import collect_statistics
from jobs.statistics.summary import summarise
from manifests.importers import IMAGES
from manifests.plan import Manifest

PROMPTS = "prompts.parquet"


@dataclass
class ArmsConfig(RunConfig):
    """A run's settings, and which arms there are.

    Both are guided alike: to the scale s0 that FlashU's schedule ends at (§3.6), or `sampling.guidance_scale`, at which
    the schedule then ends. The baseline takes `sampling.num_inference_steps`, FlashU `flashu.num_inference_steps`.
    """

    sampling: SamplingSection = field(default_factory=lambda: SamplingSection(num_images=IMAGES))
    arms: Any = f"{BASELINE},{FLASHU}"  # which are run: both, or one of them

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
        elif self.flashu.num_inference_steps is not None:
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


def check_guidance(config: ArmsConfig, manifest: Manifest) -> None:
    """Raises `InputError` for a manifest that says how the baseline is guided, where FlashU goes by its schedule."""
    settings = flashu_settings(config.flashu, config.sampling)
    if len(config.arms) > 1 and settings and settings.schedule and "guidance_scale" in manifest.schema.names:
        raise InputError(
            f"{manifest.path} has guidance scales of its own, which FlashU's schedule goes before, so the arms would "
            "not be guided alike; drop the column, or set flashu.schedule=[]"
        )


def open_output(config: ArmsConfig) -> tuple[Storage, bool]:
    """Where the arms' runs go, and whether that is new; nothing is written there yet.

    Raises `InputError`, `StorageError` for settings or inputs that cannot be used.
    """
    check_arms(config)
    if not config.output.path:
        raise InputError("output.path is not set; put it into the config, or add output.path=…")
    for arm in config.arms:
        check_settings(config.run_config(arm, config.manifest.path))
    storage = open_storage(config.output.path, config.storage.s3)
    new = not any(storage.exists(f"{arm}/{RUN}") for arm in config.arms)
    if new:  # else `prepare` finds out whether it matters
        check_inputs(config)
    if storage.exists(RUN):
        raise InputError(f"{storage.url} holds a run; give a benchmark another output.path")
    return storage, new


def write_prompts(storage: Storage, prompts: pa.Table, source: str) -> str:
    """A benchmark's own prompts as a manifest, written once: a run holds on to its manifest's fingerprint.

    Returns its URL. Raises `InputError` where other prompts are there.
    """
    url = f"{storage.url}/{PROMPTS}"
    try:
        if pq.read_table(io.BytesIO(storage.get(PROMPTS))).to_pydict() != prompts.to_pydict():
            raise InputError(
                f"{url} holds other prompts than {source}, or another number of images of each; "
                "give another output.path"
            )
    except pa.ArrowInvalid:
        raise InputError(f"{url} cannot be read; remove it, and it is made again") from None
    except NotFound:
        buffer = io.BytesIO()
        pq.write_table(prompts, buffer)
        storage.put(PROMPTS, buffer.getvalue())
    return url


def resolved(config: ArmsConfig) -> dict[str, Any]:
    """The settings, with what null comes to where the files here say it."""
    settings = flashu_settings(config.flashu, config.sampling)
    told = config.to_dict()
    if settings:
        told["flashu"]["num_inference_steps"] = settings.total_steps
        if (settings.r_p or settings.head_prune_ratio) and not config.flashu.scores:
            told["flashu"]["calibration"] = config.flashu.calibration or TRAJECTORIES
        if config.sampling.guidance_scale is None:
            told["sampling"]["guidance_scale"] = settings.final_guidance
    if config.sampling.num_inference_steps is None:
        told["sampling"]["num_inference_steps"] = NUM_INFERENCE_STEPS
    return told


def describe_arms(config: ArmsConfig) -> str:
    """What each arm does, in a line each."""
    lines = []
    for arm in config.arms:
        run = config.run_config(arm, "")
        settings = flashu_settings(run.flashu, run.sampling)
        steps = settings.total_steps if settings else run.sampling.num_inference_steps or NUM_INFERENCE_STEPS
        guidance = "the model's own" if run.sampling.guidance_scale is None else f"{run.sampling.guidance_scale:g}"
        guided = "" if settings and settings.schedule else f", guidance {guidance}"
        lines.append(f"{arm}: {steps} points{guided}" + (f"; {settings.describe()}" if settings else ""))
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


def summary_of(prepared: PreparedRun) -> dict[str, Any]:
    """The summary of a run whose images are made, of what is committed."""
    return summarise(collect_statistics(prepared.storage), prepared.run_json, "complete")
