"""How far two tasks rely on the same FFN neurons (FlashU §3.1, Figure 1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from flashu.analysis.obd import ObdScores
from flashu.errors import InputError


@dataclass
class LayerShares:
    """Shares of one layer's neurons that are among the more important half of them, in percent."""

    layer: int
    generation_only: float
    shared: float
    understanding_only: float


def compare(generation: ObdScores, understanding: ObdScores) -> list[LayerShares]:
    """Per layer, which of its neurons are in the top half for one task, the other, or both.

    Raises `InputError` for scores of the wrong task or of two different models.
    """
    for scores, task in ((generation, "generation"), (understanding, "understanding")):
        if scores.task != task:
            raise InputError(f"expected scores for {task}, got scores for {scores.task}")
    if generation.fingerprint != understanding.fingerprint:
        raise InputError("the two scores were measured on different models; measure both on one")
    result = []
    for layer, (first, second) in enumerate(zip(generation.ffn, understanding.ffn, strict=True)):
        half = len(first) // 2
        top, other = (set(torch.tensor(scores).topk(half).indices.tolist()) for scores in (first, second))
        shared = len(top & other)
        percent = 100 / len(first)
        result.append(LayerShares(layer, (half - shared) * percent, shared * percent, (half - shared) * percent))
    return result


def save(shares: list[LayerShares], file: str | Path) -> None:
    """Write the shares as JSON, a list with one object per layer."""
    Path(file).write_text(json.dumps([vars(layer) for layer in shares], indent=2) + "\n", encoding="utf-8")
