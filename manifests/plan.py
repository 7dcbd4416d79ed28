"""A manifest as a job sees it: numbered rows cut into shards, planned from Parquet footers alone.

A shard is a range of row numbers over all files, so a plan holds nothing for each shard, and a few words for each file.
It is a small value that can be sent to every worker; each reads its own rows. `check` reads all of them once, in memory
that does not grow with their number: what is in the manifest, what is wrong with it and in which row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manifests import PARQUET, schema
from manifests.errors import ManifestError, quoted
from manifests.files import find, open_filesystem, plain_errors
from manifests.footers import Footer, compare_schemas, is_one_build, read_footer, refuse_nulls
from manifests.unique import DuplicateFinder

THREADS = 32
MOST_PROBLEMS = 20
LENGTHS = (0, 25, 50, 100, 200, 400, 800, 1600, 3200)  # where the length histogram's bars begin, in characters


@dataclass(frozen=True, eq=False)
class Manifest:
    """Rows of one or many Parquet files, in the sorted order of the files' names."""

    path: str  # as it was given
    num_rows: int  # no more than the limit
    shard_size: int  # rows in a shard
    fingerprint: str  # of the whole manifest: neither `limit` nor `shard_size` changes it
    schema: pa.Schema  # as `read` returns it
    carried: list[str]  # the columns that mean nothing to a job, which are carried to its output
    ids_checked: bool  # `flashu manifest build` wrote it, and found no id twice
    num_row_groups: int  # of all files
    files: tuple[str, ...] = field(repr=False)  # their names, in order
    _root: str = field(repr=False)
    _label: str = field(repr=False)
    _starts: NDArray[np.int64] = field(repr=False)  # (files + 1): the first row of each file, and the end
    _digests: tuple[bytes, ...] = field(repr=False)
    _columns: Mapping[str, str] = field(repr=False)
    _place: Mapping[str, str | None] = field(repr=False)

    @classmethod
    def open(
        cls,
        path: str,
        *,
        shard_size: int,
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
        allow_nulls: bool = False,
        **place: str | None,
    ) -> Manifest:
        """Plan the shards of a file, folder or glob of Parquet files. `columns` renames: {our name: their name}.

        `place` is as for `open_filesystem`.
        """
        if shard_size < 1:
            raise ManifestError(f"the shard size must be at least 1, not {shard_size}")
        if limit is not None and limit < 1:
            raise ManifestError(f"the manifest's limit must be at least 1, not {limit}")
        columns = dict(columns or {})
        found = find(path, PARQUET, **place)
        labels = [found.label + name for name in found.names]

        def footer(name: str) -> Footer:
            raw = read_footer(lambda: found.filesystem.open_input_file(found.root + name), found.label + name)
            return Footer.of(raw, found.label + name, columns)

        with ThreadPoolExecutor(min(THREADS, len(labels))) as pool:
            footers = list(pool.map(footer, found.names))
        for label, one in zip(labels[1:], footers[1:], strict=True):
            compare_schemas(labels[0], footers[0].schema, label, one.schema)
        if not allow_nulls:
            refuse_nulls(labels, footers)
        starts = np.cumsum([0, *(one.rows for one in footers)])
        total = int(starts[-1])
        if total == 0:
            raise ManifestError(f"{path} holds no rows")
        fingerprint = sha256()
        for name, one in zip(found.names, footers, strict=True):
            fingerprint.update(json.dumps([name, one.digest.hex()]).encode())
        fingerprint.update(json.dumps(sorted(columns.items())).encode())
        return cls(
            path=path,
            num_rows=total if limit is None else min(limit, total),
            shard_size=shard_size,
            fingerprint=fingerprint.hexdigest(),
            schema=footers[0].schema,
            carried=[name for name in footers[0].schema.names if name not in schema.TYPES],
            ids_checked="prompt_id" not in columns
            and is_one_build(path, [one.mark for one in footers], found.is_folder),
            num_row_groups=sum(one.row_groups for one in footers),
            files=tuple(found.names),
            _root=found.root,
            _label=found.label,
            _starts=starts,
            _digests=tuple(one.digest for one in footers),
            _columns=columns,
            _place=place,
        )

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_size)

    def rows(self, shard: int) -> range:
        """The row numbers of a shard, over all files."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def read(self, shard: int) -> pa.Table:
        """A shard's rows, with known columns in their types. What is wrong with one row is for `schema.row_problem`.

        Parquet can be read by whole row groups only, and the last one is kept in memory, since a worker's next shard is
        often in it too. What `flashu manifest build` writes has 4,096 rows in each; of a file with a million in one,
        every worker decodes and holds that million.
        """
        rows, parts = self.rows(shard), []
        for index in range(self._file_of(rows.start), self._file_of(rows.stop - 1) + 1):
            starts = int(self._starts[index]) + _footer_of(self, index)[1]
            overlap = np.flatnonzero((starts[:-1] < rows.stop) & (starts[1:] > rows.start))
            for group in overlap.tolist():
                start = max(rows.start, int(starts[group]))
                stop = min(rows.stop, int(starts[group + 1]))
                parts.append(_row_group(self, index, group).slice(start - int(starts[group]), stop - start))
        with plain_errors(self.path):
            return pa.concat_tables(parts).combine_chunks()

    def batches(self, columns: list[str] | None = None, size: int = 4096) -> Iterator[tuple[int, pa.Table]]:
        """All rows from the first, a few thousand at a time: (number of the first row, rows)."""
        wanted = self.schema.names if columns is None else columns
        for index in range(len(self.files)):
            row, end = int(self._starts[index]), min(int(self._starts[index + 1]), self.num_rows)
            if row >= end:
                continue
            metadata = _footer_of(self, index)[0]
            with plain_errors(self.label(index)), self._open(index) as opened:
                # Without pre-buffering a row group is read as it is decoded, and need not fit in memory.
                file = pq.ParquetFile(opened, metadata=metadata, pre_buffer=False, buffer_size=1 << 20)
                for batch in file.iter_batches(size, columns=[self._columns.get(name, name) for name in wanted]):
                    table = _normalised(pa.Table.from_batches([batch]), self._columns).select(wanted)
                    yield row, table.slice(0, end - row)
                    row += len(batch)
                    if row >= end:
                        break

    def check_ids(self) -> None:
        """Raise unless every id is there once. Reads the whole column of ids, in bounded memory."""
        with DuplicateFinder() as finder:
            for row, table in self.batches(["prompt_id"]):
                ids = table.column("prompt_id").to_pylist()
                if None in ids:
                    row += ids.index(None)
                    raise ManifestError(f"{self.where(row)}: prompt_id is null, or not valid UTF-8")
                finder.add(ids)
            found = finder.duplicates()
        if found.count:
            pairs = [
                f"{quoted(self.row(row)['prompt_id'])} at {self.where(earlier)} and {self.where(row)}"
                for earlier, row in found.examples
            ]
            raise ManifestError(
                f"{self.path}: {found.count:,} rows have a prompt_id that an earlier row has: {'; '.join(pairs)}; "
                "`flashu manifest build --duplicates drop` keeps the first of each"
            )

    def row(self, row: int) -> dict[str, Any]:
        """One row by its number."""
        shard = row // self.shard_size
        return dict(self.read(shard).slice(row - self.rows(shard).start, 1).to_pylist()[0])

    def where(self, row: int) -> str:
        """A row for an error: by its number, and with its file if there are several."""
        if len(self.files) == 1:
            return f"{self.path}, row {row:,}"
        return f"row {row:,} ({self.files[self._file_of(row)]})"

    def label(self, index: int) -> str:
        """A file as a user would name it."""
        return self._label + self.files[index]

    def _file_of(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _open(self, index: int) -> pa.NativeFile:
        filesystem, _ = open_filesystem(self.path, **self._place)
        return filesystem.open_input_file(self._root + self.files[index])


@lru_cache(maxsize=8)
def _footer_of(manifest: Manifest, index: int) -> tuple[pq.FileMetaData, NDArray[np.int64]]:
    """A file's footer, which must still be the one that was planned with; and where its row groups start and end."""
    label = manifest.label(index)
    raw = read_footer(lambda: manifest._open(index), label)
    if sha256(raw).digest()[:16] != manifest._digests[index]:
        raise ManifestError(
            f"{label} has changed since the manifest was opened; start the run again with another output"
        )
    metadata = pq.read_metadata(pa.BufferReader(raw))
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return metadata, np.cumsum([0, *sizes])


@lru_cache(maxsize=1)
def _row_group(manifest: Manifest, index: int, group: int) -> pa.Table:
    with plain_errors(manifest.label(index)), manifest._open(index) as opened:
        table = pq.ParquetFile(opened, metadata=_footer_of(manifest, index)[0]).read_row_group(group)
    return _normalised(table, manifest._columns).select(manifest.schema.names).replace_schema_metadata(None)


def _normalised(table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """Under our names, in our types."""
    names = schema.renaming(table.column_names, {o: t for o, t in columns.items() if t in table.column_names}, "")
    return schema.normalise(table.rename_columns(list(names.values())))


@dataclass(frozen=True)
class Check:
    """What was found in all rows."""

    lengths: list[int]  # prompts for each bar of LENGTHS
    longest: int
    images: int | None  # if every row says how many
    problems: list[tuple[str, str]]  # the first: (where, what)
    problem_count: int


def check(manifest: Manifest, on_rows: Callable[[int], None] = lambda rows: None) -> Check:
    """Read every row. A problem is what would keep a job from starting, or from making a row's images."""
    lengths = np.zeros(len(LENGTHS), np.int64)
    longest = count = 0
    images: int | None = 0
    problems: list[tuple[str, str]] = []
    known = [name for name in manifest.schema.names if name in schema.TYPES]
    with DuplicateFinder() as finder:
        for start, table in manifest.batches(known):
            characters = pc.utf8_length(table.column("prompt").drop_null()).to_numpy()
            lengths += np.bincount(np.searchsorted(LENGTHS, characters, side="right") - 1, minlength=len(LENGTHS))
            longest = max(longest, int(characters.max(initial=0)))
            if images is not None:
                counts = table.column("num_images") if "num_images" in known else None
                images = None if counts is None or counts.null_count else images + (pc.sum(counts).as_py() or 0)
            for index, row in enumerate(table.to_pylist()):
                if problem := schema.row_problem(row):
                    count += 1
                    if len(problems) < MOST_PROBLEMS:
                        problems.append((manifest.where(start + index), problem))
            # Rows without an id are told already; a name that no other row can have keeps the numbering.
            ids = table.column("prompt_id").to_pylist()
            finder.add(name or f"\0{start + index}" for index, name in enumerate(ids))
            on_rows(len(table))
        found = finder.duplicates()
    for earlier, row in found.examples[: MOST_PROBLEMS - len(problems)]:
        name = quoted(manifest.row(row)["prompt_id"])
        problems.append((manifest.where(row), f"prompt_id {name} is that of {manifest.where(earlier)} too"))
    return Check(lengths.tolist(), longest, images, problems, count + found.count)
