"""A run's statistics, put together from those that its shards carry. Reads Parquet footers only.

Shards are begun in order, so a set of them is few ranges, however many shards there are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from operator import itemgetter

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import NotFound, Storage
from jobs.dataset.keys import METADATA, metadata_key, shards_with
from jobs.dataset.reading import read_each
from jobs.statistics.run import FOOTER_KEY, RunStatistics


def collect_statistics(storage: Storage, shards: Iterable[int] | None = None) -> RunStatistics:
    """The statistics of the shards that are committed now, or of `shards`, those of them that are."""
    total = RunStatistics()
    shards = shards_with(storage, METADATA) if shards is None else shards
    for footer in read_each(lambda shard: _metadata(storage, shard), shards):
        if footer and (statistics := (footer.metadata or {}).get(FOOTER_KEY)):
            total.merge(RunStatistics.from_json(statistics))
    return total


def committed_columns(storage: Storage) -> dict[str, str]:
    """The columns of the run's metadata and their types, as the first readable shard has them."""
    for shard in shards_with(storage, METADATA):
        if footer := _metadata(storage, shard):
            return {column.name: str(column.type) for column in footer.schema.to_arrow_schema()}
    return {}


def _metadata(storage: Storage, shard: int) -> pq.FileMetaData | None:
    """None for a shard that vanished since it was listed, or whose file is cut short: it does not count."""
    try:
        with storage.open(metadata_key(shard)) as file:
            return pq.read_metadata(file)
    except (NotFound, pa.ArrowInvalid):
        return None


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
        index = bisect_right(self.ranges, shard, key=itemgetter(0))
        self.ranges.insert(index, [shard, shard])
        for at in (index, index - 1):  # the neighbour above, then that below
            if 0 <= at < len(self.ranges) - 1 and self.ranges[at][1] + 1 == self.ranges[at + 1][0]:
                self.ranges[at : at + 2] = [[self.ranges[at][0], self.ranges[at + 1][1]]]

    def __contains__(self, shard: int) -> bool:
        index = bisect_right(self.ranges, shard, key=itemgetter(0)) - 1
        return index >= 0 and shard <= self.ranges[index][1]

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self.ranges)
