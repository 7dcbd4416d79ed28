"""The most that a device does of what networks are made of: large matrix products, and copies of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from generate import Stopwatch

from flashu.models.float8 import Float8Linear, Float8Matrix

SIZES = {"cuda": (8192, 2**31), "cpu": (1024, 2**27)}  # side of the matrices; bytes that are copied
REPEATS = 20
WARM_UP_S = 0.2  # until a GPU's clocks are up
SUSTAINED_S = {"cuda": 5.0, "cpu": 0.5}  # until a GPU that is at its limit of power has lowered its clocks


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a square matrix product in `dtype`, and GB/s of a copy, bytes read and bytes written both counted.

    On random numbers: zeros are quicker. Medians of a burst, and the product's mean over seconds without a pause.
    """
    side, size = SIZES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)

    def multiply() -> None:
        torch.mm(left, right, out=product)

    burst_s, copy_s = _seconds(multiply, device), _seconds(lambda: target.copy_(source), device)
    sustained_s = _sustained_seconds(multiply, burst_s, device)
    return {
        "matrix_side": side,
        "matrix_tflop_per_s": 2 * side**3 / burst_s / 1e12,
        "sustained_matrix_tflop_per_s": 2 * side**3 / sustained_s / 1e12,
        "copy_gb_per_s": 2 * size / copy_s / 1e9,
    }


@torch.no_grad()
def measure_float8_ceiling(device: torch.device) -> dict[str, float]:
    """TFLOP/s of the same product in float8, with a scale for each row and column, as FFNs in float8 make it.

    Without the scaling of what is multiplied, which is made beforehand. On CUDA only.
    """
    side, _ = SIZES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    rows, linear = Float8Matrix.of(left), Float8Linear(right)
    return {
        "float8_matrix_tflop_per_s": 2 * side**3 / _seconds(lambda: linear.product(rows, left.dtype), device) / 1e12
    }


def _sustained_seconds(work: Callable[[], object], once_s: float, device: torch.device) -> float:
    """The mean time of `work`, which takes about `once_s`, over runs that follow each other for `SUSTAINED_S`."""
    runs = max(1, round(SUSTAINED_S[device.type] / once_s))

    def repeat() -> None:
        for _ in range(runs):
            work()

    return Stopwatch(device)(repeat)[1] / runs


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median time of `work`, after runs to warm up."""
    clock = Stopwatch(device)
    warm_at = time.perf_counter() + WARM_UP_S
    clock(work)
    while time.perf_counter() < warm_at:
        clock(work)
    if device.type != "cuda":
        return statistics.median(clock(work)[1] for _ in range(REPEATS))
    pairs = []
    with torch.cuda.device(device):  # events are of the current one
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            pairs.append((begin, end))
    clock.wait()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3
