"""Show-o2's language model: a Qwen2.5 decoder that is run over prefixes and image spans.

Parameter names are those of a Hugging Face `Qwen2ForCausalLM`. It never sees token ids while generating: the
caller embeds the text, and puts the image's own embeddings into the span.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flashu.models.geometry import LlmGeometry
from flashu.models.layers import Attention, GatedMlp, KeyValue, Rotary


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
        self, x: Tensor, rotary: Rotary, prefix: KeyValue | None, mask: Tensor | None
    ) -> tuple[Tensor, KeyValue]:
        attended, own = self.self_attn(self.input_layernorm(x), rotary, prefix, mask)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), own


class Qwen2Model(nn.Module):
    def __init__(self, geometry: LlmGeometry, vocab_size: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, geometry.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(geometry) for _ in range(geometry.num_hidden_layers))
        self.norm = nn.RMSNorm(geometry.hidden_size, eps=geometry.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, prefix: Sequence[KeyValue] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run embeddings (rows, positions, hidden) through every layer and the final norm.

        See `layers.Attention.forward` for `prefix` (one entry a layer) and `mask`.
        Returns the normed output and each layer's keys and values.
        """
        seen = []
        for index, layer in enumerate(self.layers):
            x, own = layer(x, rotary, prefix[index] if prefix else None, mask)
            seen.append(own)
        return self.norm(x), seen


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
