"""Duplicates among ids: the same answer in memory and from disk, and bounded memory."""

import random
import tracemalloc

import pytest

from manifests.unique import DuplicateFinder


def brute_force(ids):
    first, pairs = {}, []
    for row, name in enumerate(ids):
        if name in first:
            pairs.append((first[name], row))
        first.setdefault(name, row)
    return pairs


@pytest.mark.parametrize("in_memory", [10, 1000, 1_000_000])
@pytest.mark.parametrize("kinds", [1, 50, 5000, 10**9])
def test_every_repeat_is_found(in_memory, kinds):
    draw = random.Random(kinds)
    ids = [f"id {draw.randrange(kinds)}" for _ in range(2003)]
    pairs = brute_force(ids)
    with DuplicateFinder(in_memory=in_memory) as finder:
        for start in range(0, len(ids), 97):
            finder.add(ids[start : start + 97])
        found = finder.duplicates()
    repeats = {row for _, row in pairs}
    assert found.count == len(pairs)
    assert found.examples == pairs[:5]
    assert found.repeats(0, len(ids)).tolist() == [row in repeats for row in range(len(ids))]
    assert found.repeats(1001, 1020).tolist() == [row in repeats for row in range(1001, 1020)]


def test_no_ids_have_no_duplicates():
    with DuplicateFinder() as finder:
        assert finder.duplicates().count == 0


def test_memory_does_not_grow_with_the_rows():
    def peak(rows):
        tracemalloc.start()
        with DuplicateFinder(in_memory=5000) as finder:
            for start in range(0, rows, 1000):
                finder.add(str(row) for row in range(start, start + 1000))
            assert finder.duplicates().count == 0
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    # What a thread of another test allocates meanwhile counts too, and only adds.
    assert min(peak(60_000) for _ in range(3)) < 1.2 * min(peak(10_000) for _ in range(3))
