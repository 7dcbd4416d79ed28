"""What a run did, in constant size: each shard's share is made once, stored with the shard, and merged in any order.

`RunStatistics` is what progress, summary, report and dataset card show. It reads no storage and draws nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from jobs.dataset.keys import json_value
from jobs.metrics.bins import Range
from jobs.metrics.pixels import METRICS, NEAR_DUPLICATE_BITS, SCORES
from jobs.statistics.mergeable import Distribution, Timeline, first_of, fold
from manifests.errors import shortened

VERSION = 1
FOOTER_KEY = b"flashu.statistics"  # in the key-value metadata of a shard's Parquet file
STAGES = {"load": "read_s", "generate": "generate_s", "encode": "encode_s", "write": "write_s", "wait": "wait_s"}
SECONDS = Range(1e-3, 1e4, log=True, bins=224)  # per image; a bin is 7.5% wide
MAX_WORKERS, MAX_KINDS, MAX_CARRIED_TEXT = 4096, 100, 300
SLOWEST, BROKEN, SAMPLE, FAILURES = 12, 12, 24, 50
OTHERS = "others"

_TOTALS = ("shards", "retried_shards", "prompts", "images", "failed_prompts", "truncated", "broken", "near_duplicates")


@dataclass
class WorkerStatistics:
    """One worker's share. `seconds` is per stage; load, encode and write run beside generation, so they overlap it."""

    node: str
    shards: int = 0
    images: int = 0
    gpu_seconds: float = 0.0
    first: float = 0.0
    last: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def busy_s(self) -> float:
        """How long it held its GPU for shards: generating, or waiting for rows or for room to write."""
        return self.seconds["generate"] + self.seconds["wait"]

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.busy_s if self.busy_s else None

    def plus(self, other: WorkerStatistics) -> WorkerStatistics:
        return WorkerStatistics(
            self.node if self.node == other.node else "",
            self.shards + other.shards,
            self.images + other.images,
            self.gpu_seconds + other.gpu_seconds,
            min(self.first, other.first),
            max(self.last, other.last),
            {stage: self.seconds[stage] + other.seconds[stage] for stage in STAGES},
        )


@dataclass
class RunStatistics:
    shards: int = 0
    retried_shards: int = 0  # those that took more than one attempt
    prompts: int = 0  # those with images and those given up
    images: int = 0
    failed_prompts: int = 0
    truncated: int = 0  # images whose prompt was longer than the model reads
    broken: int = 0
    near_duplicates: int = 0  # pairs of images of one shard; a run's other pairs are not looked for
    size_bytes: int = 0  # of the encoded images
    workers: dict[str, WorkerStatistics] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)
    seconds: Distribution = field(default_factory=lambda: Distribution(SECONDS))
    quality: dict[str, Distribution] = field(default_factory=dict)
    failure_kinds: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)  # the first by shard and row
    slowest: list[dict[str, Any]] = field(default_factory=list)
    broken_images: list[dict[str, Any]] = field(default_factory=list)
    sample: list[dict[str, Any]] = field(default_factory=list)  # uniform: the images with the smallest hashes

    @classmethod
    def of_shard(
        cls, records: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]], work: Mapping[str, Any]
    ) -> RunStatistics:
        """`records` as in the shard's metadata and `failures` as in its failures, both in the order of their files.

        `work` says who made it and how long each part took: shard, worker, node, attempt, gpus, started_at and
        finished_at (Unix seconds), read_s, wait_s, generate_s, encode_s, write_s.
        """
        shard = work["shard"]
        with_images = {record["prompt_id"] for record in records}
        qualities = _qualities(records)
        intact = [of_image["phash"] for of_image in qualities if of_image.get("phash") and not of_image.get("broken")]
        images = [_image(shard, index, record) for index, record in enumerate(records)]
        statistics = cls(
            shards=1,
            retried_shards=int(work["attempt"] > 1),
            prompts=len(with_images) + sum(failure["prompt_id"] not in with_images for failure in failures),
            images=len(records),
            failed_prompts=len(failures),
            truncated=sum(bool(record["truncated"]) for record in records),
            broken=sum(bool(image["quality"].get("broken")) for image in images),
            near_duplicates=count_near_duplicates(intact),
            size_bytes=sum(record["size_bytes"] for record in records),
            timeline=Timeline.of(len(records), work["started_at"], work["finished_at"]),
            seconds=Distribution.of((record["seconds"] for record in records), SECONDS),
            quality=_distributions(qualities),
            failure_kinds=Counter(error_kind(failure["error"]) for failure in failures),
            failures=[_failure(failure) for failure in failures],
            slowest=[image for image in images if image["seconds"] is not None],
            broken_images=[image for image in images if image["quality"].get("broken")],
            sample=images,
        )
        seconds = {stage: float(work[key]) for stage, key in STAGES.items()}
        statistics.workers[work["worker"]] = WorkerStatistics(
            work["node"],
            1,
            len(records),
            work["gpus"] * (seconds["generate"] + seconds["wait"]),
            work["started_at"],
            work["finished_at"],
            seconds,
        )
        statistics._shorten()
        return statistics

    def merge(self, other: RunStatistics) -> None:
        """Adds another shard's, or another set of shards'. No shard may be in both."""
        for name in (*_TOTALS, "size_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, worker in other.workers.items():
            self.workers[name] = self.workers[name].plus(worker) if name in self.workers else worker
        self.timeline.merge(other.timeline)
        self.seconds.merge(other.seconds)
        for name, distribution in other.quality.items():
            self.quality.setdefault(name, Distribution(distribution.range)).merge(distribution)
        self.failure_kinds = Counter(self.failure_kinds) + Counter(other.failure_kinds)
        for name in ("failures", "slowest", "broken_images", "sample"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._shorten()

    def _shorten(self) -> None:
        self.workers = fold(self.workers, MAX_WORKERS, OTHERS, WorkerStatistics.plus)
        self.failure_kinds = fold(self.failure_kinds, MAX_KINDS, OTHERS, int.__add__)
        self.failures = first_of(self.failures, FAILURES, _place)
        self.slowest = first_of(self.slowest, SLOWEST, lambda image: (-image["seconds"], *_place(image)))
        self.broken_images = first_of(self.broken_images, BROKEN, _place)
        self.sample = first_of(self.sample, SAMPLE, lambda image: (image["lot"], *_place(image)))

    def to_json(self) -> str:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["timeline"] = self.timeline.to_dict()
        return json.dumps({"version": VERSION, **values}, default=vars, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> RunStatistics:
        values = json.loads(text)
        version = values.pop("version", None)
        if version != VERSION:
            raise ValueError(f"statistics of version {version}: this version of flashu reads version {VERSION}")
        values["workers"] = {name: WorkerStatistics(**worker) for name, worker in values["workers"].items()}
        values["timeline"] = Timeline.from_dict(values["timeline"])
        values["seconds"] = Distribution.from_dict(values["seconds"])
        values["quality"] = {name: Distribution.from_dict(metric) for name, metric in values["quality"].items()}
        return cls(**values)

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds per stage, summed over workers. Load, encode and write run beside generation."""
        return {stage: sum(worker.seconds[stage] for worker in self.workers.values()) for stage in STAGES}

    @property
    def gpu_seconds(self) -> float:
        """How long GPUs were held for shards: generating or waiting. Loading the model is not in it."""
        return sum(worker.gpu_seconds for worker in self.workers.values())

    @property
    def gpu_seconds_per_image(self) -> float | None:
        """None where no GPU was held: see `worker_seconds_per_image`."""
        return self.gpu_seconds / self.images if self.images and self.gpu_seconds else None

    @property
    def worker_seconds_per_image(self) -> float | None:
        return sum(worker.busy_s for worker in self.workers.values()) / self.images if self.images else None

    @property
    def started_at(self) -> float | None:
        return min((worker.first for worker in self.workers.values()), default=None)

    @property
    def finished_at(self) -> float | None:
        return max((worker.last for worker in self.workers.values()), default=None)

    @property
    def active_s(self) -> float:
        """Wall time in which shards were worked on: pauses between a run's attempts are left out."""
        return self.timeline.active_s

    @property
    def images_per_second(self) -> float | None:
        """Of the whole run, per second of `active_s`."""
        return self.timeline.rate()

    def eta_s(self, remaining_images: int, window_s: float = 600) -> float | None:
        """From the rate of the last ten minutes, since workers come and go; None before the first shard."""
        rate = self.timeline.rate(window_s)
        return remaining_images / rate if rate else None


def count_near_duplicates(hashes: Sequence[str]) -> int:
    """Pairs whose perceptual hashes differ in at most `NEAR_DUPLICATE_BITS` bits."""
    packed = np.array([int(text, 16) for text in hashes], np.uint64)
    pairs = 0
    for index in range(len(packed) - 1):
        differing = (packed[index + 1 :] ^ packed[index]).view(np.uint8).reshape(-1, 8)
        pairs += int((_BITS[differing].sum(axis=1) <= NEAR_DUPLICATE_BITS).sum())
    return pairs


_BITS = np.array([value.bit_count() for value in range(256)], np.uint8)


def error_kind(error: str) -> str:
    """What an error has in common with others of its kind: its text before the first colon, without numbers."""
    return re.sub(r"\d+", "#", error.strip().split(":")[0].split("\n")[0])[:80] or "unknown"


def _qualities(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    prefix = "quality_"
    names = [name for name in records[0] if name.startswith(prefix)] if records else []
    return [{name.removeprefix(prefix): record[name] for name in names} for record in records]


def _distributions(qualities: list[dict[str, Any]]) -> dict[str, Distribution]:
    return {
        name: Distribution.of((quality[name] for quality in qualities), one.range)
        for name, one in (METRICS | SCORES).items()
        if one.range and qualities and name in qualities[0]
    }


def _image(shard: int, index: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a report shows of an image, and where its pixels are. `lot` is its place in a random order of all images."""
    name = f"{record['prompt_id']}\0{record['image_index']}".encode()
    return {
        "shard": shard,
        "row": index,
        "prompt_id": shortened(record["prompt_id"], MAX_CARRIED_TEXT),
        "prompt": shortened(record["prompt"], MAX_CARRIED_TEXT),
        "image_index": record["image_index"],
        "file_name": record["file_name"],
        "seed": record["seed"],
        "seconds": json_value(record["seconds"]),
        "quality": json_value(_qualities([record])[0]),
        "lot": blake2b(name, digest_size=8).hexdigest(),
    }


def _failure(failure: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: shortened(failure[name] or "", MAX_CARRIED_TEXT) for name in ("prompt_id", "prompt", "error")}
    return {"shard": failure["shard"], "row": failure["row"], **texts}


def _place(item: Mapping[str, Any]) -> tuple[int, int]:
    return item["shard"], item["row"]
