"""How many images to make at once: asked for, or as many as fit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from flashu import arguments
from flashu.config import BATCH_SIZE
from flashu.errors import InputError, OutOfMemoryError
from jobs.config import AUTO

LARGEST = 64
HEADROOM = 0.90  # of the device's memory
LONGEST_S = 60.0  # of a batch: a longer one gains nothing, and a worker shows no sign of life meanwhile
LONGEST_PROMPT = "a very long prompt " * 200  # cut to what the model reads


def check_batch_size(value: Any) -> None:
    """Raises `InputError` unless it is a number or "auto"."""
    if value != AUTO:
        try:
            arguments.whole("sampling.batch_size", value, least=1)
        except InputError as error:
            raise InputError(f"{error}, or {AUTO}") from None


def choose_batch_size(value: Any, device: torch.device, generate: Callable[[list[str]], object]) -> int:
    """The batch size to begin with. `generate(prompts)` makes one batch, as the run will.

    On CUDA, "auto" makes a batch of one and a batch of two, of the longest prompts, and takes the memory of a further
    image from the difference. Elsewhere memory is not what limits, and it is BATCH_SIZE.
    Raises `OutOfMemoryError` when not even one image fits.
    """
    if value != AUTO:
        return value
    if device.type != "cuda":
        return BATCH_SIZE

    def peak(images: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        generate([LONGEST_PROMPT] * images)
        return torch.cuda.max_memory_allocated(device)

    free, _ = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_allocated(device)
    peak_of_one = peak(1)
    start = time.perf_counter()
    try:
        peak_of_two = peak(2)
    except OutOfMemoryError:
        return 1
    seconds = (time.perf_counter() - start) / 2
    return min(fitting(peak_of_one, peak_of_two, HEADROOM * available), max(1, int(LONGEST_S / seconds)))


def fitting(peak_of_one: float, peak_of_two: float, available: float) -> int:
    """How many images fit into `available` bytes, if each further one takes as much as the second did."""
    each = max(peak_of_two - peak_of_one, 1)
    return max(1, min(LARGEST, 1 + int((available - peak_of_one) / each)))
