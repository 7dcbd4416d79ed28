"""Times of a grid, embedded; and what the network takes from them, for all steps at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class TimestepEmbedder(nn.Module):
    FREQUENCIES = 256
    MAX_PERIOD = 10_000

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Times (steps,) in [0, 1] to (steps, hidden): sinusoids of t itself, cosines first, then an MLP."""
        half = self.FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(self.MAX_PERIOD) * exponents)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(next(self.mlp.parameters()).dtype))


@dataclass
class Times:
    """What the network takes from a time grid; the first dimension of each tensor is the step."""

    token: Tensor  # (steps, llm hidden): first token of the span
    blocks: Tensor  # (steps, blocks, 6, head hidden): modulations of diffusion_head_a
    final: Tensor  # (steps, 2, head hidden): modulation of diffusion_head_b

    def at(self, step: int) -> Times:
        return Times(self.token[step], self.blocks[step], self.final[step])
