"""Figures of what the analysis measured, as PNG files, laid out to be read at 28 layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from flashu.analysis.activations import Activations
from flashu.analysis.compare import LayerShares
from flashu.analysis.obd import ObdScores

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PERCENTILES = 200  # columns into which a layer's sorted neurons are gathered
GENERATION, SHARED, UNDERSTANDING = "#4c78a8", "#9d7bb0", "#e4643f"


def draw_obd(scores: ObdScores, file: str | Path) -> None:
    """FFN neurons sorted within each layer; KV groups; and how the layers compare."""
    layers = len(scores.ffn)
    ranked = [np.sort(np.asarray(layer))[::-1] for layer in scores.ffn]
    columns = np.stack(
        [[part.mean() for part in np.array_split(layer, min(PERCENTILES, len(layer)))] for layer in ranked]
    )
    relative = columns / columns.max(axis=1, keepdims=True)
    groups = np.asarray(scores.kv)
    share = groups / groups.sum(axis=1, keepdims=True)

    figure, (left, middle, right) = _axes(layers, widths=(3, 1, 1))
    image = left.imshow(
        np.log10(np.maximum(relative, 1e-4)), aspect="auto", cmap="viridis", extent=(0, 100, layers - 0.5, -0.5)
    )
    left.set(title="FFN neurons, most important first", xlabel="neurons of the layer (%)", ylabel="layer")
    figure.colorbar(image, ax=left, label="log10 of score / layer's largest", pad=0.02)
    image = middle.imshow(share, aspect="auto", cmap="viridis", vmin=0)
    middle.set(title="KV groups", xlabel="group", xticks=range(groups.shape[1]))
    figure.colorbar(image, ax=middle, label="share of the layer's sum", pad=0.05)
    right.barh(range(layers), [np.linalg.norm(layer) for layer in ranked], color=GENERATION, height=0.7)
    right.set(title="whole FFN", xlabel="root sum of squared scores", ylim=(layers - 0.5, -0.5))
    for axis in (left, middle, right):
        _label_layers(axis, layers)
    figure.suptitle(f"What a layer's output loses without each unit: {scores.task}")
    _write(figure, file)


def draw_comparison(shares: list[LayerShares], file: str | Path) -> None:
    """Per layer, the top half of its neurons for generation and for understanding, and their overlap."""
    layers = np.arange(len(shares))
    parts = (
        ("generation only", GENERATION, np.array([s.generation_only for s in shares])),
        ("both", SHARED, np.array([s.shared for s in shares])),
        ("understanding only", UNDERSTANDING, np.array([s.understanding_only for s in shares])),
    )
    figure, (axis,) = _axes(len(shares), widths=(1,), width=8)
    start = -(parts[0][2] + parts[1][2] / 2)  # the shared part is centred
    for label, colour, values in parts:
        axis.barh(layers, values, left=start, color=colour, label=label, height=0.8)
        for layer, value in zip(layers, values, strict=True):
            if value >= 3:
                centred: dict[str, Any] = {"ha": "center", "va": "center"}
                axis.text(start[layer] + value / 2, float(layer), f"{value:.0f}", color="white", size=8, **centred)
        start = start + values
    axis.set(xlabel="neurons of the layer (%)", ylabel="layer", ylim=(len(shares) - 0.5, -0.5))
    reach = 1.04 * start.max()
    axis.set_xlim(-reach, reach)
    axis.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)
    _label_layers(axis, len(shares))
    _write(figure, file)


def draw_layers(activations: Activations, file: str | Path) -> None:
    """Layer importance over steps, and which layers would be skipped."""
    layers, steps = activations.layers, activations.steps
    figure, (left, right) = _axes(layers, widths=(1, 1))
    extent = (0.5, steps + 0.5, layers - 0.5, -0.5)
    changed = 1 - np.asarray(activations.input_output).T
    image = left.imshow(changed, aspect="auto", cmap="viridis", extent=extent, vmin=0)
    left.set(title="importance: 1 − similarity of input and output", xlabel="step", ylabel="layer")
    figure.colorbar(image, ax=left, pad=0.02)
    image = right.imshow(np.asarray(activations.skipped).T, aspect="auto", cmap="Blues", extent=extent, vmin=0, vmax=1)
    right.set(title=f"would be skipped at r_LS = {activations.skip_ratio:g}", xlabel="step")
    figure.colorbar(image, ax=right, label="share of prompts", pad=0.02)
    for axis in (left, right):
        _label_layers(axis, layers)
    _write(figure, file)


def draw_similarities(activations: Activations, file: str | Path) -> None:
    """Similarity between depths, and of each depth from one step to the next."""
    states, steps = activations.layers + 1, activations.steps
    figure, (left, right) = _axes(states, widths=(1, 1))
    image = left.imshow(activations.inter_layer, cmap="viridis", aspect="auto")
    left.set(
        title="between depths, averaged over steps", xlabel="state (0: input; i: after layer i − 1)", ylabel="state"
    )
    left.set_xticks(range(0, states, max(1, states // 10)))
    figure.colorbar(image, ax=left, label="cosine", pad=0.02)
    extent = (1.5, steps + 0.5, states - 0.5, -0.5)
    image = right.imshow(np.asarray(activations.across_steps).T, cmap="viridis", aspect="auto", extent=extent)
    right.set(title="with the step before", xlabel="step")
    figure.colorbar(image, ax=right, label="cosine", pad=0.02)
    for axis in (left, right):
        _label_layers(axis, states)
    _write(figure, file)


def draw_head_drift(activations: Activations, file: str | Path) -> None:
    """How far the head's output is from what it was some steps ago."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = np.arange(1, activations.steps + 1)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(activations.head_drift)))
    for lag, (drift, colour) in enumerate(zip(activations.head_drift, colours, strict=True), start=1):
        axis.plot(steps[lag:], drift[lag:], color=colour, label=f"{lag}")
    axis.set(title="Drift of the head's output", xlabel="step", ylabel="‖h − h before‖ / ‖h‖", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(title="steps ago", frameon=False, ncol=2)
    _write(figure, file)


def _axes(rows: int, widths: tuple[int, ...], width: float = 13) -> tuple[Figure, list[Axes]]:
    """Axes side by side, tall enough that each of `rows` layers can be told apart."""
    height = max(4.0, 1.5 + 0.24 * rows)
    figure, axes = plt.subplots(
        1, len(widths), figsize=(width, height), width_ratios=widths, layout="constrained", squeeze=False
    )
    return figure, list(axes[0])


def _label_layers(axis: Axes, layers: int) -> None:
    axis.set_yticks(range(0, layers, 1 if layers <= 40 else 5))
    axis.tick_params(axis="y", labelsize=8)


def _write(figure: Figure, file: str | Path) -> None:
    figure.savefig(file, dpi=130)
    plt.close(figure)
