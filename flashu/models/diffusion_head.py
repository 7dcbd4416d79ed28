"""The diffusion head: attention blocks steered by time (adaLN), then one linear layer to a velocity.

Time steers image positions only, so a prefix runs through the same blocks unmodulated. All images of a batch are
at the same time, so the modulations carry no batch dimension, and those of a whole time grid are made in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from flashu.models.attention import Halves, KeyValue
from flashu.models.geometry import HeadGeometry
from flashu.models.layers import Attention, GatedMlp, Rotary, llama3_scaled, rotary_frequencies

ROPE_THETA = 500_000.0


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, in float32; `shift` and `scale` are (hidden,)."""
    return (x.float() * (1 + scale.float()) + shift.float()).to(x.dtype)


class ModulatedAttentionBlock(nn.Module):
    def __init__(self, geometry: HeadGeometry):
        super().__init__()
        g = geometry
        self.input_layernorm = nn.RMSNorm(g.hidden_size, eps=1e-5)
        self.self_attn = Attention(
            g.hidden_size, g.num_attention_heads, g.num_key_value_heads, g.head_dim, qkv_bias=False, qk_norm=True
        )
        self.post_attention_layernorm = nn.RMSNorm(g.hidden_size, eps=1e-5)
        self.mlp = GatedMlp(g.hidden_size, g.intermediate_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(g.hidden_size, 6 * g.hidden_size))

    def forward(
        self, x: Tensor, rotary: Rotary, modulation: Tensor, prefix: KeyValue | Halves, mask: Tensor | None
    ) -> Tensor:
        """Run the image span (rows, span, hidden) under `modulation` (6, hidden)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        attended, _ = self.self_attn(modulate(self.input_layernorm(x), shift_attn, scale_attn), rotary, prefix, mask)
        x = x + gate_attn * attended
        return x + gate_mlp * self.mlp(modulate(self.post_attention_layernorm(x), shift_mlp, scale_mlp))

    def forward_prefix(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, KeyValue]:
        """Run text (rows, prefix, hidden), causally and unmodulated."""
        attended, own = self.self_attn(self.input_layernorm(x), rotary)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), own


def run_text(block: ModulatedAttentionBlock, x: Tensor, rotary: Rotary) -> tuple[Tensor, KeyValue]:
    """`ModulatedAttentionBlock.forward_prefix`, as a function."""
    return block.forward_prefix(x, rotary)


class DiffusionHead(nn.ModuleList):
    """`diffusion_head_a`: the blocks, as the list that names their parameters."""

    def __init__(self, geometry: HeadGeometry, num_layers: int):
        super().__init__(ModulatedAttentionBlock(geometry) for _ in range(num_layers))
        self.head_dim = geometry.head_dim

    def __iter__(self) -> Iterator[ModulatedAttentionBlock]:
        return cast("Iterator[ModulatedAttentionBlock]", super().__iter__())

    def rotary_frequencies(self, device: torch.device) -> Tensor:
        return llama3_scaled(rotary_frequencies(self.head_dim, ROPE_THETA, device))

    def modulations(self, time_embeds: Tensor) -> Tensor:
        """(steps, hidden) time embeddings to every block's modulation, (steps, blocks, 6, hidden)."""
        made = torch.stack([block.adaLN_modulation(time_embeds) for block in self], dim=1)
        return rearrange(made, "steps blocks (six hidden) -> steps blocks six hidden", six=6)

    def encode_prefix(
        self,
        x: Tensor,
        rotary: Rotary,
        run_block: Callable[..., tuple[Tensor, KeyValue]] = run_text,
    ) -> list[KeyValue]:
        """Each block's keys and values of the text (rows, prefix, hidden). The last block's output is not needed."""
        *blocks, last = self
        seen = []
        for block in blocks:
            x, own = run_block(block, x, rotary)
            seen.append(own)
        seen.append(last.self_attn.key_value(last.input_layernorm(x), rotary))
        return seen

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        modulation: Tensor,
        prefix: Sequence[KeyValue | Halves],
        mask: Tensor | None,
        run_block: Callable[..., Tensor] = ModulatedAttentionBlock.__call__,
    ) -> Tensor:
        """Run the image span (rows, span, hidden) under one step's `modulation` (blocks, 6, hidden)."""
        for index, block in enumerate(self):
            x = run_block(block, x, rotary, modulation[index], prefix[index], mask)
        return x


class FinalLayer(nn.Module):
    """`diffusion_head_b`: head output to velocity patches, (…, hidden) to (…, patch · patch · channels)."""

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm_final = nn.RMSNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def modulations(self, time_embeds: Tensor) -> Tensor:
        """(steps, hidden) time embeddings to (steps, 2, hidden)."""
        return rearrange(self.adaLN_modulation(time_embeds), "steps (two hidden) -> steps two hidden", two=2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """`modulation` is one step's (2, hidden): shift, scale."""
        return self.linear(modulate(self.norm_final(x), *modulation))
