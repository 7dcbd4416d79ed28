"""Visual-token pruning (FlashU, for understanding): image tokens that carry little are dropped in mid-network.

In one layer, an image's tokens are ranked by the L2 norm of their value vectors. The lowest share does not enter the
layers after it, neither as queries nor as keys and values.
"""

from __future__ import annotations

from torch import Tensor


def kept_tokens(tokens: int, share: float) -> int:
    """How many of an image's tokens are left when a share is dropped; never none."""
    return max(tokens - int(tokens * share), 1)


def most_valued(values: Tensor, count: int) -> Tensor:
    """The places of the `count` tokens with the largest value vectors, ascending: (images, count).

    `values` (images, kv_heads, tokens, head_dim); a token's vector is that of all heads together.
    """
    norms = values.float().square().sum(dim=(1, 3))
    return norms.topk(count, dim=1).indices.sort(dim=1).values
