"""Where the time of some work goes: the profiler's kernels, booked to the part of the network that launched them.

Parts are calls of methods; of nested ones the innermost counts. On a GPU a part's time is that of its kernels, so that
it does not depend on how much the profiler slows the host down; on a CPU, which has no kernels, that of its calls.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

OTHER = "sampler, other"
PREFIX = "part: "

Call = tuple[Any, str, str]  # an object, class or module, the name of its method, the part that its calls are of
Range = tuple[int, int, str]  # begin and end in nanoseconds, and the part


@dataclass
class Split:
    parts: dict[str, float]  # seconds
    busy_s: float | None  # in which the GPU ran anything; None without a GPU
    kernels: int
    profiled_s: float  # the work's own time, slowed down by the profiler


def split_time(work: Callable[[], object], calls: Iterable[Call], device: torch.device) -> Split:
    """Run `work` once under the profiler."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with labelled(calls), profile(activities=activities) as profiler:
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        profiled_s = time.perf_counter() - start
    # The profiler's own tables are built event by event in Python, which for a whole image takes minutes.
    events = profiler.profiler.kineto_results.events()
    ranges, operations, launches, kernels = [], {}, {}, []
    for event in events:
        name, start = event.name(), event.start_ns()
        if event.device_type() != DeviceType.CPU:
            if not event.is_user_annotation() and not name.startswith(PREFIX):
                kernels.append((start, event.end_ns(), event.linked_correlation_id(), event.correlation_id()))
        elif name.startswith(PREFIX):
            ranges.append((start, event.end_ns(), name.removeprefix(PREFIX)))
        elif name.startswith("cu"):  # a call of CUDA's: cudaLaunchKernel, cuLaunchKernelEx, cudaMemcpyAsync, …
            launches[event.correlation_id()] = start
        else:
            operations[event.correlation_id()] = start
    if not on_gpu:
        return Split(time_of_calls(ranges, profiled_s), None, 0, profiled_s)
    launched = []
    for begin, end, operation, launch in kernels:
        # A replayed graph's kernels belong to no operation, but to the call that launched it.
        at = operations.get(operation) if operation else None
        launched.append((begin, end, launches.get(launch, 0) if at is None else at))
    if not launched:
        raise RuntimeError("the profiler saw no kernels: it may not look at this GPU")
    busy_s = covered([(begin, end) for begin, end, _ in launched]) / 1e9
    return Split(time_of_kernels(launched, ranges), busy_s, len(launched), profiled_s)


def _range(part: str) -> record_function:
    """What the profiler sees by the part's name."""
    return record_function(PREFIX + part)


@contextmanager
def labelled(calls: Iterable[Call], label: Callable[[str], AbstractContextManager[Any]] = _range) -> Iterator[None]:
    """Have calls of the methods run within what `label` makes of their part: ranges of the profiler's by default."""
    calls = list(calls)
    own = [vars(owner).get(method) for owner, method, _ in calls]  # None where it is the class's
    for owner, method, part in calls:
        setattr(owner, method, _within(label, part, getattr(owner, method)))
    try:
        yield
    finally:
        for (owner, method, _), original in zip(calls, own, strict=True):
            if original is None:
                delattr(owner, method)
            else:
                setattr(owner, method, original)


def _within(
    label: Callable[[str], AbstractContextManager[Any]], part: str, original: Callable[..., Any]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with label(part):
            return original(*args, **kwargs)

    return call


def innermost(ranges: Iterable[Range]) -> tuple[list[int], list[str]]:
    """Nested ranges as consecutive ones: where each begins, ascending, and the part that holds from there on."""
    starts: list[int] = []
    parts: list[str] = []
    around: list[Range] = []

    def close_until(moment: float) -> None:
        while around and around[-1][1] <= moment:
            _, end, _ = around.pop()
            starts.append(end)
            parts.append(around[-1][2] if around else OTHER)

    for one in sorted(ranges, key=lambda one: (one[0], -one[1])):
        close_until(one[0])
        starts.append(one[0])
        parts.append(one[2])
        around.append(one)
    close_until(float("inf"))
    return starts, parts


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """The length that intervals cover together, however they overlap."""
    total, reached = 0, 0
    for begin, end in sorted(intervals):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def time_of_kernels(kernels: Iterable[tuple[int, int, int]], ranges: Iterable[Range]) -> dict[str, float]:
    """Seconds that kernels (begin, end, launch) ran, by the part that was under way when they were launched."""
    starts, parts = innermost(ranges)
    times: dict[str, float] = {}
    for begin, end, launched in kernels:
        place = bisect_right(starts, launched) - 1
        part = parts[place] if place >= 0 else OTHER
        times[part] = times.get(part, 0.0) + (end - begin) / 1e9
    return times


def time_of_calls(ranges: Iterable[Range], seconds: float) -> dict[str, float]:
    """Seconds of each part on the host; what of `seconds` is in none is other."""
    starts, parts = innermost(ranges)
    times: dict[str, float] = {}
    for start, end, part in zip(starts, starts[1:], parts, strict=False):
        if part != OTHER:
            times[part] = times.get(part, 0.0) + (end - start) / 1e9
    return {**times, OTHER: seconds - sum(times.values())}
