"""A set of shards as ranges. Shards are begun in order, so there are few ranges, however many shards there are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence


class ShardSet:
    """Numbers from 0; `ranges` are [first, last] pairs in order, with gaps between them."""

    def __init__(self, shards: Iterable[int] = ()):
        self.ranges: list[list[int]] = []
        for shard in sorted(shards):
            self.add(shard)

    @classmethod
    def of_ranges(cls, ranges: Iterable[Sequence[int]]) -> ShardSet:
        """From what `ranges` was."""
        made = cls()
        made.ranges = [list(each) for each in ranges]
        return made

    def add(self, shard: int) -> None:
        if shard in self:
            return
        index = bisect_right(self.ranges, shard, key=_first)
        self.ranges.insert(index, [shard, shard])
        for at in (index, index - 1):  # the neighbour above, then that below
            if 0 <= at < len(self.ranges) - 1 and self.ranges[at][1] + 1 == self.ranges[at + 1][0]:
                self.ranges[at : at + 2] = [[self.ranges[at][0], self.ranges[at + 1][1]]]

    def __contains__(self, shard: int) -> bool:
        index = bisect_right(self.ranges, shard, key=_first) - 1
        return index >= 0 and shard <= self.ranges[index][1]

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self.ranges)


def _first(range_: Sequence[int]) -> int:
    return range_[0]
