"""`flashu status`: what it counts are the commits, and it reads only those that no summary has counted yet."""

import io
import json
import random
from dataclasses import replace

import pytest

from cluster.local_storage import LocalStorage
from jobs.dataset.keys import metadata_key
from jobs.driver.progress import Progress, ProgressUpdate
from jobs.driver.status import describe_run, rebuild_report
from jobs.statistics.collect import ShardSet, collect_statistics
from jobs.statistics.run import RunStatistics
from jobs.statistics.summary import write_summary
from tests.command import flashu
from tests.jobs.synthetic_run import make_run

SHARDS, EACH = 12, 4  # shard 3 and 10 have a failed prompt


class Counting(LocalStorage):
    """Remembers which shards' files were opened."""

    def __init__(self, root):
        super().__init__(root)
        self.opened = []

    def open(self, key):
        if key.startswith("metadata/"):
            self.opened.append(key)
        return super().open(key)


@pytest.fixture
def run(tmp_path):
    """A run under way, whose driver wrote its summary when it began."""
    make_run(tmp_path, SHARDS * EACH, EACH)
    storage = Counting(tmp_path)
    summary_after(storage, [])
    return storage


def summary_after(storage, shards):
    """What the driver writes once it has heard of these shards."""
    described = json.loads(storage.get("run.json"))
    statistics = collect_statistics(storage, shards) if shards else RunStatistics()
    write_summary(storage, statistics, described, state="running", counted=ShardSet(shards))
    storage.opened.clear()


def remove(storage, *shards):
    for shard in shards:
        storage.delete(metadata_key(shard))


def images_line(text):
    return text.splitlines()[4]


def test_images_committed_since_the_run_began_are_told_before_there_is_a_summary_of_them(run):
    remove(run, *range(6, SHARDS))
    told = flashu("status", run.url).out
    assert told.startswith(f"{run.url}: running\nshards     6 of 12 committed (50%)")
    assert images_line(told).startswith("images     24, 1 prompts failed, ")
    (run.root / "summary.json").unlink()
    assert images_line(flashu("status", run.url).out).startswith("images     24, 1 prompts failed, ")
    for damaged in ("{", "{}", "[]"):
        (run.root / "summary.json").write_text(damaged)
        assert images_line(flashu("status", run.url).out).startswith("images     24, 1 prompts failed, ")


def test_only_shards_that_no_summary_has_counted_are_read(run):
    summary_after(run, [0, 1, 2, 3, 4, 5, 6, 8])
    assert images_line(describe_run(run)).startswith("images     48, 2 prompts failed, ")
    assert sorted(run.opened) == [metadata_key(shard) for shard in (7, 9, 10, 11)]
    rebuild_report(run)
    run.opened.clear()
    assert images_line(describe_run(run)).startswith("images     48, 2 prompts failed, ")
    assert run.opened == []


def test_a_shard_that_vanished_is_not_counted(run):
    summary_after(run, list(range(SHARDS)))
    remove(run, 3, 4)
    assert images_line(describe_run(run)).startswith("images     40, 1 prompts failed, ")


def test_a_summary_that_does_not_say_which_shards_it_has_counted_counts_if_it_can_be_only_these(run):
    for shards, read in (([*range(SHARDS)], 0), ([0, 1], SHARDS)):
        summary_after(run, shards)
        summary = json.loads(run.get("summary.json"))
        del summary["counted_shards"]
        run.put("summary.json", json.dumps(summary).encode())
        assert images_line(describe_run(run)).startswith("images     48, 2 prompts failed, ")
        assert len(run.opened) == read


def test_a_log_says_what_changes_and_once_a_minute_that_nothing_does(monkeypatch):
    now, log = [1000.0], io.StringIO()
    monkeypatch.setattr("jobs.driver.progress.time.monotonic", lambda: now[0])
    progress = Progress(log)
    waiting = ProgressUpdate(0, 8, 0, 0, None, None, workers=2, starting=0)
    begun = replace(waiting, images=1)
    for second in range(200):
        now[0] = 1000.0 + second
        progress.show(begun if second >= 130 else waiting)
    told = [line.partition(" ")[2] for line in log.getvalue().splitlines()]
    assert told == [waiting.line] * 3 + [begun.line] * 2  # at 0, 60, 120, 135 and 195 seconds


def test_a_set_of_shards_is_one_whatever_the_order():
    draw = random.Random(0)
    for _ in range(50):
        given = [draw.randrange(40) for _ in range(draw.randrange(60))]
        made = ShardSet()
        for shard in given:
            made.add(shard)
        assert [shard for shard in range(-1, 41) if shard in made] == sorted(set(given))
        assert len(made) == len(set(given))
        assert made.ranges == ShardSet(given).ranges == ShardSet.of_ranges(made.ranges).ranges
        assert all(last + 1 < first for (_, last), (first, _) in zip(made.ranges, made.ranges[1:], strict=False))
    made = ShardSet(range(100_000))
    assert made.ranges == [[0, 99_999]]
