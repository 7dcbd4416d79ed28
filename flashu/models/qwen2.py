"""Show-o2's language model: a Qwen2.5 decoder that is run over prefixes and image spans, or rows of questions.

Parameter names are those of a Hugging Face `Qwen2ForCausalLM`. It never sees token ids while generating: the
caller embeds the text, and puts the image's own embeddings into the span. A `Subnetwork` says how much of it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu.models.attention import Halves, KeyValue, KeyValueCache
from flashu.models.geometry import LlmGeometry
from flashu.models.layers import Attention, GatedMlp, Rotary, Span, embedding

Observer = Callable[[int, Tensor, Tensor], None]  # layer number, its input, its output: (rows, positions, hidden) each


@dataclass(frozen=True, eq=False)  # as its tensors are not compared
class Subnetwork:
    """How much of the LLM runs. The default is all of it."""

    neurons: tuple[Span, ...] | None = None  # of each layer's FFN; None for all
    kv_heads: int | None = None  # leading key-value heads of every attention
    running_rows: tuple[Tensor | None, ...] | None = None  # per layer, the rows that run it; None for all of them

    def rows_through(self, layer: int) -> Tensor | None:
        return self.running_rows[layer] if self.running_rows else None

    def neurons_of(self, layer: int) -> Span | None:
        return self.neurons[layer] if self.neurons else None


WHOLE = Subnetwork()


class SimilaritySum:
    """An observer that adds up each layer's cosine similarity of input and output, over the positions that count."""

    def __init__(self, valid: Tensor):
        """`valid` (rows, positions): which positions count."""
        self.valid = valid
        self._layers: list[Tensor] = []

    def __call__(self, layer: int, before: Tensor, after: Tensor) -> None:
        similarity = F.cosine_similarity(before.float(), after.float(), dim=-1)
        self._layers.append(similarity.masked_fill(~self.valid, 0).sum(dim=1))

    def total(self) -> Tensor:
        """(rows, layers), float32."""
        return torch.stack(self._layers, dim=1)


class DecoderLayer(nn.Module):
    def __init__(self, geometry: LlmGeometry):
        super().__init__()
        g = geometry
        self.input_layernorm = nn.RMSNorm(g.hidden_size, eps=g.rms_norm_eps)
        self.self_attn = Attention(
            g.hidden_size, g.num_attention_heads, g.num_key_value_heads, g.head_dim, qkv_bias=True, qk_norm=False
        )
        self.post_attention_layernorm = nn.RMSNorm(g.hidden_size, eps=g.rms_norm_eps)
        self.mlp = GatedMlp(g.hidden_size, g.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        prefix: KeyValue | Halves | KeyValueCache | None,
        mask: Tensor | None,
        tail: Tensor | None,
        kv_heads: int | None = None,
        neurons: Span | None = None,
    ) -> tuple[Tensor, KeyValue]:
        attended, own = self.self_attn(self.input_layernorm(x), rotary, prefix, mask, tail, kv_heads)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), neurons), own


class Qwen2Model(nn.Module):
    layers: Sequence[DecoderLayer]

    def __init__(self, geometry: LlmGeometry, vocab_size: int):
        super().__init__()
        self.embed_tokens = embedding(vocab_size, geometry.hidden_size)
        layers = nn.ModuleList(DecoderLayer(geometry) for _ in range(geometry.num_hidden_layers))
        self.layers = cast("Sequence[DecoderLayer]", layers)
        self.norm = nn.RMSNorm(geometry.hidden_size, eps=geometry.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        prefix: Sequence[KeyValue | Halves | KeyValueCache | None] | None = None,
        mask: Tensor | None = None,
        tail: Tensor | None = None,
        subnetwork: Subnetwork = WHOLE,
        observe: Observer | None = None,
        layers: range | None = None,
        run_layer: Callable[..., tuple[Tensor, KeyValue]] = DecoderLayer.__call__,
    ) -> tuple[Tensor, list[KeyValue | None]]:
        """Run embeddings (rows, positions, hidden) through the layers and the final norm.

        See `layers.Attention.forward` for `prefix` (one entry a layer, made by the same subnetwork), `mask` and `tail`,
        which needs all rows. `observe` is shown every layer that all rows run; the last one's output as the final norm
        leaves it. `layers` runs those only; the final norm follows the last of all. `run_layer` is how a layer is
        called: compiled, for instance.
        Returns the normed output and each layer's keys and values, of the rows that ran it.
        """
        seen: list[KeyValue | None] = []
        for index in range(len(self.layers)) if layers is None else layers:
            layer, before, rows, own = self.layers[index], x, subnetwork.rows_through(index), None
            past = prefix[index] if prefix else None
            part = (subnetwork.kv_heads, subnetwork.neurons_of(index))
            if rows is None:
                x, own = run_layer(layer, x, rotary, past, mask, tail, *part)
            elif len(rows):
                masked = None if mask is None else mask[rows.chunk(len(x) // len(mask))[0]]  # all rows, or half of them
                some, own = run_layer(layer, x[rows], rotary.select(rows), past, masked, None, *part)
                x = x.index_copy(0, rows, some)
            seen.append(own)
            if index == len(self.layers) - 1:
                x = self.norm(x)
            if observe and rows is None:
                observe(index, before, x)
        return x, seen


class Qwen2ForCausalLM(nn.Module):
    """The decoder and its output head. Generating images never calls `lm_head`."""

    def __init__(self, geometry: LlmGeometry, vocab_size: int):
        super().__init__()
        self.model = Qwen2Model(geometry, vocab_size)
        self.lm_head = nn.Linear(geometry.hidden_size, vocab_size, bias=False)
        self.tied = geometry.tie_word_embeddings
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make `lm_head` share the embedding's weight, where the checkpoint has it so."""
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
