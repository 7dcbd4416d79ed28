"""The most that a device does of what networks are made of: large matrix products, and copies of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

SIZES = {"cuda": (8192, 2**31), "cpu": (1024, 2**27)}  # side of the matrices; bytes that are copied
REPEATS = 20


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a square matrix product in `dtype`, and GB/s of a copy, bytes read and bytes written both counted.

    On random numbers: zeros are quicker. Medians.
    """
    side, size = SIZES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return {
        "matrix_side": side,
        "matrix_tflop_per_s": 2 * side**3 / _seconds(lambda: torch.mm(left, right, out=product), device) / 1e12,
        "copy_gb_per_s": 2 * size / _seconds(lambda: target.copy_(source), device) / 1e9,
    }


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median time of `work`, after three runs to warm up."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    pairs = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3
