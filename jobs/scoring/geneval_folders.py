"""A run's images as GenEval's own evaluator reads them.

    DIR/00000/metadata.jsonl      the prompt's line of evaluation_metadata.jsonl, which came through the manifest
    DIR/00000/samples/0000.png    the prompt's images

The evaluator takes every folder in DIR that is named by digits, and of its samples every file that begins with digits
and .png; so nothing else of that kind may lie there. The grid.png of its generation script is for people only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.local_storage import LocalStorage
from cluster.storage import Storage
from flashu.errors import InputError
from jobs.dataset.encoding import ImageEncoder
from jobs.dataset.images import images_by_prompt
from jobs.dataset.keys import FAILURES, METADATA, failures_key, metadata_key, require_run, shards_with
from manifests.importers import GENEVAL_COLUMN, check_line


@dataclass
class _Prompt:
    line: str  # of evaluation_metadata.jsonl, in ASCII
    images: set[int] = field(default_factory=set)  # their numbers


@dataclass
class Exported:
    """What was written, and what was not there to be written."""

    prompts: int
    images: int
    each: int  # images of a prompt, where none is missing
    missing: list[str]  # in words


def export_images(storage: Storage, destination: Path) -> Exported:
    """Write the images of all of a run's prompts into a folder, in place of an earlier export of it.

    Raises `InputError` for a run that is not of a GenEval manifest, or for a folder that holds other samples, and
    `StorageError` for one that cannot be written, before anything is.
    """
    run = require_run(storage)
    shards = sorted(shards_with(storage, METADATA))
    prompts = _read_prompts(storage, shards)
    each = max(max(prompt.images) for prompt in prompts.values()) + 1
    _refuse_other_samples(destination, {_sample(name, index) for name in prompts for index in range(each)})
    folder, encoder = LocalStorage(destination), ImageEncoder()
    folder.check()

    absent = "is not in this filtered copy" if run.get("filter") else "was not made"
    done = Exported(0, 0, each, _not_made(storage, run, shards, len(prompts)))
    for shard in shards:
        for prompt_id, images in images_by_prompt(storage, run, shard).items():
            written = 0
            for index in sorted(set(range(each)) - prompts[prompt_id].images):
                folder.delete(_sample(prompt_id, index))
                done.missing.append(f"image {index} of prompt {prompt_id!r} {absent}; others have {each}")
            for image in images:
                key = _sample(prompt_id, image.index)
                try:
                    picture = image.open()
                except InputError as error:
                    folder.delete(key)  # an earlier export's, which would be scored in its place
                    done.missing.append(str(error))
                    continue
                folder.put(key, image.data if image.file_name.endswith(".png") else encoder.encode(picture))
                written += 1
            if written:  # the evaluator stumbles over a folder without samples
                folder.put(f"{prompt_id}/metadata.jsonl", (prompts[prompt_id].line + "\n").encode())
            done.prompts += bool(written)
            done.images += written
    return done


def _sample(prompt_id: str, index: int) -> str:
    return f"{prompt_id}/samples/{index:04d}.png"


def _read_prompts(storage: Storage, shards: Sequence[int]) -> dict[str, _Prompt]:
    """What the run's metadata says of its prompts, which have an image at least. Raises `InputError` where that is not
    what a GenEval manifest makes of it."""
    prompts: dict[str, _Prompt] = {}
    for shard in shards:
        with storage.open(metadata_key(shard)) as file:
            metadata = pq.ParquetFile(file)
            if GENEVAL_COLUMN not in metadata.schema_arrow.names:
                raise InputError(
                    f"{storage.url} is not a run of a GenEval manifest: its images have no column {GENEVAL_COLUMN}; "
                    "make the manifest with flashu manifest geneval"
                )
            for row in metadata.read(columns=["prompt_id", "image_index", GENEVAL_COLUMN]).to_pylist():
                name = row["prompt_id"]
                if name not in prompts:
                    prompts[name] = _Prompt(_line(storage, name, row[GENEVAL_COLUMN]))
                prompts[name].images.add(row["image_index"])
    if not prompts:
        raise InputError(f"{storage.url} has no images yet")
    return prompts


def _line(storage: Storage, prompt_id: str, text: Any) -> str:
    if not re.fullmatch("[0-9]{5,}", prompt_id):  # which is also all that a folder may be called
        raise InputError(
            f"{storage.url} is not a run of a GenEval manifest: the prompt id {prompt_id[:80]!r} is no line's number, "
            "as 00042 is; make the manifest with flashu manifest geneval"
        )
    where = f"{storage.url}, prompt {prompt_id}, column {GENEVAL_COLUMN}"
    try:
        line = json.loads(text)
    except (ValueError, TypeError):
        raise InputError(f"{where}: not a line of evaluation_metadata.jsonl, which is JSON") from None
    check_line(line, where)
    return json.dumps(line)


def _refuse_other_samples(destination: Path, keys: set[str]) -> None:
    for file in destination.glob("*/samples/*"):
        key = file.relative_to(destination).as_posix()
        if file.parts[-3].isdigit() and re.match(r"\d+\.png", file.name) and key not in keys:
            raise InputError(
                f"{destination} holds {key}, which is not of this run and would be scored with it; name an empty folder"
            )


def _not_made(storage: Storage, run: dict[str, Any], shards: Sequence[int], made: int) -> list[str]:
    """The run's prompts without images, in words."""
    missing = []
    for shard in sorted(set(shards_with(storage, FAILURES)) & set(shards)):
        with storage.open(failures_key(shard)) as file:
            rows = pq.read_table(file, columns=["prompt_id", "error"]).to_pylist()
        missing += [f"prompt {row['prompt_id']!r} was given up: {row['error']}" for row in rows]
    rows, total = run["manifest"]["num_rows"], run["manifest"]["num_shards"]
    waiting = rows - made - len(missing)
    if run.get("filter"):
        size = run["config"]["manifest"]["shard_size"]
        waiting = rows - sum(min(size, rows - shard * size) for shard in shards)
        dropped = rows - waiting - made
        if dropped > 0:
            missing.append(
                f"{dropped:,} prompts have no images in this filtered copy of {run['filter']['source']['url']}: "
                "the filter dropped them, or they had none there"
            )
    if waiting > 0:
        missing.append(f"{waiting:,} prompts have no images yet: {len(shards)} of {total} shards are committed")
    return missing
