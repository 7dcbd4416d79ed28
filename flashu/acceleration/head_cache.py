"""Diffusion-head cache (FlashU §3.4): between two stores, the head's last stored output stands in for the head.

Only `diffusion_head_b` runs on a reuse step, with that step's own time, so the LLM is not needed there either.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum


class Head(str, Enum):
    """What a step does about `diffusion_head_a`."""

    COMPUTE = "compute"
    STORE = "store"  # compute, and keep the output
    REUSE = "reuse"


def actions(full: Sequence[bool], interval: int | None, guided: Sequence[bool] | None = None) -> list[Head]:
    """One action a step; `full[i]` tells whether step i + 1 is full, `guided[i]` whether it runs unconditional rows.

    A step whose number is a multiple of `interval` stores; others reuse what is stored. A full step never reuses and
    drops the store. A guided step reuses only what a guided one stored: the other kind's lacks rows. Without `guided`,
    all steps run the same rows. Nothing is stored that no later step reuses.
    """
    guided = guided or [True] * len(full)
    result = []
    stored_at: int | None = None
    for index, is_full in enumerate(full):
        result.append(Head.COMPUTE)
        if is_full or interval is None:
            stored_at = None
        elif (index + 1) % interval == 0:
            stored_at = index
        elif stored_at is not None and guided[stored_at] >= guided[index]:
            result[stored_at] = Head.STORE
            result[index] = Head.REUSE
        else:
            stored_at = None
    return result
