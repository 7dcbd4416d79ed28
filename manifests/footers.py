"""What Parquet footers tell of a manifest's files before any row is read, and what is refused because of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from manifests import schema
from manifests.errors import ManifestError, named
from manifests.files import plain_errors

MARK = b"flashu.manifest"  # where a file's Parquet metadata says which build wrote it
TAIL = 64 * 1024


class Mark(TypedDict):
    """What it says."""

    build: str  # a hash of the build's ids
    part: int
    files: int  # of the build
    rows: int  # of this file


@dataclass(frozen=True)
class Footer:
    """What planning needs of one file's footer."""

    rows: int
    row_groups: int
    digest: bytes
    schema: pa.Schema
    nulls: dict[str, int]  # required column: nulls in it, as far as statistics tell
    mark: Mark | None

    @classmethod
    def of(cls, raw: bytes, label: str, columns: Mapping[str, str]) -> Footer:
        with plain_errors(label):
            metadata = pq.read_metadata(pa.BufferReader(raw))
            theirs = metadata.schema.to_arrow_schema()
        renamed = schema.renaming(theirs.names, columns, label)
        ours = list(renamed.values())
        for name in schema.REQUIRED:
            if name not in ours:
                raise ManifestError(
                    f"{label}: no column {name}; there are {named(theirs.names)}. Name the one that is meant in "
                    f"manifest.columns (--column {name}=…)"
                    + (", or let `flashu manifest build` make ids" if name == "prompt_id" else "")
                )
        for name, here in zip(ours, theirs, strict=True):
            if problem := schema.type_problem(name, here.type):
                raise ManifestError(f"{label}: the column {problem}")
        schema.refuse_reserved(ours, label)
        return cls(
            rows=metadata.num_rows,
            row_groups=metadata.num_row_groups,
            digest=sha256(raw).digest()[:16],
            schema=pa.schema(
                [(name, schema.TYPES.get(name, here.type)) for name, here in zip(ours, theirs, strict=True)]
            ),
            nulls=_null_counts(metadata, {columns.get(name, name): name for name in schema.REQUIRED}),
            mark=_mark(metadata),
        )


def _mark(metadata: pq.FileMetaData) -> Mark | None:
    """The build's mark. Tools that copy metadata copy it too: it does not count in a file with other rows."""
    mark: Mark | None = json.loads((metadata.metadata or {}).get(MARK, b"null"))
    return mark if mark and mark["rows"] == metadata.num_rows else None


def _null_counts(metadata: pq.FileMetaData, required: dict[str, str]) -> dict[str, int]:
    """{their name: our name} to {our name: nulls}."""
    leaves = {metadata.schema.column(leaf).path: leaf for leaf in range(metadata.num_columns)}
    counts = dict.fromkeys(required.values(), 0)
    for group in range(metadata.num_row_groups):
        for theirs, ours in required.items():
            statistics = metadata.row_group(group).column(leaves[theirs]).statistics
            if statistics is not None and statistics.has_null_count:
                counts[ours] += statistics.null_count
    return counts


def refuse_nulls(labels: list[str], footers: list[Footer]) -> None:
    """Raise for required values that are missing, where statistics tell; other nulls are found when rows are read."""
    for label, one in zip(labels, footers, strict=True):
        for name, count in one.nulls.items():
            if count:
                raise ManifestError(
                    f"{label}: {count:,} of {one.rows:,} rows have no {name} (null); `flashu manifest check` says which"
                )


def compare_schemas(first: str, wanted: pa.Schema, other: str, found: pa.Schema) -> None:
    """Raise for the first column in which two files differ. The order of columns does not matter."""
    for name in dict.fromkeys(wanted.names + found.names):
        types = [str(s.field(name).type) if name in s.names else "missing" for s in (wanted, found)]
        if types[0] != types[1]:
            raise ManifestError(
                f"all files of a manifest must have the same columns: {name} is {types[0]} in {first}, "
                f"but {types[1]} in {other}"
            )


def is_one_build(path: str, marks: Sequence[Mark | None], whole: bool) -> bool:
    """Whether all files are parts of one build, which has no id twice. A folder must then hold all of its parts."""
    marked = [mark for mark in marks if mark]
    parts = {mark["part"] for mark in marked}
    if len({mark["build"] for mark in marked}) > 1 or len(parts) < len(marks):
        return False
    if whole and len(parts) < (files := marked[0]["files"]):
        raise ManifestError(
            f"{path} holds {len(parts):,} of the {files:,} files that `flashu manifest build` makes there: "
            "it was cut short, or files were removed. Build it again, or name the files to use with a glob"
        )
    return True


def read_footer(open_file: Callable[[], pa.NativeFile], label: str) -> bytes:
    """A Parquet file's footer, as it is in the file, with the length and magic number that end it."""
    with plain_errors(label), open_file() as file:
        size = file.size()
        tail = file.read_at(min(TAIL, size), max(size - TAIL, 0))
        if size < 12 or tail[-4:] != b"PAR1":
            raise ManifestError(
                f"{label} is not a Parquet file, or was cut short; `flashu manifest build` makes one from text or csv"
            )
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > size:
            raise ManifestError(f"{label} is a damaged Parquet file: its footer is longer than the file")
        return bytes(tail[-length:] if length <= len(tail) else file.read_at(length, size - length))
