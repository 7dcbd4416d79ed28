"""GenEval's images, by both arms, as folders for its own evaluator; and the scores that this then gives.

    OUT/prompts.parquet             the manifest of the prompts file
    OUT/baseline/  OUT/flashu/      two runs
    OUT/samples/baseline/ …         what the evaluator reads
    OUT/baseline.jsonl  …           what it writes, put there by whoever runs it

The same command goes on where it stands, and at last reads what the evaluator wrote.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.storage import Storage
from flashu.errors import InputError
from jobs.driver.prepare import PreparedRun, prepare
from jobs.scoring.arms import PROMPTS, ArmsConfig, make_images, open_output, summary_of, write_prompts
from jobs.scoring.geneval_folders import export_images
from jobs.settings.config import check_no_credentials
from manifests.importers import build_geneval
from manifests.sources import json_lines

SAMPLES = "samples"
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
