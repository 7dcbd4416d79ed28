"""The building blocks that the LLM and the diffusion head share: rotary tables, attention, gated FFN.

Attention here runs in two ways. Over a *prefix* it is causal and hands back its keys and values; over the image
*span* every position sees the whole prefix and the whole span. Nothing here knows of images or of time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValue(NamedTuple):
    """Keys (already rotated) and values of some positions, each (rows, kv_heads, positions, head_dim)."""

    key: Tensor
    value: Tensor


class Rotary(NamedTuple):
    """Cosines and sines of the positions being run, each (rows or 1, 1, positions, head_dim)."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate (rows, heads, positions, head_dim), halves paired as in Qwen2 and Llama."""
        low, high = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-high, low), dim=-1) * self.sin


def rotary_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair, (head_dim / 2,), float32."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def llama3_scaled(
    frequencies: Tensor, factor: float = 32.0, low: float = 1.0, high: float = 4.0, original_length: int = 8192
) -> Tensor:
    """Llama 3's long-context scaling: slow pairs are slowed by `factor`, fast ones kept, those between blended.

    A pair is slow when its wavelength is over `original_length / low` positions, fast under `original_length / high`.
    """
    wavelength = 2 * math.pi / frequencies
    blend = ((original_length / wavelength - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor)


def rotary_table(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """The rotation for `positions` (rows or 1, positions); angles in float32, table in `dtype`."""
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; optional q/k/v biases and per-head q/k norms."""

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, head_dim: int, *, qkv_bias: bool, qk_norm: bool):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def key_value(self, x: Tensor, rotary: Rotary) -> KeyValue:
        """The keys and values of `x` (rows, positions, hidden) alone."""
        key, value = (self._heads(projection(x)) for projection in (self.k_proj, self.v_proj))
        return KeyValue(rotary(self.k_norm(key)), value)

    def forward(
        self, x: Tensor, rotary: Rotary, prefix: KeyValue | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attend from `x` (rows, positions, hidden).

        Without `prefix`, causally within `x`. With it, from every position of `x` to the prefix and to all of `x`;
        `mask` (rows, 1, 1, prefix + positions), true where a key may be seen, hides the prefix's padding.
        Returns the output, shaped like `x`, and the keys and values of `x`.
        """
        query = rotary(self.q_norm(self._heads(self.q_proj(x))))
        own = self.key_value(x, rotary)
        key, value = own
        if prefix is not None:
            key = torch.cat((prefix.key, key), dim=2)
            value = torch.cat((prefix.value, value), dim=2)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=prefix is None, enable_gqa=query.shape[1] != key.shape[1]
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), own

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GatedMlp(nn.Module):
    """The SiLU-gated FFN, without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
