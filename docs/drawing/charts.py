"""The charts of quality and of speed: what each shows, read from dated results, and how it is drawn, as SVG."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg import SMALL, WORDS, Drawing

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
QUALITY = ("2026-11-24-quality.json", "2026-11-25-inexact.json")
SPEED = "2026-11-27-gpu-nvidia-h200.json"

EULER = ("stock-8", "stock-12", "stock-20", "stock-35", "stock-50")
ORDER_2 = ("order-2-8", "order-2-10", "order-2-12", "few-steps", "order-2-16", "order-2-20")
LABELS = {  # name of a setting: words beside its point, which of them is at it, and how far from it
    "stock-50": ("50", "middle", 0, 30),
    "stock-35": ("35", "middle", 0, 30),
    "stock-20": ("20", "end", -10, 26),
    "stock-12": ("12", "start", 11, 21),
    "stock-8": ("8", "end", -13, 7),
    "order-2-8": ("8", "middle", 0, -27),
    "order-2-10": ("10", "middle", 0, -24),
    "order-2-12": ("12", "middle", -6, -21),
    "few-steps": ("14 (few-steps)", "middle", 18, -40),
    "order-2-20": ("20", "middle", -1, -15),
    "embedded": ("FlashU, embedded", "start", 11, -22),
    "paper": ("FlashU, the paper's settings", "start", 15, 7),
    "paper-without-layer-skipping": ("these without layer skipping", "start", 15, 7),
}
ARMS = {
    "release": "release, 50 steps",
    "release-flashu": "release, FlashU",
    "ours": "ours, 50 steps",
    "ours-flashu": "ours, FlashU",
    "ours-few-steps": "ours, few-steps",
}


@dataclass(frozen=True)
class Point:
    name: str  # of the setting
    gflop: float  # of an image
    score: float
    error: float  # the standard error of its change from 50 steps


@dataclass(frozen=True)
class Bar:
    name: str
    images_per_s: dict[int, float]  # by batch size
    ratio: float  # over the release's 50 steps, at batch 8


def read(name: str) -> dict[str, Any]:
    """A result of benchmarks/."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def quality_points() -> dict[str, Point]:
    """What the chart of quality shows, by name.

    A setting stands where 50 steps do on the whole bench, plus its change from them on the prompts that it drew, as in
    `benchmarks/quality_figures.py`.
    """
    settings = {entry["name"]: entry for name in QUALITY for entry in read(name)["settings"]}
    reference = settings["stock-50"]["oracle"]["all"]
    return {
        name: Point(
            name,
            settings[name]["tflop_per_image"] * 1e3,
            reference + settings[name]["oracle_change"]["points"],
            settings[name]["oracle_change"]["standard_error"],
        )
        for name in dict.fromkeys((*EULER, *ORDER_2, *LABELS))
    }


def quality() -> str:
    """Score against operations: plainly fewer steps, steps of order 2, and FlashU."""
    points = quality_points()
    drawing = Drawing(
        900,
        572,
        "Score against operations per image",
        "; ".join(f"{it.name}: {it.score:.1f} ± {it.error:.1f} at {it.gflop:.1f} GFLOP" for it in points.values()),
    )
    drawing.heading(
        "What fewer operations cost in quality",
        "Oracle score on the built-in model, with the standard error of its change from 50 steps",
    )
    drawing.legend(32, 118, [("Euler, so many steps", "soft"), ("order 2, so many steps", "blue")])
    left, right, top, bottom = 76, 868, 146, 486
    least, most, low, high = 2, 16, 63, 83.5

    def across(gflop: float) -> float:
        return left + (right - left) * math.log(gflop / least) / math.log(most / least)

    def up(score: float) -> float:
        return bottom - (bottom - top) * (score - low) / (high - low)

    for score in (65, 70, 75, 80):
        drawing.path(f"M{left} {up(score):.1f}H{right}", "line")
        drawing.text(left - 12, up(score) + 6, str(score), SMALL, "soft", "end")
    for gflop in (2, 4, 8, 16):
        drawing.path(f"M{across(gflop):.1f} {top}V{bottom}", "line")
        drawing.text(across(gflop), bottom + 28, str(gflop), SMALL, "soft", "middle")
    words = "GFLOP per image (from line to line, twice as many)"
    drawing.text((left + right) / 2, bottom + 60, words, SMALL, "soft", "middle")
    for line, colour in ((EULER, "soft"), (ORDER_2, "blue")):
        at = [f"{across(points[name].gflop):.1f} {up(points[name].score):.1f}" for name in line]
        drawing.path("M" + "L".join(at), colour, stroke_width=2.5)
    for name, point in points.items():
        colour = "soft" if name in EULER else "blue" if name in ORDER_2 else "teal" if name == "embedded" else "warm"
        x, y = across(point.gflop), up(point.score)
        if point.error:
            above, below = up(point.score + point.error), up(point.score - point.error)
            ends = f"M{x - 5:.1f} {above:.1f}h10M{x - 5:.1f} {below:.1f}h10"
            drawing.path(f"M{x:.1f} {above:.1f}V{below:.1f}{ends}", colour, stroke_width=1.5, stroke_opacity=0.6)
        drawing.circle(x, y, 8 if name == "few-steps" else 6, colour, "panel", stroke_width=1.5)
        if name in LABELS:
            words, anchor, dx, dy = LABELS[name]
            drawing.text(x + dx, y + dy, words, WORDS, colour, anchor, bold=name == "few-steps")
    return drawing.svg()


def speed_bars() -> list[Bar]:
    """What the chart of speed shows: images per second of each arm on an H200."""
    runs = {(run["arm"], run["batch_size"]): run for run in read(SPEED)["runs"]}
    return [
        Bar(name, {size: runs[arm, size]["images_per_s"] for size in (8, 1)}, runs[arm, 8]["speed_up"])
        for arm, name in ARMS.items()
    ]


def speed() -> str:
    """A bar for batch 8 and a thin one for batch 1, for each arm."""
    bars, left, top, each = speed_bars(), 226, 148, 68
    scale = 480 / max(bar.images_per_s[8] for bar in bars)
    drawing = Drawing(
        900,
        500,
        "Images per second on one H200",
        "; ".join(f"{it.name}: {it.images_per_s[8]:.2f} at batch 8, {it.images_per_s[1]:.2f} at 1" for it in bars),
    )
    drawing.heading(
        "Images per second on one H200",
        "Show-o2 1.5B at 432 pixels in bfloat16, random weights; x: over the release's 50 steps",
    )
    drawing.legend(left, 122, [("batch 8", "blue"), ("batch 1", "pale")])
    for row, bar in enumerate(bars):
        y, ours = top + row * each, bar.name.startswith("ours")
        many, one = (scale * bar.images_per_s[size] for size in (8, 1))
        drawing.text(left - 18, y + 30, bar.name, WORDS, anchor="end")
        drawing.rect(left, y, many, 30, "blue" if ours else "soft", rx=3)
        drawing.rect(left, y + 34, one, 14, "pale" if ours else "faint", rx=3)
        drawing.text(left + many + 12, y + 22, f"{bar.images_per_s[8]:.2f}", WORDS, bold=True)
        drawing.text(left + many + 70, y + 22, f"{bar.ratio:.2f}x", WORDS, "soft")
        drawing.text(left + one + 10, y + 47, f"{bar.images_per_s[1]:.2f}", SMALL - 1, "soft")
    return drawing.svg()
