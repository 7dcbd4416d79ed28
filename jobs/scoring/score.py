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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.open_storage import open_storage
from cluster.pool import PoolError, Snapshot, Stop
from cluster.storage import NotFound, S3Options, Storage, StorageError
from flashu.errors import InputError
from jobs.dataset.keys import METADATA, metadata_key, require_run, shards_with
from jobs.driver.pool import workers_for
from jobs.driver.stop_signals import StopSignals
from jobs.driver.tracebacks import Tracebacks
from jobs.scoring.answers import IMAGES_KEY, UNANSWERED_KEY, AnsweringWork, answers_key, images_digest
from jobs.scoring.judges import verdict
from jobs.scoring.open_judge import absolute_name, check_judge, check_vqa, scores_folder
from jobs.scoring.questions import Item, read_questions
from jobs.scoring.rules import BenchmarkScores
from jobs.settings.config import RunConfig
from jobs.settings.inputs import is_on_cluster
from jobs.settings.paths import absolute_model

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
    answered_by: str | None  # the identity of the VQA model; None before it has answered

    def to_json(self) -> dict[str, Any]:
        scores = self.scores
        return {
            "score": scores.overall,
            "items": len(scores.items),
            "images": self.images,
            "complete": self.complete,
            "items_without_images": len(self.left_out),
            "images_not_answered": self.unanswered,
            "answers": self.odd.answers,
            "neither_yes_nor_no": self.odd.neither,
            "examples_of_neither": self.odd.examples,
            "level_1": {name: tally.score for name, tally in scores.levels_1.items()},
            "level_2": {name: tally.score for name, tally in scores.categories.items()},
            "by_item": scores.items,
        }


def score_run(url: str, questions: str, vqa: str, config: RunConfig, note: Note) -> tuple[Scored, int]:
    """Score the run at `url`, or go on with it. Of `config`, the cluster and storage sections count.

    Returns the scores of what is answered, and the exit code: 0 when that is everything.
    Raises `InputError`, `StorageError` or `SessionError` for what a user can mend, before any worker is started.
    """
    s3 = config.storage.s3
    check_vqa(vqa, s3, is_on_cluster(config.cluster.address))
    vqa = absolute_name(vqa)
    text = read_text(questions, s3)
    items = read_questions(text, questions)
    storage = open_storage(url, s3)
    run = require_run(storage)
    made = sorted(shards_with(storage, METADATA))
    folder = scores_folder(vqa)
    about = read_about(storage, vqa, text)
    images = _read_images(storage, made, items, questions, note)
    if about is None:
        about = {"vqa": vqa, "questions": _digest(text), "identity": None}
        _put(storage, folder + ABOUT, about)

    total = run["manifest"]["num_shards"]
    if len(made) < total:
        note(f"{storage.url}: {len(made)} of {total} shards are committed; the others have no images to score yet")
    answered = _answered(storage, folder, images.digests)
    done = {shard for shard, unanswered in answered.items() if not unanswered}
    state, exit_code = "", 0
    if len(done) < len(made):
        absolute = storage.url if "://" in storage.url else str(Path(storage.url).absolute())
        work = AnsweringWork(absolute, s3, run, absolute_model(run["config"]["model"]), vqa, items, folder)
        for warning in check_judge(vqa, work.model, config):
            note(warning)
        not_to_do = done | (set(range(total)) - set(made))
        watch = _Watch(storage, folder, about, len(made) - len(done), note)
        with StopSignals(note) as signals:
            try:
                with workers_for(work, total, sorted(not_to_do), config, note, about["identity"]) as pool:
                    pool.run(watch, lambda: signals.stop)
            except PoolError as error:
                state = str(error)
        if signals.stop is not Stop.NO:
            state, exit_code = "stopped; run the same command again to go on", signals.exit_code
        answered = _answered(storage, folder, images.digests)
    if state:
        note(f"Not every image is scored: {state}")
    scored = _collect(storage, folder, items, answered, about["identity"])
    scored.left_out = [item for item in items if item not in images.prompts]
    scored.complete = len(answered) == len(made) == total
    for image in scored.unanswered[:SHOWN]:
        note(f"Not answered: {image['prompt_id']!r}, image {image['image_index']}: {image['error']}")
    if len(scored.unanswered) > SHOWN:
        note(f"… and {len(scored.unanswered) - SHOWN:,} images more, in {storage.url}/{folder}{SCORES}")
    if scored.odd.warning:
        note(scored.odd.warning)
    _put(storage, folder + ABOUT, about)
    _put(storage, folder + SCORES, scored.to_json())
    return scored, exit_code or (0 if scored.complete and not scored.unanswered else 1)


class _Watch:
    """Tells how far the answering is, and what answers, once that is known."""

    def __init__(self, storage: Storage, folder: str, about: dict[str, Any], shards: int, note: Note):
        self.storage, self.folder, self.about, self.shards, self.note = storage, folder, about, shards, note
        self.left_out: set[int] = set()
        self.tracebacks = Tracebacks(storage)

    def __call__(self, snapshot: Snapshot) -> None:
        self.tracebacks.keep(snapshot.tracebacks)
        for lost in snapshot.lost:
            self.note(f"Lost {self.tracebacks.beside(lost)}")
        for shard in snapshot.abandoned.keys() - self.left_out:
            self.left_out.add(shard)
            self.note(f"Left out: shard {shard}: {self.tracebacks.beside(snapshot.abandoned[shard])}")
        if snapshot.identity and self.about["identity"] is None:
            self.about["identity"] = snapshot.identity
            with suppress(StorageError):  # it is written again at the end
                _put(self.storage, self.folder + ABOUT, self.about)
        if snapshot.reports:
            done = self.shards - snapshot.remaining - len(self.left_out)
            self.note(f"{done:,}/{self.shards:,} shards answered")


def read_text(path: str, s3: S3Options) -> str:
    """A question file's text, line ends as they are. Raises `InputError`, `StorageError`."""
    try:
        if "://" in path:
            parent, _, name = path.rpartition("/")
            return open_storage(parent, s3).get(name).decode()
        return Path(path).expanduser().read_bytes().decode()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except NotFound:
        raise InputError(f"{path} cannot be read: there is no such file") from None
    except (OSError, RuntimeError, ValueError) as error:  # ~nobody's home, a URL of no file
        if isinstance(error, StorageError):
            raise
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _put(storage: Storage, key: str, content: dict[str, Any]) -> None:
    storage.put(key, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class _Images:
    """What a run has made, as far as scoring it goes."""

    prompts: set[str] = field(default_factory=set)
    digests: dict[int, str] = field(default_factory=dict)  # `images_digest` of each shard


def _read_images(storage: Storage, made: list[int], items: dict[str, Item], questions: str, note: Note) -> _Images:
    """Raises `InputError` where no prompt has questions, or metadata cannot be read."""
    images = _Images()
    columns = ["prompt_id", "image_index", "sha256"]
    for shard, table in zip(made, _tables(storage, [metadata_key(shard) for shard in made], columns), strict=True):
        rows = [tuple(row.values()) for row in table.to_pylist()]
        images.prompts |= {prompt_id for prompt_id, *_ in rows}
        images.digests[shard] = images_digest(row for row in rows if row[0] in items)
    count = len(images.prompts)
    unasked = sorted(images.prompts - items.keys())
    if count and len(unasked) == count:
        raise InputError(
            f"{questions} has no questions about any prompt of {storage.url}: its items are called "
            f"{some(items)}, the run's prompts {some(unasked)}"
        )
    if unasked:
        note(f"{len(unasked):,} of {count:,} prompts have no questions, and are left out: {some(unasked)}")
    without = [item for item in items if item not in images.prompts]
    if without:
        note(f"{len(without):,} of {len(items):,} items have no images in this run: {some(without)}")
    return images


def some(names: Any) -> str:
    names = list(names)
    shown = ", ".join(json.dumps(name[:80], ensure_ascii=False) for name in names[:SHOWN])
    return shown + (", …" if len(names) > SHOWN else "")


def read_about(storage: Storage, vqa: str, questions: str) -> dict[str, Any] | None:
    """What the answers of a run were made by, or None where there are none. `questions` is the question file's text.

    Raises `InputError` where they are answers to another one.
    """
    folder = scores_folder(absolute_name(vqa))
    if next(shards_with(storage, folder), None) is None:
        return None
    anew = "remove that folder to score the run anew"
    try:
        earlier = json.loads(storage.get(folder + ABOUT))
        digest, _ = earlier["questions"], earlier["identity"]
    except (NotFound, ValueError, TypeError, KeyError):
        raise InputError(f"{storage.url}/{folder} holds answers, and no {ABOUT} that says of what; {anew}") from None
    if digest != _digest(questions):
        raise InputError(f"{storage.url}/{folder} holds answers to another question file; {anew}")
    return earlier


def _answered(storage: Storage, folder: str, digests: dict[int, str]) -> dict[int, int]:
    """The shards whose images, as they are now, were asked about, and of how many that was in vain."""

    def read(shard: int) -> tuple[bytes | None, int]:
        try:
            with storage.open(answers_key(folder, shard)) as file:
                footer = pq.read_metadata(file).metadata or {}
                return footer.get(IMAGES_KEY), int(footer.get(UNANSWERED_KEY, 0))
        except (NotFound, pa.ArrowInvalid, OSError):  # cut short, say: it does not count
            return None, 0

    shards = sorted(set(shards_with(storage, folder)) & digests.keys())
    with ThreadPoolExecutor(THREADS) as pool:
        found = zip(shards, pool.map(read, shards), strict=True)
        return {shard: count for shard, (images, count) in found if images == digests[shard].encode()}


def _collect(
    storage: Storage, folder: str, items: dict[str, Item], answered: Iterable[int], answered_by: str | None
) -> Scored:
    """The scores of some shards' answers. An item's are over those of its images that could be asked about."""
    scores, unanswered, images, odd = BenchmarkScores(), [], 0, OddAnswers()
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
    return Scored(scores, images, unanswered, [], False, folder, odd, answered_by)


def _tables(storage: Storage, keys: Sequence[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The Parquet files of those keys, in their order. Raises `InputError` for one that is damaged."""

    def read(key: str) -> pa.Table:
        try:
            with storage.open(key) as file:
                return pq.read_table(file, columns=columns)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{storage.url}/{key} cannot be read ({str(error).splitlines()[0]}); remove it, and the same commands "
                "make it again"
            ) from None

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
        lines += [f"  {name:<30}{tally.score:7.2f}   {tally.asked:,}" for name, tally in tallies.items()]
    return "\n".join(lines)
