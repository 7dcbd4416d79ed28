"""Which of a run's images a filter keeps: decided over the metadata of all shards, before any image is read.

What has to be remembered of them is some 250 bytes a shard; with `--dedup`, a byte for each image that was compared
and what the finder of duplicates keeps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import acero

from cluster.storage import Storage
from flashu.errors import InputError
from jobs.dataset.keys import metadata_key, read_metadata
from jobs.dataset.reading import THREADS, in_order
from jobs.filtering.near_duplicates import NearDuplicateFinder
from jobs.filtering.where import Condition, parse_condition
from jobs.statistics.run import FOOTER_KEY, RunStatistics
from manifests.unique import DuplicateFinder

VQA_SCORE, PHASH, BROKEN, SHA256 = "quality_vqa_score", "quality_phash", "quality_broken", "sha256"
KEPT, WHERE, NULL, MIN_SCORE, NEAR_DUPLICATE = range(5)  # what becomes of an image
REASONS = {WHERE: "where", NULL: "null", MIN_SCORE: "min_score", NEAR_DUPLICATE: "near_duplicate"}
AT_ONCE = 2**20  # images that are counted at once


@dataclass(frozen=True)
class Filter:
    """What is asked for. Raises `InputError` where that is nothing, or cannot be."""

    where: str | None = None
    min_score: float | None = None
    dedup: bool = False

    def __post_init__(self) -> None:
        if self.where is None and self.min_score is None and not self.dedup:
            raise InputError("nothing says what to keep; give --where EXPR, --min-score X, --dedup, or several of them")
        if self.min_score is not None and not 0 <= self.min_score <= 1:  # which nan is not either
            raise InputError(f"--min-score is {self.min_score}; a score is a probability, from 0 to 1")


class Rules:
    """A filter for a run whose metadata has this schema. Raises `InputError` where its columns do not allow it."""

    def __init__(self, asked: Filter, schema: pa.Schema):
        self.conditions: list[tuple[int, Condition]] = []
        if asked.where is not None:
            self.conditions.append((WHERE, parse_condition(asked.where, schema)))
        if asked.min_score is not None:
            if VQA_SCORE not in schema.names:
                raise InputError(
                    "--min-score goes by the column quality.vqa_score, which this run has not: "
                    "images get it as they are made, in a run with quality.vqa=true"
                )
            condition = f"quality.vqa_score >= {asked.min_score!r}"
            self.conditions.append((MIN_SCORE, parse_condition(condition, schema, "--min-score")))
        self.duplicates_by = _duplicates_by(schema) if asked.dedup else None
        columns = {"image_index"}.union(*(condition.columns for _, condition in self.conditions))
        if self.duplicates_by:
            columns |= {self.duplicates_by, BROKEN} & set(schema.names)
        self.columns = {name: schema.field(name).type for name in sorted(columns)}

    def read(self, metadata: bytes) -> pa.Table:
        """The columns that decide. Raises `InputError` for other metadata than a run's, and see `usable`."""
        file = pq.ParquetFile(pa.BufferReader(metadata))
        footer = (file.metadata.metadata or {}).get(FOOTER_KEY)
        if footer is None:
            raise InputError("it has no statistics in its footer, as the metadata of a run has")
        RunStatistics.from_json(footer)  # which the copy's own are made from
        for name, type_ in self.columns.items():
            if name not in file.schema_arrow.names or file.schema_arrow.field(name).type != type_:
                raise InputError(f"it has no column {name} of type {type_}, as the first shard has")
        return file.read(list(self.columns))

    def judge(self, table: pa.Table) -> np.ndarray:
        """(rows,), uint8: what becomes of each image, duplicates aside."""
        fates = np.full(table.num_rows, KEPT, np.uint8)
        for reason, condition in self.conditions:
            holds = _evaluated(condition, table)
            left, is_null = fates == KEPT, holds.is_null().to_numpy()
            fates[left & is_null] = NULL
            fates[left & ~is_null & ~holds.fill_null(True).to_numpy()] = reason
        return fates

    def compared(self, table: pa.Table, fates: np.ndarray) -> np.ndarray:
        """(rows,), bool: which images `--dedup` looks at. By hash, broken (flat) ones all look alike: they stay."""
        compared = (fates == KEPT) & table[self.duplicates_by].is_valid().to_numpy()
        if self.duplicates_by == PHASH and BROKEN in self.columns:
            compared &= ~table[BROKEN].fill_null(False).to_numpy()
        return compared


@dataclass(frozen=True)
class Choice:
    """What becomes of each image of the shards that were there when the choice was made."""

    rules: Rules
    images: int
    dropped: dict[str, int]  # by reason
    digest: str  # SHA-256 over the metadata of all shards
    shards: dict[int, tuple[bytes, int]]  # digest of its metadata, and how many images were compared before its own
    repeats: Callable[[int, int], np.ndarray] | None  # for a range of the images compared: whether each is dropped

    @property
    def chosen(self) -> int:
        return self.images - sum(self.dropped.values())

    def kept(self, shard: int, metadata: bytes) -> np.ndarray:
        """(rows,), bool. Raises `InputError` for other metadata than the choice was made by."""
        digest, start = self.shards[shard]
        if _digest(metadata) != digest:
            raise InputError(f"the run has changed while it was filtered (shard {shard}); filter it into a new folder")
        table = self.rules.read(metadata)
        fates = self.rules.judge(table)
        if self.repeats:
            compared = np.flatnonzero(self.rules.compared(table, fates))
            fates[compared[self.repeats(start, start + len(compared))]] = NEAR_DUPLICATE
        return fates == KEPT


def choose(
    storage: Storage, shards: Sequence[int], rules: Rules, tell: Callable[[], Any], go_on: Callable[[], bool]
) -> Choice | None:
    """Decide over these shards, in order. `tell` is called for each; None if `go_on` said no before the end.

    Raises `InputError` for metadata that cannot be used, and `StorageError`.
    """

    def look(shard: int) -> tuple[bytes, np.ndarray, Sequence[Any]]:
        metadata = read_metadata(storage, shard)
        with usable(storage, shard):
            table = rules.read(metadata)
            fates = rules.judge(table)
            return _digest(metadata), fates, _values(rules, table, fates)

    counts, whole = np.zeros(len(REASONS) + 1, np.int64), hashlib.sha256()
    seen: dict[int, tuple[bytes, int]] = {}
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(THREADS, "metadata"))
        finder, compared = None, 0
        if rules.duplicates_by == PHASH:
            finder = NearDuplicateFinder()
        elif rules.duplicates_by:
            finder = stack.enter_context(DuplicateFinder())
        looked = in_order(pool, look, takewhile(lambda _: go_on(), shards), THREADS)
        for shard, (digest, fates, values) in zip(shards, looked, strict=False):
            counts += np.bincount(fates, minlength=len(counts))
            whole.update(f"{shard} ".encode() + digest)
            seen[shard] = digest, compared
            if finder:
                finder.add(values)
                compared += len(values)
            tell()
        if len(seen) < len(shards):
            return None
        repeats = None
        if compared:
            repeats = finder.repeats if rules.duplicates_by == PHASH else finder.duplicates().repeats
    for start in range(0, compared, AT_ONCE):
        counts[NEAR_DUPLICATE] += np.count_nonzero(repeats(start, min(start + AT_ONCE, compared)))
    images = int(counts.sum() - counts[NEAR_DUPLICATE])
    dropped = {name: int(counts[reason]) for reason, name in REASONS.items()}
    return Choice(rules, images, dropped, whole.hexdigest(), seen, repeats)


@contextmanager
def usable(storage: Storage, shard: int) -> Iterator[None]:
    """Names the metadata file in whatever one that is damaged, or of another version, raises: as an `InputError`."""
    try:
        yield
    except (InputError, pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        told = str(error).split("\n")[0]
        raise InputError(f"{storage.url}/{metadata_key(shard)} cannot be used: {told}") from None


def _duplicates_by(schema: pa.Schema) -> str:
    for column in (PHASH, SHA256):
        if column in schema.names:
            return column
    raise InputError("--dedup goes by the column quality.phash or sha256, and this run has neither")


def _evaluated(condition: Condition, table: pa.Table) -> pa.ChunkedArray:
    """True, false or null for each row."""
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    project = acero.Declaration("project", acero.ProjectNodeOptions([condition.expression], ["holds"]))
    return acero.Declaration.from_sequence([source, project]).to_table(use_threads=False)["holds"]


def _values(rules: Rules, table: pa.Table, fates: np.ndarray) -> Sequence[Any]:
    """By what the images that are compared are compared, in order."""
    if rules.duplicates_by is None:
        return ()
    texts = table[rules.duplicates_by].filter(pa.array(rules.compared(table, fates))).to_pylist()
    if rules.duplicates_by == SHA256:
        return texts
    return np.frombuffer(bytes.fromhex("".join(texts)), ">u8").astype(np.uint64)


def _digest(metadata: bytes) -> bytes:
    return hashlib.blake2b(metadata, digest_size=16).digest()
