"""Attention pruning (FlashU §3.2): whole KV groups are left out, on every step.

A group is a key-value head with the query heads that share it. As with FFN neurons, groups are put in order of
importance in place, biases with them, and a leading slice runs.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

from flashu.models.layers import Attention


def kept_groups(kv_heads: int, ratio: float) -> int:
    """How many KV groups a ratio keeps; never none."""
    return max(kv_heads - int(kv_heads * ratio), 1)


def group_scores(scores: Tensor, kv_heads: int) -> Tensor:
    """Scores of o_proj's inputs (heads · head_dim,) to scores of KV groups (kv_heads,)."""
    return reduce(scores, "(groups width) -> groups", "sum", groups=kv_heads)


@torch.no_grad()
def reorder(attention: Attention, order: Tensor) -> None:
    """Put the KV groups in `order`, in place. `reorder(attention, order.argsort())` undoes it bit for bit."""
    groups = len(order)
    order = order.to(attention.q_proj.weight.device)
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        for parameter in (linear.weight, linear.bias):
            if parameter is not None:
                by_group = rearrange(parameter, "(groups width) ... -> groups width ...", groups=groups)
                parameter.data = rearrange(by_group[order], "groups width ... -> (groups width) ...")
    weight = attention.o_proj.weight
    by_group = rearrange(weight, "hidden (groups width) -> hidden groups width", groups=groups)
    weight.data = rearrange(by_group[:, order], "hidden groups width -> hidden (groups width)")
    attention.join_again_if_moved()
