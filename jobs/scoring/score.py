"""Scoring a run: its images' questions answered over the cluster, shard by shard, then DPG-Bench's scores.

    RUN/scores/self/about.json             what answered, and which questions
    RUN/scores/self/shard-00042.parquet    an answer a row; its existence is the commit
    RUN/scores/self/scores.json            the scores

Each judge has a folder of its own; that of hf:OWNER/NAME is called hf-OWNER-NAME-…, with a hash of the name.
Scoring again goes on where it stands.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.open_storage import open_storage
from cluster.pool import PoolError
from cluster.queue_actor import Snapshot
from cluster.stop import Stop
from cluster.storage import NotFound, S3Options, Storage, StorageError
from flashu.errors import InputError
from jobs.dataset.keys import METADATA, json_file, metadata_key, require_run, shards_with
from jobs.dataset.reading import read_each
from jobs.driver.pool import workers_for
from jobs.driver.stop_signals import StopSignals
from jobs.driver.tracebacks import Tracebacks
from jobs.scoring.answers import IMAGES_KEY, UNANSWERED_KEY, AnsweringWork, answers_key, images_digest
from jobs.scoring.open_judge import absolute_name, check_judge_checkpoint, check_judge_name, scores_folder
from jobs.scoring.questions import Item, read_questions
from jobs.scoring.rules import SHOWN, BenchmarkScores, OddAnswers, Scored, some
from jobs.settings.config import RunConfig
from jobs.settings.inputs import absolute_model, is_on_cluster

ABOUT, SCORES = "about.json", "scores.json"

Note = Callable[[str], object]


def score_run(url: str, questions: str, vqa: str, config: RunConfig, note: Note) -> tuple[Scored, int]:
    """Score the run at `url`, or go on with it. Of `config`, the cluster and storage sections count.

    Returns the scores of what is answered, and the exit code: 0 when that is everything.
    Raises `InputError`, `StorageError` or `SessionError` for what a user can mend, before any worker is started.
    """
    s3 = config.storage.s3
    check_judge_name(vqa, s3, is_on_cluster(config.cluster.address))
    vqa = absolute_name(vqa)
    text = read_text(questions, s3)
    items = read_questions(text, questions)
    storage = open_storage(url, s3)
    run = require_run(storage)
    made = sorted(shards_with(storage, METADATA))
    folder = scores_folder(vqa)
    about = read_about(storage, vqa, text)
    digests, left_out = _read_images(storage, made, items, questions, note)
    if about is None:
        about = {"vqa": vqa, "questions": _digest(text), "identity": None}
        storage.put(folder + ABOUT, json_file(about))

    total = run["manifest"]["num_shards"]
    if len(made) < total:
        note(f"{storage.url}: {len(made)} of {total} shards are committed; the others have no images to score yet")
    answered = _answered(storage, folder, digests)
    done = {shard for shard, unanswered in answered.items() if not unanswered}
    state, exit_code = "", 0
    if len(done) < len(made):
        absolute = storage.url if "://" in storage.url else str(Path(storage.url).absolute())
        work = AnsweringWork(absolute, s3, run, absolute_model(run["config"]["model"]), vqa, items, folder)
        for warning in check_judge_checkpoint(vqa, work.model, config):
            note(warning)
        not_to_do = done | (set(range(total)) - set(made))
        answering = _Answering(storage, folder, about, len(made) - len(done), note)
        state, exit_code = answering.run(work, total, sorted(not_to_do), config)
        answered = _answered(storage, folder, digests)
    if state:
        note(f"Not every image is scored: {state}")
    scored = _collect(storage, folder, items, answered, about["identity"])
    scored.left_out, scored.complete = left_out, len(answered) == len(made) == total
    _tell_gaps(scored, f"{storage.url}/{folder}{SCORES}", note)
    storage.put(folder + ABOUT, json_file(about))
    storage.put(folder + SCORES, json_file(scored.to_json()))
    return scored, exit_code or (0 if scored.complete and not scored.unanswered else 1)


class _Answering:
    """Has shards answered over the cluster. Tells how far that is, and notes in `about` what answers, once known."""

    def __init__(self, storage: Storage, folder: str, about: dict[str, Any], shards: int, note: Note):
        self.storage, self.folder, self.about, self.shards, self.note = storage, folder, about, shards, note
        self.left_out: set[int] = set()
        self.tracebacks = Tracebacks(storage)

    def run(self, work: AnsweringWork, total: int, not_to_do: list[int], config: RunConfig) -> tuple[str, int]:
        """Returns why it ended early, "" where it did not, and the exit code if that was a signal."""
        state = ""
        with StopSignals(self.note) as signals:
            try:
                with workers_for(work, total, not_to_do, config, self.note, self.about["identity"]) as pool:
                    pool.run(self._watch, lambda: signals.stop)
            except PoolError as error:
                state = str(error)
        if signals.stop is not Stop.NO:
            return "stopped; run the same command again to go on", signals.exit_code
        return state, 0

    def _watch(self, snapshot: Snapshot) -> None:
        self.tracebacks.keep(snapshot.tracebacks)
        for lost in snapshot.lost:
            self.note(f"Lost {self.tracebacks.beside(lost)}")
        for shard in snapshot.abandoned.keys() - self.left_out:
            self.left_out.add(shard)
            self.note(f"Left out: shard {shard}: {self.tracebacks.beside(snapshot.abandoned[shard])}")
        if snapshot.identity and self.about["identity"] is None:
            self.about["identity"] = snapshot.identity
            with suppress(StorageError):  # it is written again at the end
                self.storage.put(self.folder + ABOUT, json_file(self.about))
        if snapshot.reports:
            done = self.shards - snapshot.remaining - len(self.left_out)
            self.note(f"{done:,}/{self.shards:,} shards answered")


def _tell_gaps(scored: Scored, file: str, note: Note) -> None:
    """Tell what the scores are not of; all of it is in `file`."""
    for image in scored.unanswered[:SHOWN]:
        note(f"Not answered: {image['prompt_id']!r}, image {image['image_index']}: {image['error']}")
    if len(scored.unanswered) > SHOWN:
        note(f"… and {len(scored.unanswered) - SHOWN:,} images more, in {file}")
    if scored.odd.warning:
        note(scored.odd.warning)


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_images(
    storage: Storage, made: list[int], items: dict[str, Item], questions: str, note: Note
) -> tuple[dict[int, str], list[str]]:
    """`images_digest` of each shard, and the items that the run has no images of.

    Raises `InputError` where no prompt has questions, or metadata cannot be read.
    """
    prompts: set[str] = set()
    digests: dict[int, str] = {}
    columns = ["prompt_id", "image_index", "sha256"]
    for shard, table in zip(made, _tables(storage, [metadata_key(shard) for shard in made], columns), strict=True):
        rows = [tuple(row.values()) for row in table.to_pylist()]
        prompts |= {prompt_id for prompt_id, *_ in rows}
        digests[shard] = images_digest(row for row in rows if row[0] in items)
    count = len(prompts)
    unasked = sorted(prompts - items.keys())
    if count and len(unasked) == count:
        raise InputError(
            f"{questions} has no questions about any prompt of {storage.url}: its items are called "
            f"{some(items)}, the run's prompts {some(unasked)}"
        )
    if unasked:
        note(f"{len(unasked):,} of {count:,} prompts have no questions, and are left out: {some(unasked)}")
    without = [item for item in items if item not in prompts]
    if without:
        note(f"{len(without):,} of {len(items):,} items have no images in this run: {some(without)}")
    return digests, without


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
    found = zip(shards, read_each(read, shards), strict=True)
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

    return read_each(read, keys)
