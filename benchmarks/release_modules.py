"""What `release_shaped.py` assembles beside transformers' models: a batch's rows, embedders, the head, and the configs.

The head's attention is Qwen3's, which has the same norms of queries and keys, with Llama 3's positions. Its modulations
are laid out over whole rows, as the release does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen3Config, SiglipVisionConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from flashu.models.geometry import PATCH_SIZE, HeadGeometry, Showo2Config, VisionGeometry
from flashu.sampler import PromptTokens


@dataclass
class Batch:
    """What a batch's steps share."""

    tokens: Tensor  # (rows, length): conditional rows, then unconditional ones
    spans: Tensor  # (rows, 2): where the image begins, with its time token, and how long it is
    mask: Tensor  # (rows, 1, length, length), added to scores
    grid: tuple[int, int]

    @classmethod
    def of(cls, rows: PromptTokens, device: torch.device, dtype: torch.dtype) -> Batch:
        """All rows at their full length. On `meta`, the spans stay on the CPU, where they can be read."""
        span = 1 + rows.grid[0] * rows.grid[1]
        tokens = [[*before, *[0] * span, *after] for before, after in zip(rows.prefixes, rows.suffixes, strict=True)]
        length = len(tokens[0])
        seen = torch.ones(len(tokens), 1, length, length, dtype=torch.bool, device=device).tril()
        for row, before in enumerate(rows.prefixes):
            start = len(before)
            seen[row, :, start : start + span, start : start + span] = True
        return cls(
            tokens=torch.tensor(tokens, device=device),
            spans=torch.tensor(
                [[len(before), span] for before in rows.prefixes], device=None if device.type == "meta" else device
            ),
            mask=torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min),
            grid=rows.grid,
        )


class PatchEmbed(nn.Module):
    """A convolution, whose channels stay first in memory."""

    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, PATCH_SIZE, stride=PATCH_SIZE)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


class HeadBlock(nn.Module):
    """Stock attention and FFN, steered by time over the image and by nothing over the text."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=1e-5)
        self.self_attn = Qwen3Attention(config, layer_idx=0)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=1e-5)
        self.mlp = Qwen3MLP(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def forward(self, x: Tensor, time: Tensor, batch: Batch, rotary: tuple[Tensor, Tensor]) -> Tensor:
        modulations = self.adaLN_modulation(time).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = spread(
            modulations, (0, 0, 1, 0, 0, 1), x, batch.spans
        )
        attended, _ = self.self_attn(
            modulate(self.input_layernorm(x), shift_attn, scale_attn), rotary, attention_mask=batch.mask
        )
        x = x + gate_attn * attended
        return x + gate_mlp * self.mlp(modulate(self.post_attention_layernorm(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm_final = Qwen2RMSNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, time: Tensor, spans: Tensor) -> Tensor:
        shift, scale = spread(self.adaLN_modulation(time).chunk(2, dim=1), (0, 0), x, spans)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def spread(modulations: Sequence[Tensor], elsewhere: Sequence[int], x: Tensor, spans: Tensor) -> list[Tensor]:
    """Each modulation (rows, hidden) over its row's image, and a neutral value elsewhere; each shaped like `x`."""
    wide = [torch.full_like(x, value) for value in elsewhere]
    for row, (start, length) in enumerate(spans):
        for everywhere, modulation in zip(wide, modulations, strict=True):
            everywhere[row, start : start + length] = modulation[row]
    return wide


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * (1 + scale.float()) + shift.float()).to(x.dtype)


def llm_config(config: Showo2Config, intermediate_size: int | None = None) -> Qwen2Config:
    g = config.llm
    return Qwen2Config(
        vocab_size=config.llm_vocab_size,
        hidden_size=g.hidden_size,
        intermediate_size=intermediate_size or g.intermediate_size,
        num_hidden_layers=g.num_hidden_layers,
        num_attention_heads=g.num_attention_heads,
        num_key_value_heads=g.num_key_value_heads,
        rms_norm_eps=g.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": g.rope_theta},
        tie_word_embeddings=g.tie_word_embeddings,
        attn_implementation="sdpa",
    )


def vision_config(geometry: VisionGeometry) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_hidden_layers=geometry.num_hidden_layers,
        num_attention_heads=geometry.num_attention_heads,
        layer_norm_eps=geometry.layer_norm_eps,
        attn_implementation="sdpa",
    )


def head_config(geometry: HeadGeometry) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=geometry.num_attention_heads,
        num_key_value_heads=geometry.num_key_value_heads,
        head_dim=geometry.head_dim,
        rms_norm_eps=1e-6,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        max_position_embeddings=131_072,
        attn_implementation="sdpa",
    )
