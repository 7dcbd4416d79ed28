"""The scores that FlashU prunes by on all workers of a run: given, or measured once, into the run's folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from cluster.storage import Storage
from flashu.acceleration.wanda import WandaScores
from flashu.calibration import calibrate
from flashu.pipeline import TextToImagePipeline
from flashu.probe import PROMPTS
from jobs.dataset.keys import SCORES
from jobs.settings.acceleration import CALIBRATIONS, RELEASE, TRAJECTORIES


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
