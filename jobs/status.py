"""Where a run stands, from what is in its folder; it need not be going."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from cluster.storage import Storage
from jobs.progress import duration
from jobs.report import SUMMARY_EVERY_S, collect_statistics, read_summary, write_report
from jobs.run_folder import FAILURES, METADATA, require_run, shards_with

SILENT_S = 4 * SUMMARY_EVERY_S


def describe_run(storage: Storage) -> str:
    """A few lines: state, shards, images, rate, failures. Raises `InputError` where there is no run."""
    run, summary = require_run(storage), read_summary(storage)
    planned = run["manifest"]["num_shards"]
    done = sum(1 for _ in shards_with(storage, METADATA))
    failed = sum(1 for _ in shards_with(storage, FAILURES))
    lines = [
        f"{storage.url}: {_state(run, summary, done)}",
        f"shards     {done:,} of {planned:,} committed ({100 * done / planned:.0f}%), {failed:,} with failures",
        f"manifest   {run['manifest']['path']}, {run['manifest']['num_rows']:,} prompts",
        f"model      {run['config']['model']['path']}, FlashU {run['config']['flashu']['preset']}",
    ]
    if summary:
        images, throughput = summary["images"], summary["throughput"]
        rate = throughput["images_per_second"]
        speed = f", {rate:.3g} images/s" if rate else ""
        age = duration(time.time() - summary["written_at"])
        lines.append(
            f"images     {images['count']:,}, {summary['prompts']['failed']:,} prompts failed{speed} ({age} ago)"
        )
    return "\n".join(lines)


def rebuild_report(storage: Storage) -> None:
    """Write summary, report and dataset card from the committed shards. Raises `InputError` where there is no run."""
    run, summary = require_run(storage), read_summary(storage)
    statistics = collect_statistics(storage)
    write_report(storage, statistics, run, state=_state(run, summary, statistics.shards))


def _state(run: dict[str, Any], summary: dict[str, Any] | None, done: int) -> str:
    if done >= run["manifest"]["num_shards"]:
        return "complete"
    state = summary["state"] if summary else "running"
    if state != "running":
        return "interrupted" if state == "complete" else state  # shards are missing that were there
    heard_of = summary["written_at"] if summary else datetime.fromisoformat(run["created"]).timestamp()
    return "interrupted" if time.time() - heard_of > SILENT_S else "running"
