"""What a manifest's columns are: names, types, and which values a job can use.

It knows nothing of files. Types are judged per column, when a manifest is opened; values per row, when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import ManifestError, named

REQUIRED = ("prompt_id", "prompt")
TYPES: dict[str, pa.DataType] = {
    "prompt_id": pa.string(),
    "prompt": pa.string(),
    "negative_prompt": pa.string(),
    "seed": pa.int64(),
    "num_images": pa.int32(),
    "guidance_scale": pa.float64(),
}
"""The columns that mean something to a job, as a job sees them. Any other column is carried to the output."""

MAX_SEED = 2**63 - 1
MAX_IMAGES = 10_000
"""Images of one prompt. All of a prompt is computed in one shard, so a mistyped count would hold a worker for days."""

_OF_IMAGE = ("image", "image_index", "width", "height", "file_name", "sha256", "size_bytes", "truncated")
_OF_MODEL = ("model", "model_fingerprint", "dtype", "num_inference_steps", "time_shift", "flashu")
_OF_ATTEMPT = ("batch_size", "seconds", "worker", "node", "attempt")
RESERVED = frozenset((*_OF_IMAGE, *_OF_MODEL, *_OF_ATTEMPT))
RESERVED_PREFIXES = ("quality_", "__")


def is_reserved(name: str) -> bool:
    """Whether the job writes a column of this name itself."""
    return name in RESERVED or name.startswith(RESERVED_PREFIXES)


def refuse_reserved(names: Iterable[str], where: str) -> None:
    """Raise for columns whose names the job needs: none of `TYPES` is among them."""
    taken = sorted(name for name in names if is_reserved(name))
    if taken:
        raise ManifestError(
            f"{where}: the job writes columns of its own named {named(taken)}; "
            f"rename yours with --column new={taken[0]} (in a config: manifest.columns)"
        )


def renaming(names: list[str], columns: Mapping[str, str], where: str) -> dict[str, str]:
    """{name there: name here} for all of a file's columns, given `columns` as {name here: name there}."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ManifestError(f"{where}: the column {repeated[0]} is there twice")
    missing = [theirs for theirs in columns.values() if theirs not in names]
    if missing:
        raise ManifestError(f"{where}: no column {missing[0]}, named in the column mapping; there are {named(names)}")
    ours = {theirs: ours for ours, theirs in columns.items()}
    renamed = {name: ours.get(name, name) for name in names}
    for name in ours.values():
        clash = [theirs for theirs, here in renamed.items() if here == name]
        if len(clash) > 1:
            other = next(theirs for theirs in clash if theirs not in ours)
            raise ManifestError(
                f"{where}: {columns[name]} cannot be named {name}, there is such a column already; "
                f"rename that one too: --column other={other}"
            )
    return renamed


def type_problem(name: str, found: pa.DataType) -> str | None:
    """Why a column of this type cannot be used under this name, or None."""
    if name not in TYPES:
        return None
    wanted = TYPES[name]
    value = found.value_type if pa.types.is_dictionary(found) else found
    if pa.types.is_string(wanted):
        fits = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    elif pa.types.is_integer(wanted):
        fits = pa.types.is_integer(found)
    else:
        fits = pa.types.is_floating(found) or pa.types.is_integer(found)
    return None if fits else f"{name} is {found}, and must be {wanted}; `flashu manifest build` converts it"


def normalise(table: pa.Table) -> pa.Table:
    """The same rows with known columns in their `TYPES`. A number that no type can hold becomes one out of range."""
    for index, name in enumerate(table.column_names):
        column = table.column(index)
        if name in TYPES:
            wanted = TYPES[name]
            if pa.types.is_integer(wanted):
                column = column.cast(pa.int64(), safe=False)  # a uint64 too large turns negative, which no row may be
                if wanted != pa.int64():
                    column = pc.if_else(pc.greater(column, MAX_IMAGES), MAX_IMAGES + 1, column)
            column = column.cast(wanted, safe=False)
            table = table.set_column(index, pa.field(name, wanted), column)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            table = table.set_column(index, name, _unicode(column, null=name in REQUIRED))
    return table


def _unicode(column: pa.ChunkedArray, null: bool) -> pa.ChunkedArray:
    """Parquet does not promise that text is UTF-8. What is not becomes null where that spoils its row alone."""
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        return pa.chunked_array([[_decode(value, null) for value in column.cast(pa.binary()).to_pylist()]], column.type)


def _decode(value: bytes | None, null: bool) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None if null else value.decode(errors="replace")


def row_problem(row: Mapping[str, Any]) -> str | None:
    """Why no image can be made of this row, or None. For rows of normalised tables."""
    prompt = row["prompt"]
    if prompt is None:
        return "prompt is missing, or not valid UTF-8"
    if not prompt.strip():
        return "prompt is empty"
    if not row["prompt_id"]:
        return "prompt_id is missing, empty, or not valid UTF-8"
    seed = row.get("seed")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        return f"seed must be between 0 and 2^63 - 1, not {'negative or larger' if seed < 0 else seed}"
    images = row.get("num_images")
    if images is not None and not 1 <= images <= MAX_IMAGES:
        return f"num_images must be between 1 and {MAX_IMAGES:,}, not {'more' if images > MAX_IMAGES else images}"
    guidance = row.get("guidance_scale")
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        return f"guidance_scale must be a finite number from 0, not {guidance}"
    return None
