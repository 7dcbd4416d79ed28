"""`flashu filter`: a run in, a smaller run out, in two passes: the choice over metadata, then shard by shard the copy.

The copy's run.json is the run's, with an entry `filter`: what was asked, of which run, and what became of its images.
Shards keep their numbers, and a shard's metadata is its commit, so a copy that was stopped or killed goes on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import takewhile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from cluster.stop import Stop
from cluster.storage import Storage, StorageError
from flashu.errors import InputError
from jobs.dataset.keys import FAILURES, METADATA, RUN, json_file, read_metadata, read_run, require_run, shards_with
from jobs.dataset.reading import in_order
from jobs.driver.stop_signals import StopSignals
from jobs.filtering.choice import PHASH, Choice, Filter, Rules, choose
from jobs.filtering.rewrite import MissingImage, Rewriter
from jobs.report.builder import write_report
from jobs.statistics.collect import collect_statistics
from jobs.statistics.summary import SUMMARY_EVERY_S, write_summary

WRITERS = 4  # shards that are copied at once
SHOWN_MISSING = 10
EXIT_MISSING = 1
COUNT = {"unit": " shards", "disable": None, "leave": False}  # shown on a terminal; nothing in a log
WORDS = {
    "where": "by --where",
    "null": "as a column was null",
    "min_score": "by --min-score",
    "near_duplicate": "near duplicates",
    "missing": "missing",
}

Note = Callable[[str], object]


def filter_run(source: Storage, destination: Storage, asked: Filter, allow_incomplete: bool, note: Note) -> int:
    """Copy what `asked` keeps of the run in `source`, or go on with that. Returns the exit code.

    Raises `InputError` and `StorageError`; for what a user can mend, before anything is written.
    """
    _check_apart(source, destination)
    run = require_run(source)
    shards = sorted(shards_with(source, METADATA))
    _check_complete(source, run, shards, allow_incomplete)
    rules = _rules(source, shards[0], asked)
    earlier = read_run(destination)
    _check_destination(destination, earlier, asked, rules)
    destination.check()
    if rules.duplicates_by not in (None, PHASH):
        note("The run has no perceptual hashes; --dedup drops images whose files are equal.")

    def tell_of_signal(text: str) -> None:
        note(text)
        if signals.stop is Stop.NOW:  # at once: commits are whole, and what is in hand is done again
            sys.stdout.flush()
            os._exit(signals.exit_code)

    with StopSignals(tell_of_signal) as signals:
        with tqdm(total=len(shards), desc="choosing", **COUNT) as bar:
            choice = choose(source, shards, rules, bar.update, lambda: signals.stop is Stop.NO)
        if choice is None:
            written = "nothing is written yet" if earlier is None else "what is written stays"
            note(f"stopped: {written}. Run the same command again to go on.")
            return signals.exit_code
        copied = run | {"filter": _entry(source, run, asked, choice)}
        if earlier is None and not destination.put_new(RUN, json_file(copied)):  # somebody else was faster
            earlier = read_run(destination)
            _check_destination(destination, earlier, asked, rules)
        if earlier is not None:
            _check_same_run(destination, earlier["filter"], copied["filter"])
            copied = earlier
        return _Copy(source, destination, copied, choice, note).run(signals)


class _Copy:
    """The second pass: what is not committed yet is written, then the report."""

    def __init__(self, source: Storage, destination: Storage, run: dict[str, Any], choice: Choice, note: Note):
        self.destination, self.run_json, self.choice, self.note = destination, run, choice, note
        self.rewriter = Rewriter(source, destination, choice, run["config"]["output"]["format"])
        self.missing: list[MissingImage] = []  # the first ones of this start
        self.num_missing = 0
        self.next_summary = 0.0

    def run(self, signals: StopSignals) -> int:
        committed = sorted(shards_with(self.destination, METADATA))
        self.statistics = collect_statistics(self.destination, committed)
        left = sorted(self.choice.shards.keys() - set(committed))
        going = takewhile(lambda _: signals.stop is Stop.NO, left)
        try:
            with (
                tqdm(total=len(self.choice.shards), initial=len(committed), desc="copying", **COUNT) as bar,
                ThreadPoolExecutor(WRITERS, "writer") as pool,
            ):
                for rewritten in in_order(pool, self.rewriter.rewrite, going, WRITERS):
                    self.statistics.merge(rewritten.statistics)
                    self.missing += rewritten.missing[: SHOWN_MISSING - len(self.missing)]
                    self.num_missing += len(rewritten.missing)
                    if time.monotonic() >= self.next_summary:
                        self.next_summary = time.monotonic() + SUMMARY_EVERY_S
                        with suppress(StorageError):  # a later one, or the end, will do
                            write_summary(self.destination, self.statistics, self.run_json, state="running")
                    bar.update()
        except StorageError:
            self.note("What is written stays. Run the same command again to go on.")
            raise
        return self._end(signals)

    def _end(self, signals: StopSignals) -> int:
        statistics, choice, note = self.statistics, self.choice, self.note
        for image in self.missing:
            note(f"Missing: shard {image.shard}, row {image.row}, {image.prompt_id!r}: {image.why}")
        if self.num_missing > len(self.missing):
            note(f"… and {self.num_missing - len(self.missing):,} more")
        if self.missing:
            note("If they can be had again, filter the run into a new folder: what is copied stays as it is.")
        stopped = signals.stop is not Stop.NO and statistics.shards < len(choice.shards)
        whole = self.run_json["filter"]["source"]["shards"] == self.run_json["manifest"]["num_shards"]
        reported = self._report("stopped" if stopped else "complete" if whole else "incomplete")
        if stopped:
            done = f"{statistics.shards:,} of {len(choice.shards):,} shards are in {self.destination.url}"
            note(f"stopped: {done}. Run the same command again to go on.")
            return signals.exit_code
        missing = choice.chosen - statistics.images
        dropped = [f"{count:,} {WORDS[why]}" for why, count in (choice.dropped | {"missing": missing}).items() if count]
        kept = f"kept {statistics.images:,} of {choice.images:,} images in {self.destination.url}"
        note(f"{kept}; dropped {', '.join(dropped) or 'none'}")
        return 0 if reported and not missing else EXIT_MISSING

    def _report(self, state: str) -> bool:
        """Write the report, and whether that went well: what is committed does not depend on it."""
        try:
            write_report(self.destination, self.statistics, self.run_json, state=state)
        except StorageError as error:
            self.note(f"The report could not be written: {error}. `flashu report` writes it anew")
            return False
        return True


def _check_apart(source: Storage, destination: Storage) -> None:
    def real(url: str) -> str:
        return url if "://" in url else os.path.realpath(url)

    other = real(destination.url)
    if real(source.url) == other:
        raise InputError(f"{destination.url} is the run itself; give another folder for what is kept")
    for part in ("", "data", METADATA, FAILURES):  # each of them may be a link to elsewhere
        one = real(f"{source.url}/{part}".rstrip("/"))
        if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
            told = f"of {source.url} and {destination.url}, one lies in the other; give a folder beside the run"
            raise InputError(told)


def _check_complete(source: Storage, run: dict[str, Any], shards: list[int], allow_incomplete: bool) -> None:
    planned, ends = run["manifest"]["num_shards"], "the command `flashu run` that began it finishes it"
    if run.get("filter"):
        origin = run["filter"]["source"]
        ends = f"`flashu filter {origin['url']} {source.url}` with its options finishes it"
        if len(shards) == origin["shards"]:
            ends = f"it is all that {origin['url']} had when it was filtered"
    if not shards:
        raise InputError(f"{source.url} has no shards yet; {ends}")
    if len(shards) < planned and not allow_incomplete:
        raise InputError(
            f"{source.url} is not complete: {len(shards):,} of {planned:,} shards are committed; {ends}, "
            "or --allow-incomplete takes what is there"
        )


def _rules(source: Storage, shard: int, asked: Filter) -> Rules:
    try:
        schema = pq.read_schema(pa.BufferReader(read_metadata(source, shard)))
    except (pa.ArrowException, OSError):
        raise InputError(f"{source.url}: the metadata of shard {shard} cannot be read as Parquet") from None
    return Rules(asked, schema)


def _check_destination(storage: Storage, earlier: dict[str, Any] | None, asked: Filter, rules: Rules) -> None:
    """Refuse to mix a copy with anything else, as far as that is known before the choice is made."""
    if earlier is None:
        for key in (METADATA, "data/", "README.md"):  # the report would replace somebody's own card
            if next(iter(storage.list(key)), None):
                raise InputError(f"{storage.url} holds {key} but no run.json; give another folder")
    elif not earlier.get("filter"):
        raise InputError(f"{storage.url} holds a run, and no filtered copy of one; give another folder")
    else:
        before, now = earlier["filter"], _asked(asked, rules)
        different = [
            f"{name} was {_shown(before[key])} and is {_shown(now[key])}"
            for key, name in (("where", "--where"), ("min_score", "--min-score"), ("dedup", "--dedup"))
            if before[key] != now[key]
        ]
        if different:
            raise InputError(
                f"{storage.url} holds another filtered copy: {'; '.join(different)}. "
                "Give another folder, or the options of that copy"
            )


def _check_same_run(storage: Storage, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    before, after = earlier["source"], now["source"]
    if before["metadata_sha256"] == after["metadata_sha256"]:
        return
    if before["url"] != after["url"]:
        what = f"is a filtered copy of {before['url']}, and not of {after['url']}"
    else:
        had, has = (f"{origin['shards']:,} shards with {origin['images']:,} images" for origin in (before, after))
        change = f"had {had} and has {has}" if had != has else "has the same number of images, but other ones"
        what = f"is a filtered copy of {before['url']} as it was before: it {change}"
    raise InputError(f"{storage.url} {what}; give another folder")


def _entry(source: Storage, run: dict[str, Any], asked: Filter, choice: Choice) -> dict[str, Any]:
    """What run.json tells of a copy: what was asked of which run, and how many images were dropped, and why."""
    return {
        "source": {
            "url": source.url,
            "created": run.get("created"),
            "shards": len(choice.shards),
            "images": choice.images,
            "metadata_sha256": choice.digest,
        },
        **_asked(asked, choice.rules),
        "chosen": choice.chosen,
        "dropped": choice.dropped,
        "before": run.get("filter"),  # of a copy's copy
    }


def _asked(asked: Filter, rules: Rules) -> dict[str, Any]:
    where = asked.where.strip() if asked.where is not None else None
    return {"where": where, "min_score": asked.min_score, "dedup": rules.duplicates_by}


def _shown(value: Any) -> str:
    return "not given" if value is None else f"{value!r}"
