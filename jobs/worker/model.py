"""The model on a worker: fetched, loaded and accelerated as the config says, alike on every worker of a run; and the
scores that FlashU prunes by on all of them: given, or measured once, into the run's folder.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from cluster.checkpoint_cache import local_copy
from cluster.node_cache import cache_folder
from cluster.storage import S3Options, Storage
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.wanda import WandaScores
from flashu.calibration import calibrate
from flashu.config import FlashUConfig
from flashu.fingerprint import fingerprint
from flashu.patch import apply_flashu_patch
from flashu.pipeline import TextToImagePipeline
from flashu.probe import PROMPTS
from jobs.dataset.keys import SCORES
from jobs.settings.acceleration import CALIBRATIONS, OFF, RELEASE, TRAJECTORIES
from jobs.settings.config import FlashUSection, ModelSection
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


def shared_scores(
    pipe: TextToImagePipeline, run: Storage, calibration: str | None, first_prompt: Callable[[], str] | None
) -> WandaScores:
    """Those in the run's folder, measured by the first worker that asks; `calibration` is how, as the setting has it.

    `first_prompt` is the run's, which calibration as the release does it goes by.
    """
    key = hashlib.sha256(f"{os.getuid()} {run.url}".encode()).hexdigest()[:20]
    lock = FileLock(Path(tempfile.gettempdir()) / f"flashu-scores-{key}.lock")  # one worker of a node measures
    with tempfile.TemporaryDirectory() as scratch, lock:
        file = Path(scratch) / SCORES
        if not run.exists(SCORES):
            method = CALIBRATIONS[calibration or TRAJECTORIES]
            prompts = [first_prompt()] if calibration == RELEASE else PROMPTS
            calibrate(pipe.model, prompts, tokenizer=pipe.tokenizer, method=method).save(file)
            run.put_new(SCORES, file.read_bytes())  # another node may have been faster: its scores count
        file.write_bytes(run.get(SCORES))
        return WandaScores.load(file)


def digest(scores: WandaScores) -> str:
    """SHA-256 over what is pruned by."""
    sha256 = hashlib.sha256()
    for tensor in (*scores.ffn, *scores.attention):
        sha256.update(tensor.to(torch.float32).numpy().tobytes())
    return sha256.hexdigest()
