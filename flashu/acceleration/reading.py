"""How much of the LLM runs while it reads images and questions: for a whole answer the same, so no plan by steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashu.models.layers import Span
from flashu.models.qwen2 import Variant


@dataclass(frozen=True)
class Reading:
    """The default is all of it."""

    neurons: tuple[Span, ...] | None = None  # of each layer's FFN; None for all
    layers_left_out: tuple[int, ...] = ()
    drop_after: int | None = None  # the layer after which image tokens are dropped; None for never
    drop_share: float = 0.0

    def variant(self, num_layers: int, device: torch.device) -> Variant:
        if not self.layers_left_out:
            return Variant(self.neurons)
        none = torch.empty(0, dtype=torch.long, device=device)
        rows = tuple(none if layer in self.layers_left_out else None for layer in range(num_layers))
        return Variant(self.neurons, rows=rows)


WHOLE_READING = Reading()
