"""The building blocks that the LLM and the diffusion head share: rotary tables, attention's layer, gated FFN.

Nothing here knows of images or of time. What attends to what, and how that is run, is in `attention`.

Heads are split by torch's own methods: einops' share of a small block's call on a CPU was measured at 5 to 9%.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu.models.attention import Halves, KeyValue, KeyValueCache, attend
from flashu.models.joined import Joined

Span = tuple[int, int]  # from the first, up to the one after the last


class Rotary(NamedTuple):
    """Cosines and sines of the positions being run, each (rows or 1, 1, positions, head_dim)."""

    cos: Tensor
    sin: Tensor  # negated in the first half

    def select(self, index: Tensor | slice) -> Rotary:
        """The table of some rows only; one that all rows share stays as it is."""
        return self if self.cos.shape[0] == 1 else Rotary(self.cos[index], self.sin[index])

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate (rows, heads, positions, head_dim), halves paired as in Qwen2 and Llama."""
        low, high = x.chunk(2, dim=-1)
        return torch.addcmul(x * self.cos, torch.cat((high, low), dim=-1), self.sin)


def rotary_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair, (head_dim / 2,), float32."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def llama3_scaled(
    frequencies: Tensor, factor: float = 32.0, low: float = 1.0, high: float = 4.0, original_length: int = 8192
) -> Tensor:
    """Llama 3's long-context scaling: slow pairs are slowed by `factor`, fast ones kept, those between blended.

    A pair is slow when its wavelength is over `original_length / low` positions, fast under `original_length / high`.
    transformers' own differs in the last bit of some pairs, so it would give other pictures.
    """
    wavelength = 2 * math.pi / frequencies
    blend = ((original_length / wavelength - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor)


def rotary_table(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """The rotation for `positions` (rows or 1, positions); angles in float32, table in `dtype`."""
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return Rotary(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def embedding(count: int, hidden_size: int) -> nn.Embedding:
    """An `nn.Embedding` left uninitialised. Its own initialiser imports torch's compiler on `meta`, which takes 2 s."""
    return nn.Embedding.from_pretrained(torch.empty(count, hidden_size), freeze=False)


class Attention(Joined):
    """Grouped-query attention with rotary positions; optional q/k/v biases and per-head q/k norms."""

    layers_joined = ("q_proj", "k_proj", "v_proj")

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, head_dim: int, *, qkv_bias: bool, qk_norm: bool):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def key_value(self, x: Tensor, rotary: Rotary, kv_heads: int | None = None) -> KeyValue:
        """The keys and values of `x` (rows, positions, hidden) alone; of the first `kv_heads` heads, if given."""
        if kv_heads is None:
            key, value = self.project(x, first=1)
            return _own(self._key_value(key, value, rotary))
        width = (0, kv_heads * self.head_dim)
        return self._key_value(sliced(self.k_proj, x, width), sliced(self.v_proj, x, width), rotary)

    def _key_value(self, key: Tensor, value: Tensor, rotary: Rotary) -> KeyValue:
        return KeyValue(rotary(self.k_norm(self._heads(key))), self._heads(value))

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        prefix: KeyValue | Halves | KeyValueCache | None = None,
        mask: Tensor | None = None,
        tail: Tensor | None = None,
        kv_heads: int | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Attend from `x` (rows, positions, hidden).

        Without `prefix` and `mask`, causally within `x`. With `prefix`, from every position of `x` to the prefix and
        to all of `x`. `mask` (rows, 1, 1 or positions, prefix + positions) is true where a key may be seen; beside
        `Halves` it is the first half's, and there is no `tail`.
        `tail` (rows, 1, tail, prefix + positions) says what the last positions of `x` see; the others, and `mask`, then
        know nothing of them.
        `kv_heads` runs only the first key-value heads, with the query heads that belong to them.
        Returns the output, shaped like `x`, and the keys and values of `x`.
        """
        width = None
        if kv_heads is None:
            query, key, value = self.project(x)
            own = self._key_value(key, value, rotary)
        else:
            width = (0, kv_heads * self.q_proj.out_features // self.k_proj.out_features * self.head_dim)
            query, own = sliced(self.q_proj, x, width), self.key_value(x, rotary, kv_heads)
        query = rotary(self.q_norm(self._heads(query)))
        if prefix is None:
            own = _own(own)  # it may be kept
        out = attend(query, own, prefix, mask, tail)
        return sliced(self.o_proj, out.transpose(1, 2).flatten(2), inputs=width), own

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _own(states: KeyValue) -> KeyValue:
    """With values in memory of their own: joined layers make them together with others, which would be kept too."""
    return KeyValue(states.key, states.value.contiguous())


class GatedMlp(Joined):
    """The SiLU-gated FFN, without biases."""

    layers_joined = ("gate_proj", "up_proj")

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, neurons: Span | None = None) -> Tensor:
        """Run the whole FFN, or a span of its neurons."""
        if neurons is None:
            gate, up = self.project(x)
        else:
            gate, up = sliced(self.gate_proj, x, neurons), sliced(self.up_proj, x, neurons)
        return sliced(self.down_proj, F.silu(gate) * up, inputs=neurons)

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Put the neurons in `order`, in place. `reorder(order.argsort())` undoes it bit for bit."""
        order = order.to(self.gate_proj.weight.device)
        for linear in (self.gate_proj, self.up_proj):
            linear.weight.data = linear.weight[order]
        self.down_proj.weight.data = self.down_proj.weight[:, order]
        self.join_again_if_moved()


def sliced(linear: nn.Linear, x: Tensor, outputs: Span | None = None, inputs: Span | None = None) -> Tensor:
    """`linear(x)`, made with a span of its outputs or of its inputs: a view, not a copy of its weight."""
    if outputs is None and inputs is None:
        return linear(x)
    rows, columns = (slice(*span) if span else slice(None) for span in (outputs, inputs))
    bias = None if linear.bias is None else linear.bias[rows]
    return F.linear(x, linear.weight[rows, columns], bias)
