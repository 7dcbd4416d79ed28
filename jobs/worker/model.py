"""The model on a worker: fetched, loaded and accelerated as the config says, alike on every worker of a run."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
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

COMPILED_CODE = "TORCHINDUCTOR_CACHE_DIR"  # where PyTorch keeps it


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

    `first_prompt` is the run's, which calibration as the release does it goes by.

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
    own = fingerprint(pipe.model)
    dtype = pipe.model.number_format
    identity = f"model {own[:16]}{', with a head of its own' if pipe.model.has_own_head else ''}"
    identity += f", VAE {fingerprint(pipe.vae)[:16]}, {dtype}"
    if model.compile != OFF:
        _keep_compiled_code(cache_folder(model.cache_dir) / "compiled")
        pipe.compile(model.compile)
    if settings is not None:
        scores = None
        if Acceleration.of(settings, pipe.model.config.llm).needs_generation_scores:
            given = here(flashu.scores)
            scores = WandaScores.load(given) if given else _shared_scores(pipe, run, flashu, first_prompt)
            identity += f", scores {_digest(scores)[:16]}"
        apply_flashu_patch(pipe.model, settings, scores=scores, tokenizer=pipe.tokenizer)
    return WorkerModel(pipe, own, dtype, identity)


def _keep_compiled_code(folder: Path) -> None:
    """Have what this process compiles kept in a folder, unless it cannot be written or another one is set."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            os.environ.setdefault(COMPILED_CODE, str(folder))


def compiling_facts(pipe: TextToImagePipeline) -> dict[str, str | None]:
    """For what, beside a run's settings, compiled code is good, and where it is kept."""
    device = pipe.model.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"torch": torch.__version__, "gpu": gpu, "folder": os.environ.get(COMPILED_CODE)}


def _shared_scores(
    pipe: TextToImagePipeline, run: Storage, flashu: FlashUSection, first_prompt: Callable[[], str] | None
) -> WandaScores:
    """The scores that all workers of the run prune by: measured by the first, in the run's folder from then on."""
    key = hashlib.sha256(f"{os.getuid()} {run.url}".encode()).hexdigest()[:20]
    lock = FileLock(Path(tempfile.gettempdir()) / f"flashu-scores-{key}.lock")  # one worker of a node measures
    with tempfile.TemporaryDirectory() as scratch, lock:
        file = Path(scratch) / SCORES
        if not run.exists(SCORES):
            method = CALIBRATIONS[flashu.calibration or TRAJECTORIES]
            prompts = [first_prompt()] if flashu.calibration == RELEASE else PROMPTS
            calibrate(pipe.model, prompts, tokenizer=pipe.tokenizer, method=method).save(file)
            run.put_new(SCORES, file.read_bytes())  # another node may have been faster: its scores count
        file.write_bytes(run.get(SCORES))
        return WandaScores.load(file)


def _digest(scores: WandaScores) -> str:
    digest = hashlib.sha256()
    for tensor in (*scores.ffn, *scores.attention):
        digest.update(tensor.to(torch.float32).numpy().tobytes())
    return digest.hexdigest()
