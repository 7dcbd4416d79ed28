"""GenEval's images, by both arms, as folders for its own evaluator; and the scores that this then gives.

    OUT/prompts.parquet             the manifest of the prompts file
    OUT/baseline/  OUT/flashu/      two runs
    OUT/samples/baseline/ …         what the evaluator reads
    OUT/baseline.jsonl  …           what it writes, put there by whoever runs it

The same command goes on where it stands, and at last reads what the evaluator wrote.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.storage import NotFound, S3Options, Storage, StorageError, open_storage
from flashu.errors import InputError
from jobs.arms import ArmsConfig, check_arms, make_images
from jobs.config import check_no_credentials
from jobs.geneval import export_images
from jobs.inputs import check_inputs
from jobs.prepare import PreparedRun, check_settings, prepare
from jobs.report import collect_statistics
from jobs.report.summary import summarise
from jobs.run_folder import RUN
from manifests.geneval import build_geneval

PROMPTS, SAMPLES = "prompts.parquet", "samples"
EVALUATE = "python evaluation/evaluate_images.py {samples} --outfile {results} --model-path weights"


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
        summary = summarise(collect_statistics(prepared.storage), prepared.run_json, "complete")
        if "://" in storage.url:
            arms[name] = GenevalArm(summary, None, None, None)
            continue
        samples, results = Path(storage.url) / SAMPLES / name, Path(storage.url) / f"{name}.jsonl"
        done = export_images(prepared.storage, samples)
        for what in done.missing:
            print(f"Missing: {what}")
        code = max(code, 1 if done.missing else 0)
        arms[name] = GenevalArm(summary, samples, results, read_scores(results) if results.exists() else None)
    return code, arms


def read_scores(results: Path) -> dict[str, float]:
    """What GenEval's evaluator wrote, a line an image, as its own summary has it: the share of images that are right
    for each tag, and "overall", the mean of the tags'.

    Raises `InputError` for a file of something else.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    try:
        for line in results.read_text(encoding="utf-8").splitlines():
            image = json.loads(line)
            right[str(image["tag"])].append(bool(image["correct"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{results} is not what GenEval's evaluate_images.py writes: {error}") from None
    if not right:
        raise InputError(f"{results} is empty; GenEval's evaluate_images.py writes a line for each image")
    scores = {tag: sum(images) / len(images) for tag, images in sorted(right.items())}
    return scores | {"overall": sum(scores.values()) / len(scores)}


def _prepare(config: GenevalConfig) -> tuple[Storage, dict[str, PreparedRun]]:
    """Check everything that can be before the first image is made."""
    check_no_credentials(config)
    check_arms(config)
    if not config.prompts:
        raise InputError("prompts is not set; give the prompts file, as in prompts=evaluation_metadata.jsonl")
    if config.manifest.path:
        raise InputError("manifest.path is not for GenEval, whose manifest is made of its prompts file; drop it")
    if not config.output.path:
        raise InputError("output.path is not set; give it with -o, or output.path=…")
    for arm in config.arms:
        check_settings(config.run_config(arm, PROMPTS))
    s3 = S3Options(config.storage.endpoint_url, config.storage.region, config.storage.path_style)
    storage = open_storage(config.output.path, s3)
    if not any(storage.exists(f"{arm}/{RUN}") for arm in config.arms):  # else `prepare` knows whether it matters
        check_inputs(config)
    storage.check()
    if storage.exists(RUN):
        raise InputError(f"{storage.url} holds a run; give a benchmark another output.path")
    manifest = _write_prompts(storage, config)
    return storage, {arm: prepare(config.run_config(arm, manifest)) for arm in config.arms}


def _write_prompts(storage: Storage, config: GenevalConfig) -> str:
    """The prompts file as a manifest, written once: a run holds on to its manifest's fingerprint."""
    url = f"{storage.url}/{PROMPTS}"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / PROMPTS
        place = {"endpoint_url": config.storage.endpoint_url, "region": config.storage.region}
        build_geneval(config.prompts, str(file), num_images=config.sampling.num_images, **place)
        try:
            earlier = Path(scratch) / "earlier.parquet"
            earlier.write_bytes(storage.get(PROMPTS))
            if pq.read_table(earlier).to_pydict() != pq.read_table(file).to_pydict():
                raise InputError(f"{url} holds the prompts of another file; give another output.path")
        except NotFound:
            storage.put(PROMPTS, file.read_bytes())
        except (OSError, ValueError) as error:  # pyarrow's
            if isinstance(error, (InputError, StorageError)):
                raise
            raise InputError(f"{url} cannot be read; remove it, and it is made again") from None
    return url
