"""A run's statistics, put together from those that its shards carry. Reads Parquet footers only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
    for footer in read_each(lambda shard: _footer(storage, shard), shards):
        if footer is not None:
            total.merge(RunStatistics.from_json(footer))
    return total


def committed_columns(storage: Storage) -> dict[str, str]:
    """The columns of the run's metadata and their types, as the first readable shard has them."""
    for schema in _schemas(storage):
        return {column.name: str(column.type) for column in schema}
    return {}


def _schemas(storage: Storage) -> Iterator[pa.Schema]:
    for shard in shards_with(storage, METADATA):
        footer = _metadata(storage, shard)
        if footer is not None:
            yield footer.schema.to_arrow_schema()


def _footer(storage: Storage, shard: int) -> bytes | None:
    metadata = _metadata(storage, shard)
    return (metadata.metadata or {}).get(FOOTER_KEY) if metadata else None


def _metadata(storage: Storage, shard: int) -> pq.FileMetaData | None:
    """None for a shard that vanished since it was listed, or whose file is cut short: it does not count."""
    try:
        with storage.open(metadata_key(shard)) as file:
            return pq.read_metadata(file)
    except (NotFound, pa.ArrowInvalid):
        return None
