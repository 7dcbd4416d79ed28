"""The run's README.md: a Hugging Face dataset card, by which `datasets.load_dataset` finds the images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import yaml

from jobs.dataset.formats import FORMATS
from jobs.metrics.pixels import METRICS, NEAR_DUPLICATE_BITS, SCORES
from jobs.report.page import page

COLUMNS = {
    "image": "the picture",
    "prompt_id": "of the prompt in the manifest; unique there",
    "prompt": "what was asked for",
    "negative_prompt": "what was to be avoided",
    "image_index": "which of the prompt's images this is, from 0",
    "seed": "of the noise that the image began as",
    "width": "pixels",
    "height": "pixels",
    "file_name": "of the image file",
    "sha256": "of the image file's bytes",
    "size_bytes": "of the image file",
    "truncated": "whether the prompt was longer than the model reads, and was cut",
    "model": "what made it",
    "model_fingerprint": "hash of the model's weights",
    "dtype": "in which the model ran",
    "num_inference_steps": "points of the time grid, one more than the steps",
    "guidance_scale": "classifier-free guidance; null where FlashU's schedule sets it",
    "time_shift": "of the time grid",
    "flashu": "FlashU's settings as JSON, or `off`",
    "batch_size": "images generated together",
    "seconds": "this image's share of its batch's time",
    "worker": "who generated it",
    "node": "where",
    "attempt": "at the shard, from 1",
} | {f"quality_{name}": one.meaning for name, one in (METRICS | SCORES).items()}
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def dataset_card(summary: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """`columns` are the metadata's names and types."""
    payload = (summary["config"].get("output") or {}).get("format") or "parquet"
    return page(
        "card.md",
        front_matter=_front_matter(summary, payload),
        summary=summary,
        payload=payload,
        filters=_filters(summary),
        near_duplicate_bits=NEAR_DUPLICATE_BITS,
        columns={name: (kind, COLUMNS.get(name, "carried from the manifest")) for name, kind in columns.items()},
    )


def _filters(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was dropped in each filtering that came before these images, the first one first.

    `missing` counts the images that were chosen and could not be read; None while the copy is not finished.
    """
    made, entry = [], summary.get("filter")
    kept = summary["images"]["count"]
    finished = entry and summary["shards"]["done"] == entry["source"]["shards"]
    while entry:
        missing = entry["chosen"] - kept if finished else None
        made.insert(0, entry | {"kept": kept, "missing": missing})
        kept, before = entry["source"]["images"], entry["before"]
        finished = before and entry["source"]["shards"] == before["source"]["shards"]
        entry = before
    return made


def _digest(summary: Mapping[str, Any]) -> str:
    """Another one wherever the images may be others.

    `datasets` caches a folder by the last part of its path and by its configs: without this, it would go on to hand out
    the images that it saw first in a folder of that name.
    """
    figures = [summary.get(name) for name in ("created", "finished_at", "shards", "images", "filter")]
    return hashlib.sha256(json.dumps(figures).encode()).hexdigest()[:16]


def _front_matter(summary: Mapping[str, Any], payload: str) -> str:
    images = summary["images"]["count"]
    card: dict[str, Any] = {
        "task_categories": ["text-to-image"],
        "tags": ["synthetic", "text-to-image", "show-o2", "flashu"],
        "size_categories": [SIZES[max(0, min(len(str(images)) - 3, len(SIZES) - 1))]],
    }
    if images:  # a pattern that matches no file is an error to `datasets`
        config: dict[str, Any] = {
            "config_name": "default",
            "data_files": [{"split": "train", "path": FORMATS[payload].pattern}],
            "description": f"{images} images, {_digest(summary)}",
        }
        if payload == "files":
            config["drop_labels"] = True  # the folders are shards, not classes
        card["configs"] = [config]
    return yaml.safe_dump(card, sort_keys=False, allow_unicode=True).strip()
