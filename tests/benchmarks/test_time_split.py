"""Time booked to parts: ranges within ranges, and work that really runs."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from time_split import OTHER, PREFIX, covered, innermost, labelled, split_time, time_of_kernels
from torch.autograd import DeviceType


def test_of_nested_ranges_the_innermost_holds():
    starts, parts = innermost(
        [(0, 100, "whole"), (10, 40, "part"), (20, 30, "inner"), (60, 70, "part"), (120, 130, "on")]
    )
    assert list(zip(starts, parts, strict=True)) == [
        (0, "whole"), (10, "part"), (20, "inner"), (30, "part"), (40, "whole"), (60, "part"), (70, "whole"),
        (100, OTHER), (120, "on"), (130, OTHER),
    ]  # fmt: skip


def test_ranges_that_touch_do_not_nest():
    starts, parts = innermost([(0, 10, "one"), (10, 20, "two")])
    assert [part for start, part in zip(starts, parts, strict=True) if start == 10][-1] == "two"


def test_covered_counts_overlaps_once():
    assert covered([(0, 10), (5, 15), (6, 7), (20, 30)]) == 25
    assert covered([]) == 0


def test_kernels_belong_to_what_launched_them_whenever_they_run():
    ranges = [(100, 200, "LLM"), (120, 140, "image path"), (300, 400, "head")]
    kernels = [
        (150, 1_000_000_150, 130),
        (1_000_000_150, 3_000_000_150, 150),
        (4_000_000_000, 4_500_000_000, 350),
        (5_000_000_000, 5_250_000_000, 50),
        (6_000_000_000, 6_250_000_000, 500),
    ]
    assert time_of_kernels(kernels, ranges) == {"image path": 1.0, "LLM": 2.0, "head": 0.5, OTHER: 0.5}


def event(name, start, end, correlation=0, linked=0, on_gpu=False, annotation=False):
    """As the profiler's results have them."""
    values = {
        "name": name,
        "start_ns": start,
        "end_ns": end,
        "correlation_id": correlation,
        "linked_correlation_id": linked,
        "device_type": DeviceType.CUDA if on_gpu else DeviceType.CPU,
        "is_user_annotation": annotation,
    }
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_of_a_profile_on_a_gpu_only_kernels_count(monkeypatch):
    second = 10**9
    events = [
        event(f"{PREFIX}LLM", 100, 200),
        event(f"{PREFIX}VAE", 300, 400),
        event("aten::mm", 120, 140, correlation=5),
        event("cudaLaunchKernel", 125, 126, correlation=70),
        event("cudaGraphLaunch", 310, 311, correlation=71),
        event("gemm", second, 2 * second, correlation=70, linked=5, on_gpu=True),
        event("replayed", 2 * second, 5 * second, correlation=71, on_gpu=True),
        event(f"{PREFIX}LLM", second, 9 * second, on_gpu=True, annotation=True),
    ]
    results = SimpleNamespace(events=lambda: events)
    profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    monkeypatch.setattr("time_split.profile", lambda activities: nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    split = split_time(lambda: None, [], torch.device("cuda:0"))
    assert split.parts == {"LLM": 1.0, "VAE": 3.0}
    assert (split.busy_s, split.kernels) == (4.0, 2)
    events.clear()
    with pytest.raises(RuntimeError, match="saw no kernels"):
        split_time(lambda: None, [], torch.device("cuda:0"))


class Network:
    def outer(self):
        time.sleep(0.05)
        self.inner()

    def inner(self):
        time.sleep(0.1)
        torch.ones(8).sum()


def test_time_of_calls_on_a_cpu():
    network = Network()

    def work():
        network.outer()
        time.sleep(0.15)

    split = split_time(work, [(network, "outer", "outside"), (network, "inner", "inside")], torch.device("cpu"))
    assert split.parts["outside"] == pytest.approx(0.05, abs=0.03)
    assert split.parts["inside"] == pytest.approx(0.1, abs=0.03)
    assert split.parts[OTHER] == pytest.approx(0.15, abs=0.05)
    assert sum(split.parts.values()) == pytest.approx(split.profiled_s)
    assert split.busy_s is None


def test_labels_leave_no_trace():
    network = Network()
    network.inner = own = lambda: None
    with labelled([(network, "outer", "a"), (network, "inner", "b")]):
        assert set(vars(network)) == {"outer", "inner"}
    assert vars(network) == {"inner": own}
