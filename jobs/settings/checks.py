"""What can be wrong with a run's settings, as far as that shows without a look at files."""

from __future__ import annotations

from typing import Any

import torch

from flashu import arguments
from flashu.acceleration.plan import make_plan
from flashu.config import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, FlashUConfig
from flashu.devices import resolve_dtype
from flashu.errors import InputError
from flashu.models.blocks import check_mode
from flashu.models.geometry import parse_size as token_grid
from flashu.sampler import time_grid
from jobs.dataset.encoding import ImageEncoder
from jobs.dataset.formats import FORMATS
from jobs.settings.acceleration import flashu_settings
from jobs.settings.config import AUTO, RunConfig
from jobs.settings.image_size import parse_size


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
