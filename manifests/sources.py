"""Reading what a manifest is built from: text, CSV, JSON and Parquet files as batches of checked rows.

Every reader streams, except `.json`, whose one list must fit in memory. A row is refused here, with its file and line,
if no image could be made of it. What becomes of the rows is not known here.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from manifests import PARQUET, schema
from manifests.errors import ManifestError, named, quoted
from manifests.files import find, plain_errors

Columns: TypeAlias = Mapping[str, str]  # {our name: their name}
Record: TypeAlias = tuple[int, dict[str, Any]]  # a row under our names, and its position in the file

BATCH = 4096
COMPRESSED = ("", ".gz", ".zst", ".bz2")


@dataclass
class Batch:
    """Some rows of one source."""

    label: str
    unit: str  # what `positions` count: lines and files from 1, rows and items from 0
    positions: Sequence[int]
    known: dict[str, list[Any]]  # checked; always with prompt_id and prompt
    carried: dict[str, list[Any] | pa.ChunkedArray]
    ids_made: int = 0

    def where(self, index: int) -> str:
        """A row for an error."""
        return _where(self.label, self.unit, self.positions[index])


def read_sources(sources: Sequence[str], columns: Columns, **place: str | None) -> Iterator[Batch]:
    """All rows of files, folders and globs, in the order given, and of a folder's files in the order of their names.

    `place` is as for `open_filesystem`.
    """
    for source in sources:
        found = find(source, SUFFIXES, **place)
        for name in found.names:
            yield from _read_file(found.filesystem, found.root + name, found.label + name, columns)


def _read_file(filesystem: fs.FileSystem, path: str, label: str, columns: Columns) -> Iterator[Batch]:
    bare, kinds = path, (*READERS, *PARQUET)
    for suffix in COMPRESSED[1:]:
        bare = bare.removesuffix(suffix)
    kind = next((kind for kind in kinds if bare.lower().endswith(kind)), None)
    if kind is None:
        raise ManifestError(f"{label}: prompts are read from {', '.join(kinds)}, and .gz of the text ones")
    with plain_errors(label):
        if kind in PARQUET:
            with filesystem.open_input_file(path) as file:
                yield from _read_parquet(file, label, columns)
        else:
            with filesystem.open_input_stream(path, compression="detect") as stream:
                unit, reader = READERS[kind]
                records = reader(io.BufferedReader(stream, 1 << 20), label, columns)
                yield from batches_of(records, label, unit, from_text=kind in (".csv", ".tsv"))


def batches_of(records: Iterable[Record], label: str, unit: str, from_text: bool = False) -> Iterator[Batch]:
    """Rows, given one by one with their positions, as checked batches. `from_text`: numbers are still text."""
    records = iter(records)
    while chunk := list(itertools.islice(records, BATCH)):
        positions = [position for position, _ in chunk]
        rows = [row for _, row in chunk]
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        carried = [name for name in names if name not in schema.TYPES]
        schema.refuse_reserved(carried, label)
        batch = Batch(label, unit, positions, {}, {name: [row.get(name) for row in rows] for name in carried})
        _convert(batch, {name: [row.get(name) for row in rows] for name in names if name not in carried}, from_text)
        yield batch


def _convert(batch: Batch, known: dict[str, list[Any]], from_text: bool) -> None:
    """Known columns as read, into `batch`: converted, with ids made where there are none, every value usable."""
    if "prompt" not in known:
        there = [*known, *batch.carried]
        raise ManifestError(f"{batch.where(0)}: no column prompt; there are {named(there)}. Name it: --column prompt=…")
    count = len(batch.positions)
    known.setdefault("prompt_id", [None] * count)
    for name, values in known.items():
        convert = CONVERTERS[name]
        for index, value in enumerate(values):
            try:
                values[index] = None if value is None else convert(value, from_text)
            except (ValueError, OverflowError):
                wanted = schema.TYPES[name]
                raise ManifestError(f"{batch.where(index)}: {name} must be {wanted}, not {quoted(value)}") from None
    for index, cells in enumerate(zip(*known.values(), strict=True)):
        row = dict(zip(known, cells, strict=True))
        if row["prompt_id"] is None and row["prompt"] is not None:
            known["prompt_id"][index] = row["prompt_id"] = make_id(row)
            batch.ids_made += 1
        if problem := schema.row_problem(row):
            raise ManifestError(f"{batch.where(index)}: {problem}")
    batch.known = {name: known[name] for name in schema.TYPES if name in known}


def make_id(row: Mapping[str, Any]) -> str:
    """20 hex digits of a hash of what makes the images: the same prompt gets the same id wherever it stands."""
    digest = blake2b(row["prompt"].encode(), digest_size=10)
    for name in schema.TYPES:
        if name not in schema.REQUIRED and row.get(name) is not None:
            digest.update(f"\0{name}\0{row[name]}".encode())
    return digest.hexdigest()


def _text(value: object, from_text: bool) -> str:
    if not isinstance(value, str):
        raise ValueError
    value.isascii() or value.encode()  # JSON can spell half a surrogate pair, which no file can hold
    return value


def _optional_text(value: object, from_text: bool) -> str | None:
    """In a CSV file an empty cell is the only way to say nothing."""
    return _text(value, from_text) if value or not from_text else None


def _id(value: object, from_text: bool) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, from_text) or None


def _integer(value: object, from_text: bool) -> int | None:
    if from_text and isinstance(value, str):
        value = value.strip()
        if not value:
            return None
        try:
            return int(value)
        except ValueError:
            value = float(value)  # pandas writes a column with gaps as 7.0
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return value


def _number(value: object, from_text: bool) -> float | None:
    if from_text and isinstance(value, str):
        return float(value) if value.strip() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return float(value)


CONVERTERS: dict[str, Callable[[Any, bool], str | float | None]] = {
    "prompt_id": _id,
    "prompt": _text,
    "negative_prompt": _optional_text,
    "seed": _integer,
    "num_images": _integer,
    "guidance_scale": _number,
}


def _where(label: str, unit: str, position: int) -> str:
    return f"{label}:{position}" if unit == "line" else f"{label}, {unit} {position}"


def _lines(stream: io.BufferedReader, label: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, with their ends. Only newlines end a line: other separators may stand in a prompt."""
    for number, line in enumerate(stream, start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ManifestError(f"{label}:{number}: not valid UTF-8 at byte {error.start} of the line") from None


def _read_text(stream: io.BufferedReader, label: str, columns: Columns) -> Iterator[Record]:
    for number, line in _lines(stream, label):
        if prompt := line.strip():
            yield number, {"prompt": prompt}


def _read_delimited(stream: io.BufferedReader, label: str, columns: Columns, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader((line for _, line in _lines(stream, label)), delimiter=delimiter, strict=True)
    start = end = 0  # the lines of a row, whose cells may hold newlines
    try:
        header, end = next(rows, None), rows.line_num
        if header is None:
            return
        names = list(schema.renaming(header, columns, label).values())
        for row in rows:
            start, end = end + 1, rows.line_num
            if not row:
                continue
            if len(row) != len(names):
                raise ManifestError(f"{label}:{start}: {len(row)} cells, but the header has {len(names)}")
            yield start, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ManifestError(f"{label}:{end + 1}: not valid CSV: {error}") from None


def json_lines(stream: io.BufferedReader, label: str) -> Iterator[tuple[int, Any]]:
    """Numbered lines, parsed; empty ones are passed over. Raises `ManifestError` for one that is no JSON."""
    for number, line in _lines(stream, label):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ManifestError(f"{label}:{number}: not valid JSON: {error}") from None


def _read_json_lines(stream: io.BufferedReader, label: str, columns: Columns) -> Iterator[Record]:
    return _objects(json_lines(stream, label), label, "line", columns)


def _read_json(stream: io.BufferedReader, label: str, columns: Columns) -> Iterator[Record]:
    try:
        items = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{label}: not valid JSON: {error}") from None
    if not isinstance(items, list):
        raise ManifestError(f"{label}: must hold a list of objects or of prompts, not {type(items).__name__}")
    return _objects(enumerate(items), label, "item", columns)


def _objects(items: Iterable[tuple[int, object]], label: str, unit: str, columns: Columns) -> Iterator[Record]:
    """JSON values, each an object or a bare prompt, as rows under our names."""
    ours = {theirs: ours for ours, theirs in columns.items()}
    missing = set(ours)
    any_object = False
    for position, item in items:
        if isinstance(item, str):
            yield position, {"prompt": item}
            continue
        if not isinstance(item, dict):
            found = type(item).__name__
            raise ManifestError(f"{_where(label, unit, position)}: must be an object or a prompt, not {found}")
        any_object = True
        if ours:
            missing -= item.keys()
            present = {here: theirs for here, theirs in columns.items() if theirs in item}
            names = schema.renaming(list(item), present, _where(label, unit, position))
            item = {names[theirs]: value for theirs, value in item.items()}
        if item.get("prompt") is None:
            raise ManifestError(
                f"{_where(label, unit, position)}: no prompt; there are {named(list(item))}. Name it: --column prompt=…"
            )
        yield position, item
    if missing and any_object:
        raise ManifestError(f"{label}: no column {min(missing)}, named in the column mapping, in any {unit}")


def _read_parquet(file: pa.NativeFile, label: str, columns: Columns) -> Iterator[Batch]:
    opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    names = list(schema.renaming(opened.schema_arrow.names, columns, label).values())
    schema.refuse_reserved(names, label)
    row = 0
    for record_batch in opened.iter_batches(BATCH):
        table = pa.Table.from_batches([record_batch]).rename_columns(names)
        try:
            table.validate(full=True)
        except pa.ArrowInvalid as error:
            raise ManifestError(f"{label}, rows {row}-{row + len(table) - 1}: {str(error).splitlines()[0]}") from None
        carried = {name: _without_dictionary(table.column(name)) for name in names if name not in schema.TYPES}
        batch = Batch(label, "row", range(row, row + len(table)), {}, carried)
        _convert(batch, {name: table.column(name).to_pylist() for name in names if name in schema.TYPES}, False)
        row += len(table)
        yield batch


def _without_dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dictionaries differ from file to file; their values do not."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


READERS: dict[str, tuple[str, Callable[[io.BufferedReader, str, Columns], Iterator[Record]]]] = {
    ".txt": ("line", _read_text),
    ".csv": ("line", partial(_read_delimited, delimiter=",")),
    ".tsv": ("line", partial(_read_delimited, delimiter="\t")),
    ".jsonl": ("line", _read_json_lines),
    ".ndjson": ("line", _read_json_lines),
    ".json": ("item", _read_json),
}
SUFFIXES = tuple(kind + end for kind in READERS for end in COMPRESSED) + PARQUET
