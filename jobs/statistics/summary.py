"""A run in one object: what summary.json holds, and what report and dataset card take their numbers from."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from cluster.storage import NotFound, Storage
from jobs.dataset.keys import json_file
from jobs.statistics.collect import ShardSet
from jobs.statistics.mergeable import Distribution
from jobs.statistics.run import RunStatistics

VERSION = 1
SUMMARY = "summary.json"
SUMMARY_EVERY_S = 30.0  # while a run is going


def summarise(statistics: RunStatistics, run: Mapping[str, Any], state: str) -> dict[str, Any]:
    """`run` is what run.json holds; what is missing there is missing here. Times are Unix seconds."""
    manifest = run.get("manifest") or {}
    return {
        "version": VERSION,
        "state": state,
        "created": run.get("created"),
        "written_at": time.time(),
        "started_at": statistics.started_at,
        "finished_at": statistics.finished_at,
        "shards": {
            "done": statistics.shards,
            "planned": manifest.get("num_shards"),
            "retried": statistics.retried_shards,
        },
        "prompts": {
            "done": statistics.prompts,
            "planned": manifest.get("num_rows"),
            "failed": statistics.failed_prompts,
        },
        "images": {
            "count": statistics.images,
            "size_bytes": statistics.size_bytes,
            "truncated_prompts": statistics.truncated,
            "broken": statistics.broken,
            "near_duplicate_pairs_within_shards": statistics.near_duplicates,
        },
        "throughput": _throughput(statistics),
        "stage_seconds": statistics.stage_seconds,
        "workers": _workers(statistics),
        "quality": {name: _quality(values) for name, values in statistics.quality.items()},
        "failures": {"kinds": statistics.failure_kinds, "first": statistics.failures},
        "config": run.get("config") or {},
        "filter": run.get("filter"),  # of a filtered copy: what was asked of which run, and what was dropped
        "manifest": manifest,
        "model": run.get("model") or {},
        "code": run.get("code") or {},
    }


def _throughput(statistics: RunStatistics) -> dict[str, Any]:
    each = statistics.seconds
    return {
        "active_s": statistics.active_s,
        "images_per_second": statistics.images_per_second,
        "gpu_seconds": statistics.gpu_seconds,
        "gpu_seconds_per_image": statistics.gpu_seconds_per_image,
        "worker_seconds_per_image": statistics.worker_seconds_per_image,
        "seconds_per_image": {
            "mean": each.mean if each.count else None,
            "p50": each.quantile(0.5),
            "p90": each.quantile(0.9),
            "p99": each.quantile(0.99),
            "max": each.max,
        },
    }


def _workers(statistics: RunStatistics) -> list[dict[str, Any]]:
    """Those that made the most images first."""
    return [
        {
            "worker": name,
            "node": worker.node,
            "shards": worker.shards,
            "images": worker.images,
            "images_per_second": worker.images_per_second,
            "gpu_seconds": worker.gpu_seconds,
            "stage_seconds": worker.seconds,
        }
        for name, worker in sorted(statistics.workers.items(), key=lambda item: (-item[1].images, item[0]))
    ]


def _quality(values: Distribution) -> dict[str, Any]:
    return {
        "count": values.count,
        "mean": values.mean if values.count else None,
        "std": values.std if values.count else None,
        "min": values.min,
        "p10": values.quantile(0.1),
        "p50": values.quantile(0.5),
        "p90": values.quantile(0.9),
        "max": values.max,
    }


def write_summary(
    storage: Storage,
    statistics: RunStatistics,
    run: Mapping[str, Any],
    *,
    state: str,
    counted: ShardSet | None = None,
) -> dict[str, Any]:
    """Puts summary.json alone, which is quick. Returns what it holds."""
    summary = summarise(statistics, run, state) | {"counted_shards": None if counted is None else counted.ranges}
    storage.put(SUMMARY, json_file(summary))
    return summary


def read_summary(storage: Storage) -> dict[str, Any] | None:
    """What summary.json holds, or None where there is none yet, or none that can be read."""
    try:
        summary = json.loads(storage.get(SUMMARY))
    except (NotFound, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("version") == VERSION else None
