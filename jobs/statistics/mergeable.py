"""Summaries of constant size that merge in any order with the same result: distributions, a timeline, a selection.

They know nothing of images or shards; `jobs.statistics.run` says what is put into them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jobs.metrics.bins import Range

BUCKETS = 240


@dataclass
class Distribution:
    """Count, mean, variance, extremes and a histogram of the finite numbers it was given."""

    range: Range
    count: int = 0
    mean: float = 0.0
    m2: float = 0.0  # sum of squared differences from the mean
    min: float | None = None
    max: float | None = None
    histogram: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.histogram = self.histogram or [0] * self.range.bins

    @classmethod
    def of(cls, values: Iterable[float | None], bins: Range) -> Distribution:
        numbers = np.array([value for value in values if value is not None], np.float64)
        numbers = numbers[np.isfinite(numbers)]
        if not numbers.size:
            return cls(bins)
        mean = float(numbers.mean())
        return cls(
            bins,
            numbers.size,
            mean,
            float(((numbers - mean) ** 2).sum()),
            float(numbers.min()),
            float(numbers.max()),
            np.bincount(bins.index(numbers), minlength=bins.bins).tolist(),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Distribution:
        return cls(**{**values, "range": Range(**values["range"])})

    @property
    def std(self) -> float:
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def merge(self, other: Distribution) -> None:
        if not other.count:
            return
        count = self.count + other.count
        delta = other.mean - self.mean  # Chan, Golub and LeVeque 1979
        self.m2 += other.m2 + delta * delta * self.count * other.count / count
        self.mean += delta * other.count / count
        self.min = other.min if self.min is None else min(self.min, other.min)
        self.max = other.max if self.max is None else max(self.max, other.max)
        self.count = count
        if self.range == other.range:
            self.histogram = [mine + theirs for mine, theirs in zip(self.histogram, other.histogram, strict=True)]
        else:  # a run resumed with a version of the code that declares another range
            edges = other.range.edges()
            counts = np.array(self.histogram)
            np.add.at(counts, self.range.index((edges[:-1] + edges[1:]) / 2), other.histogram)
            self.histogram = counts.tolist()

    def quantile(self, share: float) -> float | None:
        """From the histogram, so exact to a bin's width; None where there are no values."""
        if not self.count:
            return None
        edges, total = self.range.edges(), np.cumsum(self.histogram)
        bin_ = int(np.searchsorted(total, share * self.count))
        inside = (share * self.count - (total[bin_] - self.histogram[bin_])) / max(self.histogram[bin_], 1)
        low, high = edges[bin_], edges[bin_ + 1]
        value = low * (high / low) ** inside if self.range.log else low + (high - low) * inside
        return float(min(max(value, self.min), self.max))


@dataclass
class Bucket:
    """What was made in one stretch of time, and from when to when within it something was at work."""

    images: float
    first: float
    last: float

    def merge(self, other: Bucket) -> None:
        self.images += other.images
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)


@dataclass
class Timeline:
    """Images per stretch of time. Stretches are 2**exponent seconds long, aligned to the epoch.

    At most `BUCKETS` of them are kept: when more would be needed, they are joined in pairs. Only those in which
    something was at work count, so a run resumed days later loses no detail. That their number can only grow with what
    is added makes the result independent of the order.
    """

    exponent: int = 0
    buckets: dict[int, Bucket] = field(default_factory=dict)

    @classmethod
    def of(cls, images: int, start: float, end: float) -> Timeline:
        """`images` made evenly from `start` to `end` (Unix seconds)."""
        end = max(end, start + 1e-3)
        exponent = max(0, math.ceil(math.log2((end - start) / BUCKETS)))
        made = cls(exponent)
        width = made.width_s
        for index in range(math.floor(start / width), math.floor(end / width) + 1):
            first, last = max(start, index * width), min(end, (index + 1) * width)
            if last > first:
                made.buckets[index] = Bucket(images * (last - first) / (end - start), first, last)
        made._join_until_few()
        return made

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Timeline:
        return cls(values["exponent"], {int(index): Bucket(*bucket) for index, bucket in values["buckets"].items()})

    def to_dict(self) -> dict[str, Any]:
        ordered = sorted(self.buckets.items())
        return {
            "exponent": self.exponent,
            "buckets": {str(index): [bucket.images, bucket.first, bucket.last] for index, bucket in ordered},
        }

    @property
    def width_s(self) -> float:
        return float(2**self.exponent)

    @property
    def active_s(self) -> float:
        """Seconds during which something was at work: pauses longer than a bucket are left out."""
        return sum(bucket.last - bucket.first for bucket in self.buckets.values())

    def rate(self, window_s: float = math.inf) -> float | None:
        """Images per active second over the last `window_s` seconds that hold work, rounded up to whole buckets."""
        images = seconds = 0.0
        for _, bucket in sorted(self.buckets.items(), reverse=True):
            images, seconds = images + bucket.images, seconds + bucket.last - bucket.first
            if seconds >= window_s:
                break
        return images / seconds if seconds else None

    def merge(self, other: Timeline) -> None:
        other = Timeline(other.exponent, {index: Bucket(**asdict(bucket)) for index, bucket in other.buckets.items()})
        while self.exponent != other.exponent:
            (self if self.exponent < other.exponent else other)._join_pairs()
        for index, bucket in other.buckets.items():
            self._add(index, bucket)
        self._join_until_few()

    def _join_until_few(self) -> None:
        while len(self.buckets) > BUCKETS:
            self._join_pairs()

    def _join_pairs(self) -> None:
        finer, self.buckets = self.buckets, {}
        self.exponent += 1
        for index, bucket in finer.items():
            self._add(index // 2, bucket)

    def _add(self, index: int, bucket: Bucket) -> None:
        if index in self.buckets:
            self.buckets[index].merge(bucket)
        else:
            self.buckets[index] = bucket


def first_of(items: Iterable[Any], limit: int, key: Callable[[Any], Any]) -> list[Any]:
    """The `limit` items with the smallest keys, in order. First-of the union is first-of the first-ofs."""
    return sorted(items, key=key)[:limit]


def fold(table: dict[str, Any], limit: int, rest: str, add: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """The table with at most `limit` names, the first in alphabetical order; what others held is added up in `rest`.

    A name that is kept in the end was kept in every part, so the order of merging does not matter.
    """
    if len(table) <= limit:
        return table
    kept = dict.fromkeys(sorted(name for name in table if name != rest)[:limit])
    folded = {name: table[name] for name in kept}
    for name, value in table.items():
        if name not in kept:
            folded[rest] = add(folded[rest], value) if rest in folded else value
    return folded
