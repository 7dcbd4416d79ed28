"""Where a run stands, from what is in its folder; it need not be going."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from cluster.storage import Storage
from jobs.dataset.keys import FAILURES, METADATA, require_run, shards_with
from jobs.driver.progress import duration
from jobs.report.builder import write_report
from jobs.statistics.collect import ShardSet, collect_statistics
from jobs.statistics.summary import SUMMARY_EVERY_S, read_summary

SILENT_S = 4 * SUMMARY_EVERY_S


def describe_run(storage: Storage) -> str:
    """A few lines: state, shards, images, rate, failures. Raises `InputError` where there is no run."""
    run, summary = require_run(storage), read_summary(storage)
    planned = run["manifest"]["num_shards"]
    committed = list(shards_with(storage, METADATA))
    failed = sum(1 for _ in shards_with(storage, FAILURES))
    images, failed_prompts, rate = _counts(storage, summary, committed)
    speed = f", {rate:.3g} images/s" if rate else ""
    age = f" (last heard of {duration(time.time() - summary['written_at'])} ago)" if summary else ""
    share = 100 * len(committed) / planned
    lines = [
        f"{storage.url}: {_state(run, summary, len(committed))}",
        f"shards     {len(committed):,} of {planned:,} committed ({share:.0f}%), {failed:,} with failures",
        f"manifest   {run['manifest']['path']}, {run['manifest']['num_rows']:,} prompts",
        f"model      {run['config']['model']['path']}, FlashU {run['config']['flashu']['preset']}",
        f"images     {images:,}, {failed_prompts:,} prompts failed{speed}{age}",
    ]
    return "\n".join(lines)


def _counts(storage: Storage, summary: dict[str, Any] | None, committed: list[int]) -> tuple[int, int, float | None]:
    """Images and failed prompts of the committed shards, and images a second.

    The summary has counted most of them, if there is one; only shards that were committed since are read.
    """
    counted = ShardSet()
    if summary and (ranges := summary.get("counted_shards")) is not None:
        counted = ShardSet.of_ranges(ranges)
    elif summary and summary["shards"]["done"] == len(committed):  # of a filtered copy, or an older one
        counted = ShardSet(committed)
    new = [shard for shard in committed if shard not in counted]
    if len(committed) - len(new) < len(counted):  # some have vanished since, so that all must be counted anew
        counted, new = ShardSet(), committed
    since = collect_statistics(storage, new)
    if not len(counted):
        return since.images, since.failed_prompts, since.images_per_second
    images, failed = summary["images"]["count"], summary["prompts"]["failed"]
    rate = summary["throughput"]["images_per_second"] or since.images_per_second
    return images + since.images, failed + since.failed_prompts, rate


def rebuild_report(storage: Storage) -> None:
    """Write summary, report and dataset card from the committed shards. Raises `InputError` where there is no run."""
    run, summary = require_run(storage), read_summary(storage)
    committed = sorted(shards_with(storage, METADATA))
    statistics = collect_statistics(storage, committed)
    state = _state(run, summary, statistics.shards)
    write_report(storage, statistics, run, state=state, counted=ShardSet(committed))


def _state(run: dict[str, Any], summary: dict[str, Any] | None, done: int) -> str:
    if done >= run["manifest"]["num_shards"]:
        return "complete"
    state = summary["state"] if summary else "running"
    if state != "running":
        return "interrupted" if state == "complete" else state  # shards are missing that were there
    heard_of = summary["written_at"] if summary else datetime.fromisoformat(run["created"]).timestamp()
    return "interrupted" if time.time() - heard_of > SILENT_S else "running"
