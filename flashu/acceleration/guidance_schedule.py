"""Guidance schedule (FlashU §3.6, Eq. 6): a guidance scale that is piecewise constant over the steps."""

from __future__ import annotations

from collections.abc import Iterable


def is_guided(scale: float) -> bool:
    """Whether a scale needs unconditional rows: at 0 there are none by convention, at 1 they cancel out."""
    return scale not in (0, 1)


def scale_at(step: int, schedule: Iterable[tuple[int, float]] | None, default: float) -> float:
    """The scale of a step (counted from 1) under (steps, scale) phases; `default` without them or past the last."""
    for steps, scale in schedule or ():
        step -= steps
        if step <= 0:
            return scale
    return default
