"""Switching FlashU on and off on a model that is loaded.

Applying puts FFN neurons and KV groups in order of importance and sets `model.acceleration`, which tells pipeline and
sampler what to plan and how much of the LLM a step runs, and `flashu.answering` how much of it reads a question.
Removing puts every weight back where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashu.acceleration import ffn_pruning, kv_pruning
from flashu.acceleration.layer_skipping import count_to_skip, least_important
from flashu.acceleration.plan import Plan, make_plan
from flashu.acceleration.reading import Reading
from flashu.acceleration.wanda import GENERATION, UNDERSTANDING, WandaScores, importance_order
from flashu.config import FlashUConfig, flashu_preset
from flashu.errors import InputError
from flashu.fingerprint import fingerprint
from flashu.models.geometry import LlmGeometry
from flashu.models.layers import Span

if TYPE_CHECKING:
    from flashu.models.showo2 import Showo2Qwen2_5
    from flashu.models.tokenizer import PromptTokenizer


@dataclass
class Acceleration:
    """What is on, at the size of one model, and what it takes to switch it off."""

    config: FlashUConfig  # without the techniques that come to nothing at this size
    ffn_width: int | None  # neurons that a pruned FFN runs; None for all
    kv_heads: int | None  # KV groups that every attention runs; None for all
    layers_to_skip: int
    und_ffn_width: int | None  # as above, while answering
    und_layers_to_skip: int
    reading: Reading  # while answering; which neurons and layers it runs, only scores tell
    ffn_orders: list[Tensor] = field(default_factory=list, repr=False)
    kv_orders: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, config: FlashUConfig, geometry: LlmGeometry) -> Acceleration:
        """What `config` comes to for an LLM of this geometry."""
        g = geometry
        neurons = ffn_pruning.kept_neurons(g.intermediate_size, config.r_p)
        groups = kv_pruning.kept_groups(g.num_key_value_heads, config.head_prune_ratio)
        skipped = count_to_skip(g.num_hidden_layers, config.r_LS)
        und_neurons = ffn_pruning.kept_neurons(g.intermediate_size, config.und_r_p)
        und_skipped = count_to_skip(g.num_hidden_layers, config.und_r_LS)
        if config.und_r_tok and config.und_tok_layer >= g.num_hidden_layers - 1:
            raise InputError(
                f"und_tok_layer is {config.und_tok_layer}, but tokens are dropped for the layers after it: "
                f"with {g.num_hidden_layers} layers it is at most {g.num_hidden_layers - 2}"
            )
        nothing = {
            name: 0.0
            for name, off in {
                "r_p": neurons == g.intermediate_size,
                "head_prune_ratio": groups == g.num_key_value_heads,
                "r_LS": skipped == 0,
                "und_r_p": und_neurons == g.intermediate_size,
                "und_r_LS": und_skipped == 0,
            }.items()
            if off
        }
        return cls(
            config=replace(config, **nothing),
            ffn_width=None if "r_p" in nothing else neurons,
            kv_heads=None if "head_prune_ratio" in nothing else groups,
            layers_to_skip=skipped,
            und_ffn_width=None if "und_r_p" in nothing else und_neurons,
            und_layers_to_skip=und_skipped,
            reading=Reading(
                neurons=None if "und_r_p" in nothing else ((0, und_neurons),) * g.num_hidden_layers,
                layers_left_out=tuple(range(g.num_hidden_layers - und_skipped, g.num_hidden_layers)),
                drop_after=config.und_tok_layer if config.und_r_tok else None,
                drop_share=config.und_r_tok,
            ),
        )

    @property
    def needs_generation_scores(self) -> bool:
        """Whether generation's scores decide anything."""
        return bool(self.ffn_width or self.kv_heads)

    @property
    def needs_understanding_scores(self) -> bool:
        return bool(self.und_ffn_width or self.und_layers_to_skip)

    def plan(self, num_inference_steps: int, guidance_scale: float) -> Plan:
        """The steps of a run on a model that is patched so; see `make_plan`."""
        return replace(
            make_plan(self.config, num_inference_steps, guidance_scale),
            ffn_width=self.ffn_width,
            kv_heads=self.kv_heads,
            layers_to_skip=self.layers_to_skip,
        )


def apply_flashu_patch(
    model: Showo2Qwen2_5,
    config: FlashUConfig | str | None = None,
    *,
    scores: WandaScores | str | Path | None = None,
    understanding_scores: WandaScores | str | Path | None = None,
    tokenizer: PromptTokenizer | None = None,
) -> Showo2Qwen2_5:
    """Accelerate `model`, in place; a patch that is on already is replaced. Returns the model.

    config: settings, or the name of a preset; the paper's by default.
    scores, understanding_scores: importances that pruning goes by in either task, or files of them
        (`flashu calibrate`). Without them, a config that needs some measures its own on built-in prompts, with
        `tokenizer` or the one beside the model.
    Raises `InputError` for scores of another model or an unknown preset, and then leaves the model as it is.
    While patched, the LLM's weights stand in another order: use `save_pretrained`, and load new weights only after
    `remove_flashu_patch`.
    """
    if config is None or isinstance(config, str):
        config = flashu_preset(config or "paper-1.5b")
    geometry = model.config.llm
    acceleration = Acceleration.of(config, geometry)
    with unpatched(model):
        if acceleration.needs_generation_scores:
            scores = _scores_for(model, GENERATION, scores, tokenizer)
        if acceleration.needs_understanding_scores:
            understanding_scores = _scores_for(model, UNDERSTANDING, understanding_scores, tokenizer)
    if acceleration.ffn_width or acceleration.und_ffn_width:
        acceleration.ffn_orders, spans = _ffn_orders(acceleration, geometry, scores, understanding_scores)
        if acceleration.und_ffn_width:
            acceleration.reading = replace(acceleration.reading, neurons=tuple(spans))
    if acceleration.und_layers_to_skip:
        importances = understanding_scores.layer_importances
        (left_out,) = least_important(importances[None], acceleration.und_layers_to_skip)
        acceleration.reading = replace(acceleration.reading, layers_left_out=left_out)
    if acceleration.kv_heads:
        acceleration.kv_orders = [
            importance_order(kv_pruning.group_scores(layer_scores, geometry.num_key_value_heads))
            for layer_scores in scores.attention
        ]
    remove_flashu_patch(model)
    _reorder(model, acceleration.ffn_orders, acceleration.kv_orders)
    model.acceleration = acceleration
    return model


def remove_flashu_patch(model: Showo2Qwen2_5) -> Showo2Qwen2_5:
    """Switch FlashU off: the model is as it was, bit for bit. Without a patch, nothing happens. Returns the model."""
    if model.acceleration is None:
        return model
    acceleration, model.acceleration = model.acceleration, None
    undo = [[order.argsort() for order in orders] for orders in (acceleration.ffn_orders, acceleration.kv_orders)]
    _reorder(model, *undo)
    return model


@contextmanager
def unpatched(model: Showo2Qwen2_5) -> Iterator[None]:
    """The model's weights in their own order for a while; the patch, if any, is back afterwards."""
    acceleration = model.acceleration
    remove_flashu_patch(model)
    try:
        yield
    finally:
        if acceleration is not None:
            _reorder(model, acceleration.ffn_orders, acceleration.kv_orders)
            model.acceleration = acceleration


def _ffn_orders(
    acceleration: Acceleration,
    geometry: LlmGeometry,
    scores: WandaScores | None,
    understanding_scores: WandaScores | None,
) -> tuple[list[Tensor], list[Span]]:
    """Each layer's order of neurons, and the span of those that answering runs. A task without pruning keeps all."""
    size = geometry.intermediate_size
    equal = [torch.zeros(size)] * geometry.num_hidden_layers
    generation = scores.ffn if acceleration.ffn_width else equal
    understanding = understanding_scores.ffn if acceleration.und_ffn_width else equal
    kept, und_kept = (width or size for width in (acceleration.ffn_width, acceleration.und_ffn_width))
    found = [
        ffn_pruning.shared_order(one, kept, other, und_kept)
        for one, other in zip(generation, understanding, strict=True)
    ]
    return [order for order, _ in found], [span for _, span in found]


def _reorder(model: Showo2Qwen2_5, ffn_orders: list[Tensor], kv_orders: list[Tensor]) -> None:
    """Put each layer's FFN neurons and KV groups in order; an empty list leaves them as they are."""
    layers = model.showo.model.layers
    for layer, order in zip(layers, ffn_orders, strict=False):
        layer.mlp.reorder(order)
    for layer, order in zip(layers, kv_orders, strict=False):
        kv_pruning.reorder(layer.self_attn, order)


def _scores_for(
    model: Showo2Qwen2_5, task: str, scores: WandaScores | str | Path | None, tokenizer: PromptTokenizer | None
) -> WandaScores:
    if scores is None:
        from flashu.calibration import calibrate, calibrate_understanding

        return {GENERATION: calibrate, UNDERSTANDING: calibrate_understanding}[task](model, tokenizer=tokenizer)
    if not isinstance(scores, WandaScores):
        scores = WandaScores.load(scores)
    if scores.task != task:
        raise InputError(f"these scores were measured for {scores.task}; {task} is pruned by scores for {task}")
    if task == UNDERSTANDING and scores.layer_importances is None:
        raise InputError("these scores say nothing of layers; run flashu calibrate --task understanding")
    if scores.fingerprint != (own := fingerprint(model)):
        raise InputError(
            f"these scores were measured on another model (fingerprint {scores.fingerprint[:12]}…, this one has "
            f"{own[:12]}…); run flashu calibrate on this one"
        )
    return scores
