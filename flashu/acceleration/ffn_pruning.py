"""FFN pruning (FlashU §3.2): FFNs run with the neurons only that matter to what is being done.

Generating and understanding need different neurons. Those of each FFN are put in one order, once, in place, in which
either task's are neighbours:

    generation only | both | understanding only | neither

So a pruned FFN is a slice of the whole one for either task, and no weight is held twice: not for the two tasks, nor for
the hybrid of pruned and whole steps. The order changes no output beyond rounding. (Understanding's slice begins where
generation's own neurons end, at no round number. What that costs on a GPU has not been measured.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashu.acceleration.wanda import importance_order
from flashu.models.layers import Span

MULTIPLE = 64  # of kept neurons, for the matrix units


def kept_neurons(intermediate_size: int, ratio: float) -> int:
    """How many of an FFN's neurons a ratio r_p keeps: as the release rounds it, and never none."""
    kept = intermediate_size - int(intermediate_size * ratio)
    if kept == intermediate_size:
        return kept
    return kept // MULTIPLE * MULTIPLE or min(MULTIPLE, kept)


def shared_order(generation: Tensor, kept: int, understanding: Tensor, kept_understanding: int) -> tuple[Tensor, Span]:
    """The order of an FFN's neurons by each task's scores (neurons,), and the span of understanding's.

    Each task keeps its `kept` highest. Generation's are the leading ones.
    """
    order = importance_order(generation)
    ranks = order.argsort(), importance_order(understanding).argsort()
    generates, understands = ranks[0] < kept, ranks[1] < kept_understanding
    group = torch.where(generates, torch.where(understands, 1, 0), torch.where(understands, 2, 3))
    start = int((group == 0).sum())
    return order[group[order].argsort(stable=True)], (start, start + kept_understanding)
