"""How much a layer's output would change without one FFN neuron, or one KV group (FlashU §3.1, optimal brain damage).

Without neuron j the output loses a_j ⊗ W_down[:, j], whose norm is ‖a_j‖₂ · ‖W_down[:, j]‖₂: one forward gives the
scores of all neurons, exactly, where the release runs one forward for each. A group's loss passes through the FFN, so
groups are taken out one by one; there are few.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flashu import probe, question_rows
from flashu.acceleration.wanda import ActivationNorms
from flashu.checkpoints.files import read_json
from flashu.errors import InputError
from flashu.fingerprint import fingerprint
from flashu.models.qwen2 import DecoderLayer, Qwen2Model
from flashu.models.showo2 import Showo2
from flashu.tokenizer import EncodedQuestion, PromptTokenizer


@dataclass
class ObdScores:
    """L2 norms of the change in each layer's output, over everything that was run."""

    task: str
    ffn: list[list[float]]  # per layer, per neuron
    kv: list[list[float]]  # per layer, per KV group
    fingerprint: str

    def save(self, file: str | Path) -> None:
        Path(file).write_text(json.dumps(vars(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> ObdScores:
        """Read a file that `save` wrote. Raises `InputError` when it is not one."""
        data = read_json(Path(file))
        try:
            return cls(**data)
        except TypeError:
            raise InputError(f"{file} does not hold OBD scores (flashu analyze obd makes them)") from None


class GroupErrors:
    """Squared change of each layer's output without each of its KV groups, while `watching`."""

    def __init__(self, llm: Qwen2Model):
        self.llm = llm
        groups = [layer.self_attn.k_proj.out_features // layer.self_attn.head_dim for layer in llm.layers]
        self.squares = [torch.zeros(count, dtype=torch.float64) for count in groups]

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(self._measure(squares), with_kwargs=True)
            for layer, squares in zip(self.llm.layers, self.squares, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _measure(self, squares: Tensor) -> Callable[..., None]:
        def hook(layer: DecoderLayer, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            for group in range(len(squares)):
                with _without_group(layer, group, len(squares)):
                    changed, _ = layer.forward(*args, **kwargs)
                squares[group] += (output[0].float() - changed.float()).square().sum().double().cpu()

        return hook


@contextmanager
def _without_group(layer: DecoderLayer, group: int, groups: int) -> Iterator[None]:
    """Zero a KV group's share of what enters `o_proj`: with its values at zero, that is all it gives."""

    def zero(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        heads = rearrange(inputs[0], "... (groups width) -> ... groups width", groups=groups).clone()
        heads[..., group, :] = 0
        return (rearrange(heads, "... groups width -> ... (groups width)"),)

    handle = layer.self_attn.o_proj.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def generation(
    model: Showo2,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str] = probe.PROMPTS,
    num_inference_steps: int = probe.NUM_INFERENCE_STEPS,
    guidance_scale: float | None = None,
    on_item: Callable[[], object] | None = None,
) -> ObdScores:
    """Scores over the image spans of real denoising runs, one per prompt, of an unpatched model."""
    grid = model.config.native_grid
    plan = probe.stock_plan(model, num_inference_steps, guidance_scale)
    meter = _Meter(model)
    for seed, prompt in enumerate(prompts):
        prefix = model.encode_prefix(probe.prompt_tokens(model, prompt, tokenizer, grid, plan).prefixes, grid)
        meter.measure(partial(probe.denoise, model, prefix, seed, plan))
        if on_item:
            on_item()
    return meter.scores("generation")


@torch.no_grad()
def understanding_of(
    model: Showo2,
    pairs: Sequence[tuple[Tensor, EncodedQuestion]],
    on_item: Callable[[], object] | None = None,
) -> ObdScores:
    """Scores over whole question rows; `pairs` are clean latents (1, channels, height, width) and questions."""
    meter = _Meter(model)
    for latents, question in pairs:
        row = question_rows.lay_out(model, latents, [question])
        meter.measure(partial(question_rows.prefill, model, row))
        if on_item:
            on_item()
    return meter.scores("understanding")


class _Meter:
    """FFN and KV-group errors of a model, measured together."""

    def __init__(self, model: Showo2):
        probe.require_unpatched(model)
        self.model = model
        self.norms, self.groups = ActivationNorms(model.showo.model), GroupErrors(model.showo.model)

    def measure(self, run: Callable[[], object]) -> None:
        """Run something twice: the group errors' own forwards would disturb the norms."""
        with self.norms.watching():
            run()
        with self.groups.watching():
            run()

    def scores(self, task: str) -> ObdScores:
        if not self.norms.squares:
            raise InputError("OBD scores need at least one prompt, or one image and question")
        ffn = []
        for layer in self.model.showo.model.layers:
            down = layer.mlp.down_proj
            ffn.append((self.norms.squares[down].sqrt() * down.weight.float().norm(dim=0)).tolist())
        kv = [squares.sqrt().tolist() for squares in self.groups.squares]
        return ObdScores(task, ffn, kv, fingerprint(self.model))
