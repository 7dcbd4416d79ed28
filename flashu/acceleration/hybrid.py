"""Hybrid FFN (FlashU §3.5, Eq. 4): the last steps of a run are made with the whole network."""

from __future__ import annotations


def is_full(step: int, num_inference_steps: int, tau: int) -> bool:
    """Whether step (counted from 1) runs full: whole FFNs, every layer, no stored head output."""
    return step > num_inference_steps - tau
