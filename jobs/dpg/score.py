"""Scoring a run: its images' questions answered over the cluster, shard by shard, then DPG-Bench's scores.

    RUN/scores/self/about.json             what answered, and which questions
    RUN/scores/self/shard-00042.parquet    an answer a row; its existence is the commit
    RUN/scores/self/scores.json            the scores

Each VQA model has a folder of its own; that of hf:OWNER/NAME is called hf-OWNER-NAME-…, with a hash of the name.
Scoring again goes on where it stands.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.pool import PoolError, Snapshot, Stop
from cluster.storage import NotFound, S3Options, Storage, open_storage
from flashu.errors import InputError
from jobs.config import ModelSection, RunConfig
from jobs.dpg.answers import AnsweringWork, answers_key
from jobs.dpg.questions import Item, read_questions
from jobs.dpg.scoring import BenchmarkScores
from jobs.dpg.vqa import absolute_name, check_vqa, scores_folder, verdict
from jobs.run_folder import METADATA, metadata_key, require_run, shards_with
from jobs.stop_signals import StopSignals
from jobs.workers import workers_for

ABOUT, SCORES = "about.json", "scores.json"
SHOWN = 5  # names, where there may be thousands
THREADS = 16  # that read a run's files
AT_ONCE = 64  # files

Note = Callable[[str], object]


@dataclass
class OddAnswers:
    """Answers that are neither yes nor no, and count as no; `examples` are the first few that differ."""

    answers: int = 0  # of all kinds
    neither: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Count a row of answers."""
        self.answers += 1
        if row["yes"] or "answer" not in row or verdict(row["answer"]) is not None:  # older files lack it
            return
        self.neither += 1
        if len(self.examples) < SHOWN and all(row["answer"] != other["answer"] for other in self.examples):
            self.examples.append({key: row[key] for key in ("prompt_id", "image_index", "question_id", "answer")})

    @property
    def warning(self) -> str | None:
        """What to tell of them, if there are any."""
        if not self.neither:
            return None
        shown = some(example["answer"] for example in self.examples)
        text = f"{self.neither:,} of {self.answers:,} answers were neither yes nor no, and count as no: {shown}"
        if 2 * self.neither > self.answers:
            return f"WARNING: {text}. This model does not answer yes-or-no questions, and its scores mean nothing"
        return text


@dataclass
class Scored:
    """What came of scoring a run."""

    scores: BenchmarkScores
    images: int
    unanswered: list[dict[str, Any]]  # images that could not be asked about, with the error
    left_out: list[str]  # items of the question file that the run has no images of
    complete: bool  # every shard of the run was made, and every one answered
    folder: str  # of the answers, in the run's
    odd: OddAnswers

    def to_json(self) -> dict[str, Any]:
        scores = self.scores
        return {
            "score": scores.overall if scores.items else None,
            "items": len(scores.items),
            "images": self.images,
            "complete": self.complete,
            "items_without_images": len(self.left_out),
            "images_not_answered": self.unanswered,
            "answers": self.odd.answers,
            "neither_yes_nor_no": self.odd.neither,
            "examples_of_neither": self.odd.examples,
            "level_1": {name: tally.score for name, tally in sorted(scores.levels_1.items())},
            "level_2": {name: tally.score for name, tally in sorted(scores.categories.items())},
            "by_item": scores.items,
        }


def score_run(url: str, questions: str, vqa: str, config: RunConfig, note: Note) -> tuple[Scored, int]:
    """Score the run at `url`, or go on with it. Of `config`, the cluster and storage sections count.

    Returns the scores of what is answered, and the exit code: 0 when that is everything.
    Raises `InputError`, `StorageError` or `SessionError` for what a user can mend, before any worker is started.
    """
    s3 = S3Options(config.storage.endpoint_url, config.storage.region, config.storage.path_style)
    check_vqa(vqa, s3)
    vqa = absolute_name(vqa)
    text = read_text(questions, s3)
    items = read_questions(text, questions)
    storage = open_storage(url, s3)
    run = require_run(storage)
    made = sorted(shards_with(storage, METADATA))
    folder = scores_folder(vqa)
    digest = hashlib.sha256(text.encode()).hexdigest()
    about = _read_about(storage, folder, digest)
    prompts = _check_prompts(storage, made, items, questions, note)
    if about is None:
        about = {"vqa": vqa, "questions": digest, "identity": None}
        storage.put(folder + ABOUT, (json.dumps(about, indent=2) + "\n").encode())
    identity = about["identity"]

    total = run["manifest"]["num_shards"]
    if len(made) < total:
        note(f"{storage.url}: {len(made)} of {total} shards are committed; the others have no images to score yet")
    answered = set(shards_with(storage, folder)) & set(made)
    state, exit_code = "", 0
    if len(answered) < len(made):
        model = ModelSection(**run["config"]["model"])
        payload = run["config"]["output"]["format"]
        absolute = storage.url if "://" in storage.url else str(Path(storage.url).absolute())
        work = AnsweringWork(absolute, s3, payload, model, vqa, items, folder)
        done = answered | (set(range(total)) - set(made))
        with StopSignals(note) as signals:
            try:
                with workers_for(work, total, sorted(done), config, note, identity) as pool:
                    watch = _Watch(storage, folder, len(made) - len(answered), note)
                    pool.run(watch, lambda: signals.stop)
            except PoolError as error:
                state = str(error)
        if signals.stop is not Stop.NO:
            state, exit_code = "stopped; run the same command again to go on", signals.exit_code
    if state:
        note(f"Not every image is scored: {state}")
    scored = _collect(storage, folder, items, prompts, made, total)
    if scored.odd.warning:
        note(scored.odd.warning)
    storage.put(folder + SCORES, (json.dumps(scored.to_json(), indent=2, ensure_ascii=False) + "\n").encode())
    return scored, exit_code or (0 if scored.complete and not scored.unanswered else 1)


class _Watch:
    """Tells how far the answering is, and what answers, once that is known."""

    def __init__(self, storage: Storage, folder: str, shards: int, note: Note):
        self.storage, self.folder, self.shards, self.note = storage, folder, shards, note
        self.told = False

    def __call__(self, snapshot: Snapshot) -> None:
        for lost in snapshot.lost:
            self.note(f"Lost {lost}")
        for shard, why in snapshot.abandoned.items():
            self.note(f"Left out: shard {shard}: {why}")
        if snapshot.identity and not self.told:
            about = json.loads(self.storage.get(self.folder + ABOUT)) | {"identity": snapshot.identity}
            self.storage.put(self.folder + ABOUT, (json.dumps(about, indent=2) + "\n").encode())
            self.told = True
        if snapshot.reports:
            self.note(f"{self.shards - snapshot.remaining}/{self.shards} shards answered")


def read_text(path: str, s3: S3Options) -> str:
    try:
        if "://" in path:
            parent, _, name = path.rpartition("/")
            return open_storage(parent, s3).get(name).decode()
        return Path(path).expanduser().read_text()
    except (OSError, NotFound) as error:
        raise InputError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'there is no such file'}"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def _check_prompts(
    storage: Storage, made: list[int], items: dict[str, Item], questions: str, note: Note
) -> dict[str, int]:
    """How many images each of the run's prompts has. Raises `InputError` where none has questions."""
    counts: dict[str, int] = defaultdict(int)
    for table in _tables(storage, [metadata_key(shard) for shard in made], ["prompt_id"]):
        for prompt_id in table["prompt_id"].to_pylist():
            counts[prompt_id] += 1
    unasked = [prompt_id for prompt_id in counts if prompt_id not in items]
    if counts and len(unasked) == len(counts):
        raise InputError(
            f"{questions} has no questions about any prompt of {storage.url}: its items are called "
            f"{some(items)}, the run's prompts {some(counts)}"
        )
    if unasked:
        note(f"{len(unasked):,} of {len(counts):,} prompts have no questions, and are left out: {some(unasked)}")
    without = [item for item in items if item not in counts]
    if without:
        note(f"{len(without):,} of {len(items):,} items have no images in this run: {some(without)}")
    return counts


def some(names: Any) -> str:
    names = list(names)
    shown = ", ".join(json.dumps(name[:80], ensure_ascii=False) for name in names[:SHOWN])
    return shown + (", …" if len(names) > SHOWN else "")


def _read_about(storage: Storage, folder: str, digest: str) -> dict[str, Any] | None:
    """What the answers that are there were made by, or None. Raises `InputError` for another question file's."""
    if next(shards_with(storage, folder), None) is None:
        return None
    try:
        earlier = json.loads(storage.get(folder + ABOUT))
    except NotFound:
        return None
    if earlier["questions"] != digest:
        raise InputError(
            f"{storage.url}/{folder} holds answers to another question file; remove that folder to score the run anew"
        )
    return earlier


def _collect(
    storage: Storage, folder: str, items: dict[str, Item], prompts: dict[str, int], made: list[int], total: int
) -> Scored:
    """The scores of all answers that are there. An item counts once each of its images is answered."""
    scores, unanswered, images, odd = BenchmarkScores(), [], 0, OddAnswers()
    answered = set(shards_with(storage, folder)) & set(made)
    for table in _tables(storage, [answers_key(folder, shard) for shard in sorted(answered)]):
        answers: dict[str, dict[int, dict[int, bool]]] = defaultdict(lambda: defaultdict(dict))
        for row in table.to_pylist():
            if row["error"] is not None:
                unanswered.append({key: row[key] for key in ("prompt_id", "image_index", "error")})
            else:
                answers[row["prompt_id"]][row["image_index"]][row["question_id"]] = row["yes"]
                odd.add(row)
        for prompt_id, of_prompt in answers.items():
            scores.add(items[prompt_id], list(of_prompt.values()))
            images += len(of_prompt)
    left_out = [item for item in items if item not in prompts]
    complete = len(answered) == len(made) == total
    return Scored(scores, images, unanswered, left_out, complete, folder, odd)


def _tables(storage: Storage, keys: Sequence[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The Parquet files of those keys, in their order."""

    def read(key: str) -> pa.Table:
        with storage.open(key) as file:
            return pq.read_table(file, columns=columns)

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(keys), AT_ONCE):
            yield from pool.map(read, keys[start : start + AT_ONCE])


def format_scores(scored: Scored) -> str:
    """The scores as a table."""
    if not scored.scores.items:
        return "nothing is scored yet"
    lines = [f"{'DPG-Bench score':<32}{scored.scores.overall:7.2f}   of {len(scored.scores.items):,} items"]
    for title, tallies in (("level 1", scored.scores.levels_1), ("level 2", scored.scores.categories)):
        lines.append(f"\n{title:<32}{'score':>7}   questions")
        lines += [f"  {name:<30}{tally.score:7.2f}   {tally.asked:,}" for name, tally in sorted(tallies.items())]
    return "\n".join(lines)
