"""A whole benchmark: the images of both arms as two ordinary runs, their scores, and the comparison.

    OUT/prompts.parquet     the question file's prompts, where no manifest was given
    OUT/baseline/           a run, with its scores: unaccelerated Show-o2
    OUT/flashu/             a run, with its scores
    OUT/comparison.json     both beside each other; of an arm that is alone, OUT/flashu.json
    OUT/comparison.html

Each stage goes on where it stands, so the same command does whatever is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from cluster.open_storage import open_storage
from cluster.storage import Storage, StorageError
from flashu.errors import InputError
from jobs.driver.image_cost import tflop_per_image
from jobs.driver.prepare import PreparedRun, prepare
from jobs.driver.run import EXIT_INCOMPLETE
from jobs.scoring.arms import ArmsConfig, check_guidance, make_images, open_output, summary_of, write_prompts
from jobs.scoring.comparison import Arm, compare, format_comparison, write_comparison
from jobs.scoring.open_judge import SELF, check_judge_checkpoint, check_judge_name
from jobs.scoring.questions import DEMO_QUESTIONS, Item, read_questions
from jobs.scoring.rules import some
from jobs.scoring.score import read_about, read_text, score_run
from jobs.settings.config import check_no_credentials
from jobs.settings.inputs import is_on_cluster, open_manifest, prompts_of
from manifests.plan import Manifest

SIGNALLED = 128  # exit codes from there on are of a signal
MEASURED_PROMPTS = 1024  # whose lengths say what an image costs


@dataclass
class BenchmarkConfig(ArmsConfig):
    """The settings of two arms, and what the benchmark needs beside them."""

    questions: str = ""  # the question file, dpg_bench.csv or another of its format, local or s3://
    vqa: str = SELF  # who answers: self, the model that made the images; hf:ID_OR_PATH; mplug, the official judge


def a_demo_of(config: BenchmarkConfig, prompts: int) -> BenchmarkConfig:
    """The same for so many prompts, each a shard; where no others are set, the built-in model's, into a folder here."""
    return replace(
        config,
        questions=config.questions or str(DEMO_QUESTIONS),
        output=replace(config.output, path=config.output.path or "dpg-demo"),
        manifest=replace(config.manifest, limit=config.manifest.limit or prompts, shard_size=1),
    )


def run_benchmark(
    config: BenchmarkConfig, announce: Callable[[], object] = lambda: None
) -> tuple[int, dict[str, Any] | None]:
    """Do what is left of a benchmark, and print the comparison. Returns the exit code, and the comparison if it came
    to that. `announce` is called once everything was found good.

    0 if every prompt has its images and every image its answers; 1 if some have none; 128 and more after a signal.
    Raises `InputError`, `ManifestError`, `StorageError` or `SessionError` for what a user can mend, before any worker
    is started.
    """
    storage, runs, items = _prepare(config)
    announce()
    stages, arms = 2 * len(runs), []
    go_on, code = make_images(runs, stages)
    if not go_on:
        return code, None
    incomplete = bool(code)
    for number, (name, prepared) in enumerate(runs.items(), start=len(runs) + 1):
        _note(f"Stage {number} of {stages}: scores, {name}")
        scored, code = score_run(prepared.storage.url, config.questions, config.vqa, config, _note)
        if not scored.complete or code >= SIGNALLED:
            return code or EXIT_INCOMPLETE, None
        incomplete |= bool(code)
        arms.append(Arm(name, prepared.storage, scored, summary_of(prepared), _tflop(prepared)))
    comparison = compare(arms)
    page = write_comparison(storage, comparison, arms, items, config.vqa)
    print(f"\n{format_comparison(comparison)}\n\n{storage.url}/{page}")
    return EXIT_INCOMPLETE if incomplete else 0, comparison


def _note(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def _prepare(config: BenchmarkConfig) -> tuple[Storage, dict[str, PreparedRun], dict[str, Item]]:
    """Check everything that can be before the first image is made. Returns the output, the runs and the items."""
    check_no_credentials(config)
    if not config.questions:
        raise InputError("questions is not set; put the question file into the config, or add questions=dpg_bench.csv")
    s3 = config.storage.s3
    check_judge_name(config.vqa, s3, is_on_cluster(config.cluster.address))
    questions = read_text(config.questions, s3)
    items = read_questions(questions, config.questions)
    storage, new = open_output(config)
    if new:
        check_judge_checkpoint(config.vqa, config.model, config)
    storage.check()
    for arm in config.arms:
        read_about(open_storage(f"{storage.url}/{arm}", s3), config.vqa, questions)
    if config.manifest.path:
        path, manifest = config.manifest.path, open_manifest(config)
        check_guidance(config, manifest)
        _check_questions(manifest, items, config.questions)
    else:
        prompts = {"prompt_id": list(items), "prompt": [item.prompt for item in items.values()]}
        path = write_prompts(storage, pa.table(prompts), config.questions)
    return storage, {arm: prepare(config.run_config(arm, path)) for arm in config.arms}, items


def _check_questions(manifest: Manifest, items: dict[str, Item], questions: str) -> None:
    """Raises `InputError` where the benchmark would find out at its end that no question is about its prompts."""
    ids = {prompt_id for _, rows in manifest.batches(["prompt_id"]) for prompt_id in rows["prompt_id"].to_pylist()}
    if not ids & items.keys():
        raise InputError(
            f"{questions} has no questions about any prompt of {manifest.path}: its items are called {some(items)}, "
            f"the prompts {some(ids)}"
        )


def _tflop(prepared: PreparedRun) -> float | None:
    prompts = list(islice(prompts_of(prepared.manifest), MEASURED_PROMPTS))
    try:
        return tflop_per_image(prepared.config, prompts)
    except (InputError, StorageError) as error:
        _note(f"What an image costs is not counted, as the model's files are not here: {error}")
        return None
