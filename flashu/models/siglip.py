"""The semantic path's encoder: SigLIP's vision layers, without patch embedding, last layer and post-norm.

Parameter names are those of a Hugging Face `SiglipEncoder`. Heads are folded by torch's own methods, as in `layers`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from flashu.models.geometry import VisionGeometry
from flashu.models.joined import Joined


class SelfAttention(Joined):
    layers_joined = ("q_proj", "k_proj", "v_proj")

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (states.unflatten(-1, (self.heads, -1)).transpose(1, 2) for states in self.project(x))
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    def __init__(self, geometry: VisionGeometry):
        super().__init__()
        g = geometry
        self.layer_norm1 = nn.LayerNorm(g.hidden_size, eps=g.layer_norm_eps)
        self.self_attn = SelfAttention(g.hidden_size, g.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(g.hidden_size, eps=g.layer_norm_eps)
        self.mlp = Mlp(g.hidden_size, g.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    def __init__(self, geometry: VisionGeometry):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(geometry) for _ in range(geometry.num_hidden_layers))

    def forward(self, x: Tensor, run_layer: Callable[..., Tensor] = EncoderLayer.__call__) -> Tensor:
        """(images, tokens, hidden) with positions already added, to the same shape; all tokens see all."""
        for layer in self.layers:
            x = run_layer(layer, x)
        return x
