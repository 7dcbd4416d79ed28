"""What the report's charts show, as bars in a unit square; the template draws them as SVG and sets the text around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jobs.report.wording import number, seconds
from jobs.statistics.mergeable import Distribution, Timeline

MAX_BARS = 64


@dataclass(frozen=True)
class Chart:
    label: str  # what it shows, in words, for those who do not see it
    bars: Sequence[tuple[float, float, float]]  # left, width, height
    top: str  # what the full height stands for
    ticks: Sequence[str]  # of the horizontal axis: left, middle, right
    breaks: Sequence[float] = ()


def throughput(timeline: Timeline) -> Chart | None:
    """Images per second over the time that the run was at work; pauses become a dashed line."""
    total = timeline.active_s
    if not total:
        return None
    bars, breaks, at, before = [], [], 0.0, None
    for _, bucket in sorted(timeline.buckets.items()):
        if before is not None and bucket.first - before > timeline.width_s:
            breaks.append(at / total)
        width = bucket.last - bucket.first
        bars.append((at / total, width / total, bucket.images / width if width else 0.0))
        at, before = at + width, bucket.last
    top = max(height for _, _, height in bars)
    return Chart(
        f"Images per second over {seconds(total)} of work: {number(timeline.rate())} on average, {number(top)} at most",
        _scaled(bars),
        f"{number(top)}/s",
        ("0", seconds(total / 2), seconds(total)),
        breaks,
    )


def histogram(name: str, values: Distribution, unit: str = "", trim: bool = False) -> Chart | None:
    """How often each value occurs; `trim` cuts the axis to the values there are, else runs share one axis."""
    if not values.count:
        return None
    counts, edges = np.array(values.histogram), values.range.edges()
    if trim:
        used = np.flatnonzero(counts)
        low, high = max(used[0] - 1, 0), min(used[-1] + 2, len(counts))
        counts, edges = counts[low:high], edges[low : high + 1]
    starts = np.arange(0, len(counts), -(-len(counts) // MAX_BARS))
    lefts, widths = starts / len(counts), np.diff(starts, append=len(counts)) / len(counts)
    counts = np.add.reduceat(counts, starts)
    middle = (edges[0] * edges[-1]) ** 0.5 if values.range.log else (edges[0] + edges[-1]) / 2
    ticks = [number(edge) + unit for edge in (edges[0], middle, edges[-1])]
    if values.min < edges[0]:
        ticks[0] = f"≤ {ticks[0]}"
    if values.max > edges[-1]:
        ticks[2] = f"≥ {ticks[2]}"
    return Chart(
        f"Histogram of {name}: {number(values.mean)}{unit} on average, from {number(values.min)}{unit} "
        f"to {number(values.max)}{unit}.",
        _scaled(list(zip(lefts.tolist(), widths.tolist(), counts.tolist(), strict=True))),
        f"{counts.max():,}",
        ticks,
    )


def _scaled(bars: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    top = max(height for _, _, height in bars) or 1.0
    return [(left, width, height / top) for left, width, height in bars]
