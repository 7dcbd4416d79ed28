"""Show-o2's language model: a Qwen2.5 decoder that is run over prefixes and image spans, or rows of questions.

Parameter names are those of a Hugging Face `Qwen2ForCausalLM`. It never sees token ids while generating: the
caller embeds the text, and puts the image's own embeddings into the span. A `Subnetwork` says how much of it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu.models.attention import Halves, KeyValue, KeyValueCache
from flashu.models.geometry import LlmGeometry
from flashu.models.layers import Attention, GatedMlp, Rotary, Span, embedding


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

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What of it is decided before a batch is run."""
        return self.neurons, self.kv_heads, self.running_rows is not None

    @property
    def parts_rows(self) -> bool:
        """Whether some layer runs some of the rows, neither all nor none."""
        return any(rows is not None and len(rows) > 0 for rows in self.running_rows or ())


WHOLE = Subnetwork()


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


def measured_layer(layer: DecoderLayer, x: Tensor, valid: Tensor, *others: Any) -> tuple[Tensor, KeyValue, Tensor]:
    """A layer's call, and the `summed_similarity` of its input and output, (rows,)."""
    out, own = layer(x, *others)
    return out, own, summed_similarity(x, out, valid)


def summed_similarity(before: Tensor, after: Tensor, valid: Tensor) -> Tensor:
    """Cosine similarity, summed over the positions that are `valid` (rows, positions); float32, (rows,)."""
    similarity = F.cosine_similarity(before.float(), after.float(), dim=-1)
    return similarity.masked_fill(~valid, 0).sum(dim=1)


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
        subnetwork: Subnetwork = WHOLE,
        layers: range | None = None,
        run_layer: Callable[..., tuple[Tensor, Any]] = DecoderLayer.__call__,
    ) -> tuple[Tensor, list[Any]]:
        """Run embeddings (rows, positions, hidden) through the layers and the final norm.

        See `layers.Attention.forward` for `prefix` (one entry a layer, made by the same subnetwork) and `mask`.
        `layers` runs those only; the final norm follows the last of all. `run_layer` is how a layer is called:
        compiled, for instance; it may write its output over its input.
        Returns the normed output and each layer's keys and values, of the rows that ran it, or what else `run_layer`
        returns in their place; None where none did.
        """
        layers = range(len(self.layers)) if layers is None else layers
        stream, seen = _Stream(x, rotary, mask), list[Any]()
        for index in layers:
            rows, own = subnetwork.rows_through(index), None
            if rows is None or len(rows):
                past = prefix[index] if prefix else None
                x, rotary, mask = stream.of(rows)
                part = (subnetwork.kv_heads, subnetwork.neurons_of(index))
                x, own = run_layer(self.layers[index], x, rotary, past, mask, None, *part)
                stream.go_on(x)
            seen.append(own)
        x, _, _ = stream.of(None)
        return (self.norm(x) if len(self.layers) - 1 in layers else x), seen

    def measure(
        self,
        x: Tensor,
        rotary: Rotary,
        valid: Tensor,
        prefix: Sequence[KeyValue] | None = None,
        mask: Tensor | None = None,
        tail: Tensor | None = None,
        subnetwork: Subnetwork = WHOLE,
        run_layer: Callable[..., tuple[Tensor, Any, Tensor]] = measured_layer,
    ) -> tuple[Tensor, list[Any], Tensor]:
        """`forward` where all rows run every layer, and each layer's `summed_similarity`, (rows, layers).

        The last one's output is what the final norm leaves. See `layers.Attention.forward` for `tail`.
        """
        seen, similarities = list[Any](), list[Tensor]()
        before = x
        for index, layer in enumerate(self.layers):
            past = prefix[index] if prefix else None
            if index == len(self.layers) - 1:
                before = x.clone()
            part = (subnetwork.kv_heads, subnetwork.neurons_of(index))
            x, own, similarity = run_layer(layer, x, valid, rotary, past, mask, tail, *part)
            seen.append(own)
            similarities.append(similarity)
        x = self.norm(x)
        similarities[-1] = summed_similarity(before, x, valid)  # here, as another call would be compiled apart
        return x, seen, torch.stack(similarities, dim=1)


class _Stream:
    """What passes through the layers: all rows or, where layers run some of them only, those apart.

    They are taken out where such layers begin and put back where those of other rows do; never into what was given.
    """

    def __init__(self, x: Tensor, rotary: Rotary, mask: Tensor | None):
        self._given = self._all = self._x = x
        self._rows: Tensor | None = None  # which ones `_x` are; None for all
        self._seen_by = {id(None): (rotary, mask)}  # by which rows

    def of(self, rows: Tensor | None) -> tuple[Tensor, Rotary, Tensor | None]:
        """What some rows, or all, have come to, with their rotation and mask. One set is always the same tensor."""
        if rows is not self._rows:
            self._put_back()
            self._x, self._rows = self._all if rows is None else self._all[rows], rows
        if id(rows) not in self._seen_by:
            assert rows is not None
            rotary, mask = self._seen_by[id(None)]
            if mask is not None:  # of all rows, or of half of them
                mask = mask[rows.chunk(len(self._all) // len(mask))[0]]
            self._seen_by[id(rows)] = rotary.select(rows), mask
        return self._x, *self._seen_by[id(rows)]

    def go_on(self, x: Tensor) -> None:
        """What a layer made of the rows that it was given last."""
        self._x = x

    def _put_back(self) -> None:
        if self._rows is None:
            self._all = self._x
        elif self._all is self._given:
            self._all = self._all.index_copy(0, self._rows, self._x)
        else:
            self._all.index_copy_(0, self._rows, self._x)


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
