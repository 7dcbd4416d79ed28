"""The filtered copy of a shard: payload first, then metadata, which is the commit, as the run itself writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.disk_errors import disk_error
from cluster.storage import NotFound, Storage, StorageError
from jobs.dataset.formats import FORMATS, PayloadFormat
from jobs.dataset.keys import metadata_key, read_metadata
from jobs.dataset.records import ATTEMPT, EncodedImage, parquet_file
from jobs.filtering.choice import Choice, usable
from jobs.statistics.run import FOOTER_KEY, STAGES, RunStatistics

ABSENT, DAMAGED = "the run's files lack it", "its bytes are not those that its sha256 is of"


@dataclass(frozen=True)
class MissingImage:
    """An image that was chosen, and could not be had."""

    shard: int
    row: int  # of the metadata
    prompt_id: str
    why: str


@dataclass(frozen=True)
class Rewritten:
    """A shard that is committed."""

    statistics: RunStatistics
    missing: list[MissingImage]


class Rewriter:
    """Writes the chosen images of shards from one storage into another, in the run's own format. Safe in threads."""

    def __init__(self, source: Storage, destination: Storage, choice: Choice, payload: str):
        self.source, self.destination, self.choice = source, destination, choice
        self.format = FORMATS[payload]

    def rewrite(self, shard: int) -> Rewritten:
        """The same bytes each time. Raises `StorageError`, and `InputError` where the source has changed."""
        metadata = read_metadata(self.source, shard)
        kept = self.choice.kept(shard, metadata)
        with usable(self.source, shard):  # the choice has read some of its columns
            table = pq.read_table(pa.BufferReader(metadata))
        rows = {row: record for row, record in enumerate(table.to_pylist()) if kept[row]}
        names = {row: record["file_name"] for row, record in rows.items()}
        stored = read_images(self.format, self.source, shard, names) if names else {}
        images, missing = [], []
        for row, record in rows.items():
            why = _why_missing(stored.get(row), record["sha256"])
            if why:
                missing.append(MissingImage(shard, row, record["prompt_id"], why))
            else:
                images.append(EncodedImage(stored[row], record))
        schema = table.schema.remove_metadata()
        of_files = pa.schema([column for column in schema if column.name not in ATTEMPT.names])
        self.format.write(self.destination, shard, images, of_files)
        work = _work(shard, pq.read_metadata(pa.BufferReader(metadata)).metadata[FOOTER_KEY])
        records = [image.record for image in images]
        statistics = RunStatistics.of_shard(records, [], work)
        footer = {FOOTER_KEY: statistics.to_json()}
        self.destination.put(metadata_key(shard), parquet_file(records, schema, footer))
        return Rewritten(statistics, missing)


def read_images(payload: PayloadFormat, storage: Storage, shard: int, names: Mapping[int, str]) -> dict[int, bytes]:
    """Those of these images that can be read, by row; `names` are their file names.

    Raises `StorageError`, also for an error of the disk: what cannot be read now may be there.
    """
    found: dict[int, bytes] = {}
    try:
        for row, data in payload.read(storage, shard, names):
            found[row] = data
    except NotFound:
        pass
    except (StorageError, MemoryError):
        raise
    except Exception as error:  # whatever a file that is damaged can raise in three decoders
        if getattr(error, "errno", None):
            raise disk_error("read", Path(storage.url, f"data (shard {shard})"), error) from None
    return found


def _why_missing(data: bytes | None, sha256: str | None) -> str:
    if data is None:
        return ABSENT
    return "" if sha256 is None or hashlib.sha256(data).hexdigest() == sha256 else DAMAGED


def _work(shard: int, footer: bytes) -> dict[str, Any]:
    """Who made the shard, and how long each part took: that of all its images, whichever of them are kept."""
    made = RunStatistics.from_json(footer)
    ((name, worker),) = made.workers.items()
    return {
        "shard": shard,
        "worker": name,
        "node": worker.node,
        "attempt": 1 + made.retried_shards,
        "gpus": worker.gpu_seconds / worker.busy_s if worker.busy_s else 0,
        "started_at": worker.first,
        "finished_at": worker.last,
        **{key: worker.seconds[stage] for stage, key in STAGES.items()},
    }
