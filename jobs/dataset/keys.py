"""What a run's folder holds, and under which names. The same on disk and in S3.

run.json                       what the run was told, and what it is a run of
data/shard-00042.parquet       the images (or .tar, or a folder data/00042/)
metadata/shard-00042.parquet   a row per image, no pixels; written last: it is the commit
failures/shard-00042.parquet   prompts given up on, with the error
scores.safetensors             what FlashU prunes by, if the run measured it itself
scores/self/                   what `flashu dpg score` found, by the judge of that name
summary.json, report.html      the run in figures; README.md is a dataset card
logs/                          tracebacks of workers' errors, one of each kind
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
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
    """The shards that have an object in METADATA, FAILURES, or a folder of scores."""
    for key in storage.list(folder):
        name = key.removeprefix(folder)
        number = name.removeprefix("shard-").removesuffix(".parquet")
        if number.isdecimal() and name == f"shard-{number}.parquet":
            yield int(number)


def read_metadata(storage: Storage, shard: int) -> bytes:
    """A shard's metadata file. Raises `InputError` where it has vanished."""
    try:
        return storage.get(metadata_key(shard))
    except NotFound:
        raise InputError(f"{storage.url}/{metadata_key(shard)} has vanished: is the run being made anew?") from None


def read_run(storage: Storage) -> dict[str, Any] | None:
    """`run.json`, or None where there is no run. Raises `InputError` for another file of that name."""
    try:
        run = json.loads(storage.get(RUN))
        run["config"]["output"]["format"], run["manifest"]["num_shards"]  # what every reader goes by
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{storage.url}/{RUN} is damaged, or not of a run of flashu; give another folder") from None
    return run


def require_run(storage: Storage) -> dict[str, Any]:
    """`run.json`. Raises `InputError` where there is no run."""
    run = read_run(storage)
    if run is None:
        raise InputError(f"{storage.url} holds no run (no run.json)")
    return run


def write_run(storage: Storage, run: dict[str, Any]) -> None:
    storage.put(RUN, json_file(run))


def json_file(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file that people may read, as all in a run's folder are."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def json_value(value: Any) -> Any:
    """None for the numbers that JSON has no word for; they may stand inside a carried column's lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: json_value(part) for name, part in value.items()}
    return [json_value(part) for part in value] if isinstance(value, list) else value
