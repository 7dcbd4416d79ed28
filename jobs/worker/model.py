"""The model on a worker: fetched, loaded and accelerated as the config says, alike on every worker of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.checkpoint_cache import local_copy
from cluster.node_cache import cache_folder
from cluster.storage import S3Options, Storage
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.wanda import WandaScores
from flashu.config import FlashUConfig
from flashu.fingerprint import fingerprint
from flashu.patch import apply_flashu_patch
from flashu.pipeline import TextToImagePipeline
from jobs.settings.acceleration import OFF
from jobs.settings.config import FlashUSection, ModelSection
from jobs.worker.scores import digest, shared_scores
from jobs.worker.warm_up import keep_compiled_code


@dataclass
class WorkerModel:
    """A pipeline that is ready, and what tells it apart."""

    pipe: TextToImagePipeline
    fingerprint: str  # of the model's weights
    dtype: str
    identity: str  # of what is loaded: alike on all workers of a run, now and when it goes on


def load(
    model: ModelSection,
    flashu: FlashUSection,
    settings: FlashUConfig | None,
    run: Storage,
    s3: S3Options,
    device: str | None = None,
    first_prompt: Callable[[], str] | None = None,
) -> WorkerModel:
    """Fetch and load the checkpoint onto a device, CUDA if there is one and none is named, and switch FlashU on.

    `run` is where scores are kept that the run measures itself; for `first_prompt` see `shared_scores`.

    Raises `InputError` (with `CheckpointError`) and `StorageError` for what a user can mend.
    """

    def here(path: str | None) -> str | None:
        return path and local_copy(path, s3, model.cache_dir)

    pipe = TextToImagePipeline.from_pretrained(
        here(model.path),
        vae=here(model.vae),
        tokenizer=here(model.tokenizer),
        dtype=model.dtype,
        device=device,
        variant=model.variant,
    )
    own, dtype = fingerprint(pipe.model), pipe.model.number_format
    head = ", with a head of its own" if pipe.model.has_own_head else ""
    identity = f"model {own[:16]}{head}, VAE {fingerprint(pipe.vae)[:16]}, {dtype}"
    if model.compile != OFF:
        keep_compiled_code(cache_folder(model.cache_dir) / "compiled")
        pipe.compile(model.compile)
    if settings is not None:
        scores = None
        if Acceleration.of(settings, pipe.model.config.llm).needs_generation_scores:
            given = here(flashu.scores)
            scores = WandaScores.load(given) if given else shared_scores(pipe, run, flashu.calibration, first_prompt)
            identity += f", scores {digest(scores)[:16]}"
        apply_flashu_patch(pipe.model, settings, scores=scores, tokenizer=pipe.tokenizer)
    return WorkerModel(pipe, own, dtype, identity)
