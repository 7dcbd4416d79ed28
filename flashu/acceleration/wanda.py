"""Wanda scores (FlashU §3.2, after arXiv 2306.11695): how much an input of a linear layer matters to its output.

Score of input j: ‖a_j‖₂ · Σ_i |W[i, j]|, with a_j the values that input takes over the calibration tokens. Taken at
`down_proj` it scores FFN neurons, at `o_proj` the dimensions of attention heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flashu.errors import InputError
from flashu.models.qwen2 import Qwen2Model

TASKS = GENERATION, UNDERSTANDING = "generation", "understanding"


@dataclass
class WandaScores:
    """Scores of one model for one task; float32, on the CPU."""

    ffn: list[Tensor]  # per layer, (neurons,)
    attention: list[Tensor]  # per layer, (heads · head_dim,)
    fingerprint: str  # of the model they were measured on
    task: str = GENERATION
    method: str = ""
    layer_importances: Tensor | None = None  # (layers,): how much each changes what passes it; of understanding

    def save(self, file: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {f"layers.{i}.mlp.down_proj": scores for i, scores in enumerate(self.ffn)}
        tensors |= {f"layers.{i}.self_attn.o_proj": scores for i, scores in enumerate(self.attention)}
        if self.layer_importances is not None:
            tensors["layers"] = self.layer_importances
        about = {"fingerprint": self.fingerprint, "task": self.task, "method": self.method}
        save_file(tensors, file, metadata={"flashu": json.dumps(about)})

    @classmethod
    def load(cls, file: str | Path) -> WandaScores:
        """Read a file that `save` wrote. Raises `InputError` when it is not one."""
        try:
            with safe_open(file, framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["flashu"])
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
            importances = tensors.pop("layers", None)
            layers = range(len(tensors) // 2)
            return cls(
                ffn=[tensors[f"layers.{i}.mlp.down_proj"] for i in layers],
                attention=[tensors[f"layers.{i}.self_attn.o_proj"] for i in layers],
                fingerprint=about["fingerprint"],
                task=about["task"],
                method=about["method"],
                layer_importances=importances,
            )
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{file} is not a file of Wanda scores (flashu calibrate makes them): {error}") from None


def importance_order(scores: Tensor) -> Tensor:
    """The numbers of the units that `scores` (units,) belong to, from the most important to the least."""
    return scores.argsort(descending=True, stable=True)


class ActivationNorms:
    """Sums of squares of what enters each layer's `down_proj` and `o_proj`, while `watching`."""

    def __init__(self, llm: Qwen2Model):
        self.llm = llm
        self.squares: dict[nn.Linear, Tensor] = {}

    @contextmanager
    def watching(self, repeats: int = 1) -> Iterator[None]:
        """Count every token that passes, `repeats` times."""

        def add(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            squares = repeats * inputs[0].detach().float().square().flatten(0, -2).sum(dim=0)
            self.squares[linear] = self.squares.get(linear, 0) + squares

        handles = [
            linear.register_forward_pre_hook(add)
            for layer in self.llm.layers
            for linear in (layer.mlp.down_proj, layer.self_attn.o_proj)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def scores(self) -> tuple[list[Tensor], list[Tensor]]:
        """FFN and attention scores, per layer, on the CPU."""
        layers = self.llm.layers
        return (
            [self._score(layer.mlp.down_proj) for layer in layers],
            [self._score(layer.self_attn.o_proj) for layer in layers],
        )

    @torch.no_grad()
    def _score(self, linear: nn.Linear) -> Tensor:
        return (self.squares[linear].sqrt() * linear.weight.float().abs().sum(dim=0)).cpu()
