"""What a worker whose blocks are compiled does before its first lease: a batch of every kind that its run may have, so
that no lease waits for the compiler; and where what is compiled is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.node_cache import lock_if_possible, name_of
from flashu.acceleration.guidance_schedule import is_guided
from flashu.config import GUIDANCE_SCALE
from flashu.errors import OutOfMemoryError
from flashu.pipeline import TextToImagePipeline

IMAGES = 4  # of a batch: sizes of more than one are compiled as one
LONGEST = "a very long prompt " * 200  # cut to what the model reads
COMPILED_CODE = "TORCHINDUCTOR_CACHE_DIR"  # where PyTorch keeps it
LENGTHS = (LONGEST, "a shorter prompt", "a prompt of middling length, but not of many words")

Generate = Callable[[list[str], list[str], list[int], float], object]
"""Makes one batch of prompts, negative prompts, seeds and a guidance scale."""


@dataclass(frozen=True)
class BatchKinds:
    """In what a run's batches differ, beside their prompts."""

    guidance_scale: float
    negative_prompt: str = ""
    own_negatives: bool = False  # whether prompts bring negative prompts of their own
    own_guidance: bool = False  # likewise


def warm_up(generate: Generate, kinds: BatchKinds, images: int = IMAGES) -> None:
    """Make one batch of every kind, of `images`, or of fewer where memory ends.

    Raises `OutOfMemoryError` when not even one image fits.
    """
    while True:
        try:
            for batch in batches(kinds, images):
                generate(*batch)
            return
        except OutOfMemoryError:
            if images == 1:
                raise
        images //= 2


def batches(kinds: BatchKinds, images: int) -> Iterator[tuple[list[str], list[str], list[int], float]]:
    """One of every kind: of prompts of several lengths; of one, as of one prompt's images; and of one image, as the
    last of a shard may be. Layers are skipped image by image, so seeds differ."""
    several = ([*LENGTHS] * images)[:images]
    scales = [kinds.guidance_scale]
    if kinds.own_guidance:
        scales.append(1.0 if is_guided(kinds.guidance_scale) else GUIDANCE_SCALE)
    for scale in scales:
        for prompts in (several, [LONGEST] * images, [LONGEST]) if images > 1 else ([LONGEST],):
            negatives = [[kinds.negative_prompt] * len(prompts)]
            if kinds.own_negatives and is_guided(scale) and len(prompts) > 1:
                negatives.append([*reversed(several)])
            for negative in negatives:
                yield prompts, negative, list(range(len(prompts))), scale


def first_on_node(folder: Path, kind: Mapping[str, Any], work: Callable[[], None]) -> None:
    """Do some work that leaves something on this node's disk: the first of its processes to ask for this `kind` while
    the others wait, these then side by side."""
    done = folder / name_of(kind)
    with lock_if_possible(done):
        if not done.exists():
            try:
                work()
            finally:  # where it fails, the others are to find that out side by side too
                with suppress(OSError):
                    done.touch()
            return
    work()


def keep_compiled_code(folder: Path) -> None:
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
