"""GenEval's images, by both arms, as folders for its own evaluator; and the scores that this then gives.

    OUT/prompts.parquet                       the manifest of the prompts file
    OUT/baseline/  OUT/flashu/                two runs
    OUT/samples/baseline/ …                   what the evaluator reads: of any run, what `export_images` writes
        00000/metadata.jsonl                  the prompt's line of evaluation_metadata.jsonl, out of the manifest
        00000/samples/0000.png                the prompt's images
    OUT/baseline.jsonl  …                     what it writes, put there by whoever runs it

The evaluator takes every folder that is named by digits, and of its samples every file that begins with digits and
.png; so nothing else of that kind may lie there. The grid.png of its generation script is for people only.

The same command goes on where it stands, and at last reads what the evaluator wrote.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.local_storage import LocalStorage
from cluster.storage import Storage
from flashu.errors import InputError
from jobs.dataset.images import ImageEncoder, images_by_prompt
from jobs.dataset.keys import FAILURES, METADATA, failures_key, metadata_key, require_run, shards_with
from jobs.driver.prepare import PreparedRun, prepare
from jobs.scoring.arms import PROMPTS, ArmsConfig, make_images, open_output, summary_of, write_prompts
from jobs.settings.config import check_no_credentials
from manifests.importers import GENEVAL_COLUMN, build_geneval, check_line
from manifests.sources import json_lines

SAMPLES = "samples"
EVALUATE = "python evaluation/evaluate_images.py {samples} --outfile {results} --model-path weights"


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


@dataclass
class GenevalConfig(ArmsConfig):
    """The settings of two arms, and the benchmark's prompts."""

    prompts: str = ""  # evaluation_metadata.jsonl, or a file like it, local or s3://


@dataclass
class GenevalArm:
    """An arm's run, and what the evaluator found in its images, if it has been there."""

    summary: dict[str, Any]
    samples: Path | None  # None where the output is no local folder
    results: Path | None
    scores: dict[str, float] | None  # of each tag, and "overall"
    missing: list[str] = field(default_factory=list)  # what the evaluator will not find, in words


def run_geneval(config: GenevalConfig, announce: Callable[[], object]) -> tuple[int, dict[str, GenevalArm]]:
    """Make what is left of the images, write the evaluator's folders, and read what it wrote.

    `announce` is called once everything was found good. Returns the exit code, as of a run, and the arms, where all
    images were made.
    Raises `InputError`, `ManifestError`, `StorageError` or `SessionError` for what a user can mend, before any worker
    is started.
    """
    storage, runs = _prepare(config)
    announce()
    go_on, code = make_images(runs, len(runs))
    if not go_on:
        return code, {}
    arms = {}
    for name, prepared in runs.items():
        summary = summary_of(prepared)
        if "://" in storage.url:
            arms[name] = GenevalArm(summary, None, None, None)
            continue
        samples, results = Path(storage.url) / SAMPLES / name, Path(storage.url) / f"{name}.jsonl"
        done = export_images(prepared.storage, samples)
        code = max(code, 1 if done.missing else 0)
        scores = read_scores(results, done.images) if results.exists() else None
        arms[name] = GenevalArm(summary, samples, results, scores, done.missing)
    return code, arms


def read_scores(results: Path, images: int) -> dict[str, float]:
    """What GenEval's evaluator wrote, a line an image, as its own summary has it: the share of images that are right
    for each tag, and "overall", the mean of the tags'.

    Raises `InputError` for a file of something else, or of another number of images.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    with results.open("rb") as file:
        for number, line in json_lines(file, str(results)):
            if not isinstance(line, dict) or not isinstance(line.get("correct"), bool):
                raise InputError(
                    f"{results}:{number}: not a line of GenEval's evaluate_images.py, with tag and correct"
                )
            right[str(line.get("tag"))].append(line["correct"])
    found = sum(map(len, right.values()))
    if found != images:
        raise InputError(
            f"{results} is of {found:,} images, and there are {images:,}; remove it, and run the evaluator again"
        )
    scores = {tag: sum(of_tag) / len(of_tag) for tag, of_tag in sorted(right.items())}
    return scores | {"overall": sum(scores.values()) / len(scores)}


def _prepare(config: GenevalConfig) -> tuple[Storage, dict[str, PreparedRun]]:
    """Check everything that can be before the first image is made."""
    check_no_credentials(config)
    if not config.prompts:
        raise InputError("prompts is not set; give the prompts file, as in --prompts evaluation_metadata.jsonl")
    if config.manifest.path:
        raise InputError("manifest.path is not for GenEval, whose manifest is made of its prompts file; drop it")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / PROMPTS
        place = {"endpoint_url": config.storage.endpoint_url, "region": config.storage.region}
        build_geneval(config.prompts, str(file), num_images=config.sampling.num_images, **place)
        prompts = pq.read_table(file)
    storage, _ = open_output(config)
    storage.check()
    manifest = write_prompts(storage, prompts, config.prompts)
    return storage, {arm: prepare(config.run_config(arm, manifest)) for arm in config.arms}
