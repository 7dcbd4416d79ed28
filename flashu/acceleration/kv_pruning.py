"""Attention pruning (FlashU §3.2): whole KV groups are left out, on every step.

A group is a key-value head with the query heads that share it. As with FFN neurons, groups are put in order of
importance in place, biases with them, and a leading slice runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashu.models.layers import Attention


def kept_groups(kv_heads: int, ratio: float) -> int:
    """How many KV groups a ratio keeps; never none."""
    return max(kv_heads - int(kv_heads * ratio), 1)


def group_scores(scores: Tensor, kv_heads: int) -> Tensor:
    """Scores of o_proj's inputs (heads · head_dim,) to scores of KV groups (kv_heads,)."""
    return scores.reshape(kv_heads, -1).sum(dim=1)


@torch.no_grad()
def reorder(attention: Attention, order: Tensor) -> None:
    """Put the KV groups in `order`, in place. `reorder(attention, order.argsort())` undoes it bit for bit."""
    groups = len(order)
    order = order.to(attention.q_proj.weight.device)
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        for parameter in (linear.weight, linear.bias):
            if parameter is not None:
                parameter.data = parameter.unflatten(0, (groups, -1))[order].flatten(0, 1)
    weight = attention.o_proj.weight
    weight.data = weight.unflatten(1, (groups, -1))[:, order].flatten(1)
    attention.join_again_if_moved()
