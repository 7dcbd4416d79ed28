"""FFN pruning (FlashU §3.2): on steps that are not full, each FFN runs with its most important neurons only.

The neurons of each FFN are put in order of importance, once, in place. Then the pruned FFN is a leading slice of the
whole one, and the hybrid of both needs no second copy of any weight. The order changes no output beyond rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashu.models.layers import GatedMlp

MULTIPLE = 64  # of kept neurons, for the matrix units


def kept_neurons(intermediate_size: int, ratio: float) -> int:
    """How many of an FFN's neurons a ratio r_p keeps: as the release rounds it, and never none."""
    kept = intermediate_size - int(intermediate_size * ratio)
    if kept == intermediate_size:
        return kept
    return kept // MULTIPLE * MULTIPLE or min(MULTIPLE, kept)


@torch.no_grad()
def reorder(mlp: GatedMlp, order: Tensor) -> None:
    """Put an FFN's neurons in `order`, in place. `reorder(mlp, order.argsort())` undoes it bit for bit."""
    order = order.to(mlp.gate_proj.weight.device)
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.data = linear.weight[order]
    mlp.down_proj.weight.data = mlp.down_proj.weight[:, order]
