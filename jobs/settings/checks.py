"""What can be wrong with a run's settings, as far as that shows without a look at what they name.

What is wrong with a text that is no setting is told by `config_text`, what is not there of what they name by `inputs`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from flashu import arguments
from flashu.acceleration.plan import make_plan
from flashu.config import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, FlashUConfig
from flashu.devices import resolve_dtype
from flashu.errors import InputError
from flashu.models.blocks import check_mode
from flashu.models.geometry import token_grid
from flashu.sampler import time_grid
from jobs.dataset.formats import FORMATS
from jobs.dataset.images import ImageEncoder
from jobs.settings.acceleration import flashu_settings
from jobs.settings.config import AUTO, RunConfig, parse_size


def check_settings(config: RunConfig) -> FlashUConfig | None:
    """Check what needs no look at files. Returns FlashU's settings, None for stock. Raises `InputError`."""
    sampling, output = config.sampling, config.output
    settings = flashu_settings(config.flashu, sampling)
    steps = settings.total_steps if settings else sampling.num_inference_steps or NUM_INFERENCE_STEPS
    time_grid(steps, sampling.time_shift)
    guidance = GUIDANCE_SCALE if sampling.guidance_scale is None else sampling.guidance_scale
    make_plan(settings, steps, arguments.finite("sampling.guidance_scale", guidance, zero=True))
    size = parse_size("sampling.size", sampling.size)
    if size is not None:
        token_grid(size, (1, 1))
    arguments.whole("sampling.num_images", sampling.num_images, least=1)
    check_batch_size(sampling.batch_size)
    check_mode("model.compile", config.model.compile)
    resolve_dtype(config.model.dtype, torch.device("cpu"), "model.dtype")
    if output.format not in FORMATS:
        raise InputError(f"output.format is {output.format!r}; choose one of: {', '.join(FORMATS)}")
    ImageEncoder(output.image_format, output.quality)
    cluster = config.cluster
    if cluster.workers != AUTO:
        arguments.whole("cluster.workers", cluster.workers, least=1)
    for name in ("cpus_per_worker", "lease_timeout_s", "start_timeout_s"):
        arguments.finite(f"cluster.{name}", getattr(cluster, name), zero=False)
    arguments.whole("cluster.max_attempts", cluster.max_attempts, least=1)
    if cluster.gpus_per_worker is not None:
        arguments.finite("cluster.gpus_per_worker", cluster.gpus_per_worker, zero=True)
    arguments.finite("storage.retry_for_s", config.storage.retry_for_s, zero=True)
    return settings


def check_batch_size(value: Any) -> None:
    """Raises `InputError` unless it is a number or "auto"."""
    if value != AUTO:
        try:
            arguments.whole("sampling.batch_size", value, least=1)
        except InputError as error:
            raise InputError(f"{error}, or {AUTO}") from None


def check_paths(config: RunConfig) -> None:
    """Raises `InputError` where a run has no prompts or no folder, or one that goes with its job."""
    for name in ("manifest", "output"):
        if not getattr(config, name).path:
            raise InputError(f"{name}.path is not set; put it into the config, or add {name}.path=…")
    output = config.output.path
    if "working_dir_files" in Path.cwd().parts and "://" not in output and not os.path.isabs(output):
        raise InputError(
            f"output.path {output} is relative to a working directory that Ray removes with the job; "
            "give an absolute path or s3://…"
        )


def overruled(config: RunConfig, settings: FlashUConfig | None) -> list[str]:
    """Settings that another one goes before, where both are set, or that nothing needs, each in a sentence."""
    if not settings:
        return []
    notes, steps, guidance = [], config.sampling.num_inference_steps, config.sampling.guidance_scale
    if steps not in (None, settings.total_steps):
        notes.append(
            f"FlashU is on, so its own {settings.total_steps} inference steps count (flashu.num_inference_steps), and "
            f"not sampling.num_inference_steps={steps}"
        )
    if config.flashu.schedule and guidance is not None:
        notes.append(f"flashu.schedule says how images are guided, and not sampling.guidance_scale={guidance:g}")
    if config.flashu.calibration and not (settings.r_p or settings.head_prune_ratio):
        notes.append("Nothing is pruned with these settings, so flashu.calibration does nothing")
    return notes
