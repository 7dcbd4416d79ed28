"""Writes a run's summary, page and dataset card from its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.storage import Storage
from jobs.metrics.pixels import METRICS, NEAR_DUPLICATE_BITS, SCORES
from jobs.report import charts
from jobs.report.dataset_card import dataset_card
from jobs.report.page import page, thumbnails
from jobs.report.wording import share
from jobs.statistics.collect import ShardSet, committed_columns
from jobs.statistics.run import STAGES, RunStatistics
from jobs.statistics.summary import write_summary

PAGE, CARD = "report.html", "README.md"
MAX_WORKERS = 24  # shown one by one


def write_report(
    storage: Storage,
    statistics: RunStatistics,
    run: Mapping[str, Any],
    *,
    state: str,
    counted: ShardSet | None = None,
) -> None:
    """Puts summary.json, report.html and README.md into the run's folder, in place of earlier ones.

    `run` is what run.json holds, and `state` a word for the page's title: running, complete, failed, stopped.
    `counted` are the shards that the statistics are of, where that is known.
    """
    summary = write_summary(storage, statistics, run, state=state, counted=counted)
    storage.put(PAGE, render_page(storage, statistics, summary).encode())
    storage.put(CARD, dataset_card(summary, committed_columns(storage)).encode())


def render_page(storage: Storage, statistics: RunStatistics, summary: Mapping[str, Any]) -> str:
    """The page as HTML that asks for nothing from outside."""
    payload = (summary["config"].get("output") or {}).get("format") or "parquet"
    shown = [*statistics.sample, *statistics.slowest, *statistics.broken_images]
    return page(
        "run.html",
        summary=summary,
        statistics=statistics,
        name=storage.url.rstrip("/").rpartition("/")[2],
        url=storage.url,
        thumbnails=thumbnails(storage, payload, shown),
        throughput=charts.throughput(statistics.timeline),
        seconds_chart=charts.histogram("seconds per image", statistics.seconds, " s", trim=True),
        quality=_quality(statistics),
        stages=list(STAGES),
        workers=summary["workers"][:MAX_WORKERS],
        longest_s=max((sum(worker["stage_seconds"].values()) for worker in summary["workers"]), default=0),
        more_workers=len(summary["workers"]) - MAX_WORKERS,
        near_duplicate_bits=NEAR_DUPLICATE_BITS,
        share=share,
    )


def _quality(statistics: RunStatistics) -> list[tuple[str, str, charts.Chart]]:
    """Name, meaning and chart of each metric that was measured."""
    meanings = {name: known.meaning for name, known in (METRICS | SCORES).items()}
    return [
        (name.replace("_", " "), meanings.get(name, ""), chart)
        for name, values in statistics.quality.items()
        if (chart := charts.histogram(name, values))
    ]
