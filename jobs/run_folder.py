"""What a run's folder holds, and under which names. The same on disk and in S3.

run.json                       what the run was told, and what it is a run of
data/shard-00042.parquet       the images (or .tar, or a folder data/00042/)
metadata/shard-00042.parquet   a row per image, no pixels; written last: it is the commit
failures/shard-00042.parquet   prompts given up on, with the error
scores.safetensors             what FlashU prunes by, if the run measured it itself
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cluster.storage import NotFound, Storage
from flashu.errors import InputError

RUN = "run.json"
SCORES = "scores.safetensors"
METADATA, FAILURES = "metadata/", "failures/"


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


def metadata_key(shard: int) -> str:
    return f"{METADATA}shard-{shard_name(shard)}.parquet"


def failures_key(shard: int) -> str:
    return f"{FAILURES}shard-{shard_name(shard)}.parquet"


def shards_with(storage: Storage, folder: str) -> Iterator[int]:
    """The shards that have an object in METADATA or FAILURES."""
    for key in storage.list(folder):
        name = key.removeprefix(folder)
        number = name.removeprefix("shard-").removesuffix(".parquet")
        if number.isdecimal() and name == f"shard-{number}.parquet":
            yield int(number)


def read_run(storage: Storage) -> dict[str, Any] | None:
    """`run.json`, or None where there is no run."""
    try:
        return json.loads(storage.get(RUN))
    except NotFound:
        return None


def require_run(storage: Storage) -> dict[str, Any]:
    """`run.json`. Raises `InputError` where there is no run."""
    run = read_run(storage)
    if run is None:
        raise InputError(f"{storage.url} holds no run (no run.json)")
    return run


def write_run(storage: Storage, run: dict[str, Any]) -> None:
    storage.put(RUN, (json.dumps(run, indent=2, ensure_ascii=False) + "\n").encode())
