"""How many images to make at once: asked for, or as many as bring something and fit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.node_cache import cache_folder, lock_if_possible, name_of
from flashu.config import BATCH_SIZE
from flashu.errors import OutOfMemoryError
from jobs.settings.config import AUTO

LARGEST = 64
HEADROOM = 0.90  # of the device's memory
MORE = 1.2  # times the memory of then: worth measuring again what memory ended
GAIN = 1.05  # in images per second, by which a batch of double size must be faster to be worth its memory
NEAR = 0.97  # of the best images per second: the smallest batch with that is taken
LONGEST_S = 60.0  # of a batch: a longer one gains nothing, and a worker shows no sign of life for up to two of them


@dataclass(frozen=True)
class Trial:
    """What one batch took, with another one beside it."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Knee:
    """What was measured on a kind of GPU, and is good for others of that kind."""

    batch_size: int
    peak_of_one: int
    peak_of_two: int
    available: float  # bytes, when it was measured
    memory_ended_it: bool  # so that with more of it, as when no other process has a part, it may lie higher

    def within(self, available: float) -> int:
        """The batch size, or what fits into so many bytes."""
        return min(self.batch_size, fitting(self.peak_of_one, self.peak_of_two, available))

    def holds_for(self, available: float) -> bool:
        """Whether it was not cut short by memory of which there is clearly more now."""
        return not self.memory_ended_it or available < MORE * self.available


def choose_batch_size(
    value: Any,
    device: torch.device,
    generate: Callable[[int], object],
    setting: Mapping[str, Any],
    cache_dir: str | None = None,
) -> int:
    """The batch size to begin with. `generate(images)` makes two batches of so many, one beside the other, as the run
    will.

    On CUDA, "auto" is where larger batches bring no more images per second, or memory ends (`find_knee`). It is looked
    for once a node, and kept in the cache under the GPU's type and `setting`: all else that it depends on; and once
    more when memory ended it, and there is clearly more now. Elsewhere it is BATCH_SIZE. Raises `OutOfMemoryError`
    when not even one image fits.
    """
    if value != AUTO:
        return value
    if device.type != "cuda":
        return BATCH_SIZE
    free, _ = torch.cuda.mem_get_info(device)
    available = HEADROOM * (free + torch.cuda.memory_allocated(device))

    def attempt(images: int) -> Trial:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        generate(images)
        torch.cuda.synchronize(device)
        return Trial((time.perf_counter() - start) / 2, torch.cuda.max_memory_allocated(device))

    gpu = torch.cuda.get_device_properties(device)
    kind = {"gpu": gpu.name, "memory_bytes": gpu.total_memory, "torch": torch.__version__, **setting}
    folder = cache_folder(cache_dir) / "batch-sizes"
    return remembered(folder, kind, available, lambda: find_knee(attempt, available)).within(available)


def remembered(folder: Path, kind: Mapping[str, Any], available: float, measure: Callable[[], Knee]) -> Knee:
    """What the node's cache holds for this kind, if it holds for so many bytes; else what is measured now, by the
    first of its workers that asks."""
    file = folder / f"{name_of(kind)}.json"
    with lock_if_possible(file):
        with suppress(OSError, ValueError, TypeError, KeyError):  # none there, or not one of ours
            knee = Knee(**json.loads(file.read_text(encoding="utf-8"))["knee"])
            if knee.holds_for(available):
                return knee
        knee = measure()
        with suppress(OSError):
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(
                json.dumps({"kind": kind, "knee": asdict(knee)}, indent=2, default=str) + "\n", encoding="utf-8"
            )
            partial.replace(file)
        return knee


def find_knee(attempt: Callable[[int], Trial], available: float) -> Knee:
    """The smallest batch that makes nearly as many images per second as any that fits into `available` bytes.

    Batches are doubled while that pays. `attempt(images)` tries one of so many. Raises `OutOfMemoryError` when not even
    one image fits.
    """
    attempt(1)  # the first of all takes longer, and so does the first of several images
    one = attempt(1)
    rates = {1: 1 / one.seconds}
    try:
        attempt(2)
        two = attempt(2)
    except OutOfMemoryError:
        return Knee(1, one.peak_bytes, 2 * one.peak_bytes, available, memory_ended_it=True)
    rates[2] = 2 / two.seconds
    limit = fitting(one.peak_bytes, two.peak_bytes, available)
    size, seconds, short = 2, two.seconds, False
    while size < LARGEST and rates[size] > GAIN * rates[size // 2] and 2 * seconds <= LONGEST_S:
        larger = min(2 * size, limit)
        short = larger < 2 * size  # of memory
        if larger > size:
            try:
                seconds = attempt(larger).seconds
            except OutOfMemoryError:
                short = True
            else:
                rates[larger] = larger / seconds
        if short:
            break
        size = larger
    best = max(rates.values())
    knee = min(images for images, rate in rates.items() if rate >= NEAR * best)
    return Knee(min(knee, limit), one.peak_bytes, two.peak_bytes, available, memory_ended_it=short or knee > limit)


def fitting(peak_of_one: float, peak_of_two: float, available: float) -> int:
    """How many images fit into `available` bytes, if each further one takes as much as the second did."""
    each = max(peak_of_two - peak_of_one, 1)
    return max(1, min(LARGEST, 1 + int((available - peak_of_one) / each)))
