"""Time booked to parts: ranges within ranges, and work that really runs."""

import time

import pytest
import torch
from time_split import OTHER, covered, innermost, labelled, split_time, time_of_kernels


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
