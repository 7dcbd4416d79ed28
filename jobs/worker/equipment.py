"""What a worker makes images with: model and scorers loaded, blocks compiled, and how many images to make at once.

It is set up before the first shard; what then becomes of shards is in `shard`.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

import flashu
from cluster.checkpoint_cache import local_copy
from cluster.node_cache import cache_folder
from cluster.storage import Storage
from flashu.acceleration.guidance_schedule import is_guided
from flashu.config import FlashUConfig
from flashu.devices import is_device_error, is_out_of_memory
from flashu.errors import InputError
from flashu.models import geometry
from jobs.metrics.clip import ClipScorer
from jobs.metrics.vqa import VqaScorer
from jobs.settings.config import AUTO, RunConfig
from jobs.settings.inputs import prompts_of
from jobs.worker import warm_up
from jobs.worker.batch_maker import BatchMaker, Scorer
from jobs.worker.batch_size import choose_batch_size
from jobs.worker.batches import Defaults
from jobs.worker.model import WorkerModel, load
from manifests.plan import Manifest

log = logging.getLogger(__name__)


@dataclass
class Equipment:
    """What a worker makes images with."""

    model: WorkerModel
    maker: BatchMaker
    max_tokens: int  # of a prompt, beside an image of the run's size
    batch_size: int  # to begin with


def set_up(
    config: RunConfig,
    manifest: Manifest,
    settings: FlashUConfig | None,
    size: int | tuple[int, int] | None,
    run: Storage,
    device: str | None,
) -> Equipment:
    """`settings` are FlashU's, None for stock; `size` is in pixels, None for the model's own.

    Raises `InputError`, `ManifestError`, `StorageError` or `OutOfMemoryError` where another worker would fail alike.
    """
    s3, sampling, cache_dir = config.storage.s3, config.sampling, config.model.cache_dir
    model = load(config.model, config.flashu, settings, run, s3, device, lambda: _first_prompt(manifest))
    network = model.pipe.model
    guidance = network.config.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
    defaults = Defaults(sampling.seed, sampling.num_images, guidance, sampling.negative_prompt)
    maker = BatchMaker(model.pipe, sampling, size, defaults, _scorers(config, model, network.device))
    height, width = geometry.token_grid(size, network.config.native_grid)
    max_tokens = network.config.max_text_tokens(height * width)
    _warm_up(config, settings, model, maker, manifest)
    setting = _batch_setting(config, settings, model, maker)
    batch_size = choose_batch_size(sampling.batch_size, network.device, maker.make_two, setting, cache_dir)
    return Equipment(model, maker, max_tokens, batch_size)


def _first_prompt(manifest: Manifest) -> str:
    for prompt in prompts_of(manifest):
        return prompt
    raise InputError("flashu.calibration=release goes by the first prompt, and the manifest has none")


def _scorers(config: RunConfig, model: WorkerModel, device: torch.device) -> dict[str, Scorer]:
    quality, scorers = config.quality, {}
    if quality.enabled and quality.clip:
        checkpoint = local_copy(quality.clip, config.storage.s3, config.model.cache_dir)
        scorers["clip_score"] = ClipScorer(checkpoint, device)
    if quality.enabled and quality.vqa:
        scorers["vqa_score"] = VqaScorer(model.pipe)
    return scorers


def _warm_up(
    config: RunConfig, settings: FlashUConfig | None, model: WorkerModel, maker: BatchMaker, manifest: Manifest
) -> None:
    """Have blocks compile, now, where no lease waits for it; with `compile: auto`, do without where they cannot."""
    pipe, defaults, given = model.pipe, maker.defaults, manifest.schema.names
    if not pipe.blocks.compiled:
        return
    kinds = warm_up.BatchKinds(
        defaults.guidance_scale,
        defaults.negative_prompt,
        own_negatives="negative_prompt" in given,
        own_guidance="guidance_scale" in given,
    )
    images = warm_up.IMAGES
    if config.sampling.batch_size != AUTO:
        images = min(images, config.sampling.batch_size)
    setting = _batch_setting(config, settings, model, maker)
    setting |= {**asdict(kinds), "images": images, **warm_up.compiling_facts(pipe)}
    folder = cache_folder(config.model.cache_dir) / "warmed-up"
    try:
        warm_up.first_on_node(folder, setting, lambda: warm_up.warm_up(maker.make, kinds, images))
    except Exception as error:
        if config.model.compile != AUTO or is_device_error(error) or is_out_of_memory(error):
            raise
        pipe.compile("off")
        warm_up.warm_up(maker.make, kinds, 1)  # which raises what has another reason
        log.warning("running uncompiled, as blocks do not compile here", exc_info=error)
    if graphs := pipe.blocks.graphs:
        log.info("%d calls are CUDA graphs, which take %.2f GiB", graphs.count, graphs.bytes / 2**30)


def _batch_setting(
    config: RunConfig, settings: FlashUConfig | None, model: WorkerModel, maker: BatchMaker
) -> dict[str, Any]:
    """What the best batch size depends on, beside the GPU."""
    return {
        "model": model.fingerprint,
        "vae": asdict(model.pipe.vae.geometry),
        "dtype": model.dtype,
        "size": maker.size,
        "num_inference_steps": config.sampling.num_inference_steps,
        "guided": is_guided(maker.defaults.guidance_scale),
        "negative_prompt": maker.defaults.negative_prompt,
        "flashu": settings and asdict(settings),
        "scores": list(maker.scorers),
        "compiled": config.model.compile if model.pipe.blocks.compiled else None,
        "version": flashu.__version__,
    }
