"""What is known of each image: the columns of a run's metadata, and of the images' own files."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

RECORD = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        ("negative_prompt", pa.string()),
        pa.field("image_index", pa.int32(), nullable=False),  # of the prompt's images
        ("seed", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("file_name", pa.string()),
        ("sha256", pa.string()),  # of the image file's bytes
        ("size_bytes", pa.int64()),
        ("truncated", pa.bool_()),  # the prompt was longer than the model reads
        ("model", pa.string()),
        ("model_fingerprint", pa.string()),
        ("dtype", pa.string()),
        ("num_inference_steps", pa.int32()),
        ("guidance_scale", pa.float64()),  # null where FlashU's schedule sets it
        ("time_shift", pa.float64()),
        ("flashu", pa.string()),  # JSON of FlashU's settings, or "off"
    ]
)
ATTEMPT = pa.schema(  # what differs between two attempts at the same image; in the metadata only
    [
        ("batch_size", pa.int32()),
        ("seconds", pa.float64()),  # the image's share of its batch
        ("worker", pa.string()),
        ("node", pa.string()),
        ("attempt", pa.int32()),
    ]
)
FAILURE = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("error", pa.string()),
        ("shard", pa.int64()),
        ("row", pa.int64()),  # of the manifest, from 0
    ]
)
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True)
class EncodedImage:
    """An image file's bytes, and its row."""

    data: bytes
    record: dict[str, Any]


def record_schema(quality: Sequence[pa.Field], carried: Sequence[pa.Field]) -> pa.Schema:
    """The columns of an image: what made it, its quality, and the manifest's further columns."""
    return pa.schema([*RECORD, *quality, *carried])


def metadata_schema(record: pa.Schema) -> pa.Schema:
    return pa.schema([*record, *ATTEMPT])


def parquet_file(
    rows: list[dict[str, Any]], schema: pa.Schema, footer: Mapping[bytes | str, bytes | str] | None = None
) -> bytes:
    """Rows as a Parquet file's bytes, with `footer` as its key-value metadata."""
    table = pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata(footer)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def image_seed(run_seed: int, prompt_id: str, image_index: int, own_seed: int | None) -> int:
    """The seed of a prompt's image: counted up from the manifest's own, or a hash. Below 2**63.

    So it depends on neither batch, worker, order nor restarts.
    """
    if own_seed is not None:
        return (own_seed + image_index) % 2**63
    digest = hashlib.blake2b(json.dumps([run_seed, prompt_id, image_index]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def file_name(prompt_id: str, image_index: int, suffix: str) -> str:
    """A file name for an image: `ID-0.png`. Ids that could be more than a name are replaced by letters and a hash.

    No two images get the same: plain ids hold no "~", and replaced ones do. No dots, which end a name in WebDataset.
    """
    if not _PLAIN.fullmatch(prompt_id):
        digest = hashlib.blake2b(prompt_id.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()
        words = re.sub(r"[^A-Za-z0-9_-]+", "-", prompt_id)[:40].strip("-")
        prompt_id = f"{words or 'id'}~{digest}"
    return f"{prompt_id}-{image_index}.{suffix}"
