"""Draw quality against cost from a result of `benchmarks/quality.py`.

    python benchmarks/quality_figures.py result.json curve.png

A setting that drew a part of the bench stands where the reference does on the whole bench, plus its change from the
reference on that part: prompts that happen to be hard move both alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COSTS = {"tflop_per_image": ("GFLOP per image", 1e3), "seconds_per_image": ("milliseconds per image, in batches", 1e3)}
DEFAULTS = "presets"  # the group of FlashU's own settings
STEPS = "steps"  # the group without FlashU, what it must beat


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The places of the points that no other beats at no higher cost, from the cheapest."""
    front: list[int] = []
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], -scores[place])):
        if not front or scores[place] > scores[front[-1]]:
            front.append(place)
    return front


def draw_curve(result: dict[str, Any], file: str | Path) -> None:
    """Oracle score against operations and against time, as a PNG file."""
    settings = result["settings"]
    scores = [settings[0]["oracle"]["all"] + entry["oracle_change"]["points"] for entry in settings]
    labels: dict[Axes, list[tuple[str, float, float]]] = {}
    figure, axes = plt.subplots(1, 2, figsize=(15, 7), sharey=True, layout="constrained")
    for axis, (key, (label, unit)) in zip(axes, COSTS.items(), strict=True):
        costs = [entry[key] * unit for entry in settings]
        front = _draw(axis, settings, costs, scores)
        axis.set(xlabel=label, xlim=(0, 1.12 * max(costs)))
        defaults = [place for place, entry in enumerate(settings) if entry["group"] == DEFAULTS]
        in_order = dict.fromkeys((*defaults, *front, *range(len(settings))))
        labels[axis] = [(settings[place]["name"], costs[place], scores[place]) for place in in_order]
    axes[0].set_ylabel("oracle score")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"shapes-bench: quality against cost ({result['model']} model, {result['device']})")
    figure.canvas.draw()  # so that it is known how much room each label takes
    for axis, points in labels.items():
        _label(axis, points)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw(axis: Axes, settings: Sequence[dict[str, Any]], costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Points, the line of plainly fewer steps, and the Pareto front, of which it returns the places."""
    groups = list(dict.fromkeys(entry["group"] for entry in settings))
    for number, group in enumerate(groups):
        places = [place for place, entry in enumerate(settings) if entry["group"] == group]
        places.sort(key=costs.__getitem__)
        marker, size = ("*", 130) if group == DEFAULTS else ("o", 28)
        points = [costs[place] for place in places], [scores[place] for place in places]
        axis.scatter(*points, s=size, marker=marker, color=f"C{number % 10}", label=group, zorder=3)
        if group == STEPS:
            axis.plot(*points, color=f"C{number % 10}", linewidth=1, linestyle=":")
    front = pareto_front(costs, scores)
    steps = [costs[place] for place in front], [scores[place] for place in front]
    axis.plot(*steps, color="0.6", linewidth=1, drawstyle="steps-post", label="Pareto front")
    axis.grid(color="0.92")
    return front


def _label(axis: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside points, the first ones first; a name that would cover another is left out."""
    placed = []
    for name, x, y in points:
        label = axis.annotate(name, (x, y), xytext=(6, 3), textcoords="offset points", fontsize=7)
        box = label.get_window_extent()
        if any(box.overlaps(other) for other in placed):
            label.remove()
        else:
            placed.append(box)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args()
    draw_curve(json.loads(options.result.read_text(encoding="utf-8")), options.figure)
