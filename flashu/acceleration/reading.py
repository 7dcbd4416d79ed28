"""How much of the LLM runs while it reads images and questions: for a whole answer the same, so no plan by steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashu.models.layers import Span
from flashu.models.qwen2 import Subnetwork


@dataclass(frozen=True)
class Reading:
    """The default is all of it.

    Where the layer after which tokens are dropped is itself left out, the last one before it that runs ranks them;
    where none does, the first one after it.
    """

    neurons: tuple[Span, ...] | None = None  # of each layer's FFN; None for all
    layers_left_out: tuple[int, ...] = ()
    drop_after: int | None = None  # the layer after which image tokens are dropped; None for never
    drop_share: float = 0.0

    def whole_layers(self, num_layers: int) -> int:
        """How many layers see every image token; the last of them runs, and ranks the tokens."""
        if self.drop_after is None:
            return num_layers
        before = [layer for layer in range(self.drop_after + 1) if layer not in self.layers_left_out]
        after = [layer for layer in range(self.drop_after + 1, num_layers) if layer not in self.layers_left_out]
        return (before[-1] if before else after[0]) + 1

    def subnetwork(self, num_layers: int, device: torch.device) -> Subnetwork:
        if not self.layers_left_out:
            return Subnetwork(self.neurons)
        none = torch.empty(0, dtype=torch.long, device=device)
        rows = tuple(none if layer in self.layers_left_out else None for layer in range(num_layers))
        return Subnetwork(self.neurons, running_rows=rows)


WHOLE_READING = Reading()
