"""Building a manifest: any sources to Parquet files with unique ids, in memory that does not grow with the rows.

The sources are read twice. The first pass checks every row, finds the columns' types and the ids that occur twice;
the second writes. So nothing is written of sources that cannot be used, and the number of rows and files is known
before the first file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests import schema
from manifests.errors import ManifestError, quoted
from manifests.sources import Batch, read_sources
from manifests.unique import DuplicateFinder, Duplicates, hash_ids
from manifests.writing import Destination

DUPLICATES = ("report", "drop")
UNFIT = (pa.ArrowException, OverflowError, UnicodeError)  # what Arrow raises for a value that a type cannot hold


@dataclass(frozen=True)
class BuildReport:
    """What was written."""

    rows: int
    files: int
    dropped: int  # rows whose id an earlier row has
    ids_made: int  # among all rows read
    columns: list[str]


def build(
    sources: Sequence[str],
    destination: str,
    *,
    columns: Mapping[str, str] | None = None,
    duplicates: str = "report",
    rows_per_file: int = 1_000_000,
    force: bool = False,
    on_rows: Callable[[int], None] = lambda rows: None,
    **place: str | None,
) -> BuildReport:
    """Build a manifest from files, folders and globs, local or `s3://`.

    `columns` renames: {our name: their name}. `duplicates`: "report" raises for them, "drop" keeps the first of each.
    `on_rows` is called with the number of rows just read, in each of the two passes. `place` is as for
    `open_filesystem`.
    """
    target = Destination.of(destination, sources, force=force, **place)
    batches = partial(read_sources, sources, dict(columns or {}), **place)
    return build_from(batches, target, ", ".join(sources), duplicates, rows_per_file, on_rows)


def build_from(
    batches: Callable[[], Iterable[Batch]],
    destination: Destination,
    label: str,
    duplicates: str = "report",
    rows_per_file: int = 1_000_000,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> BuildReport:
    """Build a manifest from what `batches()` yields, which must be the same rows each time."""
    if duplicates not in DUPLICATES:
        raise ManifestError(f"duplicates: {quoted(duplicates)}; there are {' and '.join(DUPLICATES)}")
    if rows_per_file < 1:
        raise ManifestError(f"a file must hold at least 1 row, not {rows_per_file}")
    scan = _scan(batches, on_rows)
    if not scan.rows:
        raise ManifestError(f"{label}: no prompts in there")
    if scan.duplicates.count and duplicates == "report":
        raise ManifestError(_describe_duplicates(scan.duplicates, batches))
    rows = scan.rows - scan.duplicates.count
    files = destination.write(
        _tables(batches, scan, on_rows),
        scan.schema,
        rows=rows,
        rows_per_file=rows_per_file,
        # Parts of one build hold different ids: so its name is a hash of the ids in order, and of how they were cut.
        build=blake2b(f"{rows_per_file}:{scan.digest}".encode(), digest_size=16).hexdigest(),
    )
    return BuildReport(rows, files, scan.duplicates.count, scan.ids_made, scan.schema.names)


@dataclass(frozen=True)
class _Scan:
    """What the first pass found."""

    rows: int
    ids_made: int
    schema: pa.Schema
    duplicates: Duplicates
    digest: str


def _scan(batches: Callable[[], Iterable[Batch]], on_rows: Callable[[int], None]) -> _Scan:
    known: set[str] = set()
    carried = pa.schema([])
    digest = blake2b(digest_size=16)
    made = 0
    with DuplicateFinder() as finder:
        for batch in batches():
            known |= batch.known.keys()
            carried = _widened(carried, batch)
            digest.update(finder.add(batch.known["prompt_id"]))
            made += batch.ids_made
            on_rows(len(batch.positions))
        found = finder.duplicates()
        rows = finder.rows
    fields = [
        pa.field(name, kind, nullable=name not in schema.REQUIRED)
        for name, kind in schema.TYPES.items()
        if name in known
    ]
    # A column that is empty in every row has no type; it is kept as text.
    fields += [pa.field(one.name, pa.string() if pa.types.is_null(one.type) else one.type) for one in carried]
    return _Scan(rows, made, pa.schema(fields), found, digest.hexdigest())


def _widened(carried: pa.Schema, batch: Batch) -> pa.Schema:
    """The types of carried columns so far, widened to hold this batch's values as well."""
    try:
        found = pa.schema([(name, _type_of(values)) for name, values in batch.carried.items()])
        return pa.unify_schemas([carried, found], promote_options="permissive")
    except UNFIT:
        for index in range(len(batch.positions)):
            for name, values in batch.carried.items():
                try:
                    kind = _type_of(values[: index + 1])
                    so_far = pa.schema([carried.field(name)] if name in carried.names else [])
                    pa.unify_schemas([so_far, pa.schema([(name, kind)])], promote_options="permissive")
                except UNFIT as error:
                    raise ManifestError(
                        f"{batch.where(index)}: the column {name} does not fit the rows before: "
                        f"{str(error).splitlines()[0]}"
                    ) from None
        raise


def _type_of(values: list[Any] | pa.ChunkedArray) -> pa.DataType:
    return values.type if isinstance(values, pa.ChunkedArray) else pa.array(values).type


def _tables(batches: Callable[[], Iterable[Batch]], scan: _Scan, on_rows: Callable[[int], None]) -> Iterator[pa.Table]:
    """The second pass: all rows in the types to write, without those to drop."""
    row = 0
    digest = blake2b(digest_size=16)
    for batch in batches():
        count, columns = len(batch.positions), batch.known | batch.carried
        arrays = [_array(columns.get(field.name), field, batch) for field in scan.schema]
        table = pa.table(arrays, schema=scan.schema)
        if row + count <= scan.rows:
            table = table.filter(pc.invert(pa.array(scan.duplicates.repeats(row, row + count))))
        row += count
        digest.update(hash_ids(batch.known["prompt_id"]))
        on_rows(count)
        if row > scan.rows:
            break
        yield table
    if digest.hexdigest() != scan.digest:
        raise ManifestError("the sources changed while they were read; build again")


def _array(values: list[Any] | pa.ChunkedArray | None, field: pa.Field, batch: Batch) -> pa.Array | pa.ChunkedArray:
    try:
        if values is None:
            return pa.nulls(len(batch.positions), field.type)
        return values.cast(field.type) if isinstance(values, pa.ChunkedArray) else pa.array(values, field.type)
    except UNFIT as error:
        raise ManifestError(
            f"{batch.where(0)} and what follows: the column {field.name} cannot be written as {field.type}: "
            f"{str(error).splitlines()[0]}"
        ) from None


def _describe_duplicates(found: Duplicates, batches: Callable[[], Iterable[Batch]]) -> str:
    """Where the first duplicates are. Reads the sources again, up to there."""
    wanted = sorted({row for pair in found.examples for row in pair})
    places: dict[int, tuple[str, str]] = {}
    row = 0
    for batch in batches():
        for index in (number - row for number in wanted if row <= number < row + len(batch.positions)):
            name, prompt = batch.known["prompt_id"][index], batch.known["prompt"][index]
            places[row + index] = (batch.where(index), quoted(prompt if batch.ids_made else name))
        row += len(batch.positions)
        if len(places) == len(wanted):
            break
    pairs = [f"{places[later][1]} at {places[first][0]} and {places[later][0]}" for first, later in found.examples]
    return (
        f"{found.count:,} rows repeat the prompt_id of an earlier row (a prompt without an id gets one by its text): "
        f"{'; '.join(pairs)}; --duplicates drop keeps the first of each"
    )
