"""Switching FlashU on and off on a model that is loaded.

Applying puts FFN neurons and KV groups in order of importance and sets `model.acceleration`, which tells pipeline and
sampler what to plan and how much of the LLM a step runs. Removing puts every weight back where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from flashu.acceleration import ffn_pruning, kv_pruning
from flashu.acceleration.layer_skipping import count_to_skip
from flashu.acceleration.plan import Plan, make_plan
from flashu.acceleration.wanda import GENERATION, WandaScores, importance_order
from flashu.config import FlashUConfig, flashu_preset
from flashu.errors import InputError
from flashu.fingerprint import fingerprint
from flashu.models.geometry import LlmGeometry

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
    ffn_orders: list[Tensor] = field(default_factory=list, repr=False)
    kv_orders: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, config: FlashUConfig, geometry: LlmGeometry) -> Acceleration:
        """What `config` comes to for an LLM of this geometry."""
        g = geometry
        neurons = ffn_pruning.kept_neurons(g.intermediate_size, config.r_p)
        groups = kv_pruning.kept_groups(g.num_key_value_heads, config.head_prune_ratio)
        skipped = count_to_skip(g.num_hidden_layers, config.r_LS)
        nothing = {
            name: 0.0
            for name, off in {
                "r_p": neurons == g.intermediate_size,
                "head_prune_ratio": groups == g.num_key_value_heads,
                "r_LS": skipped == 0,
            }.items()
            if off
        }
        return cls(
            config=replace(config, **nothing),
            ffn_width=None if "r_p" in nothing else neurons,
            kv_heads=None if "head_prune_ratio" in nothing else groups,
            layers_to_skip=skipped,
        )

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
    tokenizer: PromptTokenizer | None = None,
) -> Showo2Qwen2_5:
    """Accelerate `model`, in place; a patch that is on already is replaced. Returns the model.

    config: settings, or the name of a preset; the paper's by default.
    scores: importances that pruning goes by, or a file of them (`flashu calibrate`). Without them, a pruning config
        measures its own on built-in prompts, with `tokenizer` or the one beside the model.
    Raises `InputError` for scores of another model or an unknown preset, and then leaves the model as it is.
    While patched, the LLM's weights stand in another order: use `save_pretrained`, and load new weights only after
    `remove_flashu_patch`.
    """
    if config is None or isinstance(config, str):
        config = flashu_preset(config or "paper-1.5b")
    geometry = model.config.llm
    acceleration = Acceleration.of(config, geometry)
    if acceleration.ffn_width or acceleration.kv_heads:
        with unpatched(model):
            scores = _scores_for(model, scores, tokenizer)
    if acceleration.ffn_width:
        acceleration.ffn_orders = [importance_order(layer_scores) for layer_scores in scores.ffn]
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


def _reorder(model: Showo2Qwen2_5, ffn_orders: list[Tensor], kv_orders: list[Tensor]) -> None:
    """Put each layer's FFN neurons and KV groups in order; an empty list leaves them as they are."""
    layers = model.showo.model.layers
    for layer, order in zip(layers, ffn_orders, strict=False):
        ffn_pruning.reorder(layer.mlp, order)
    for layer, order in zip(layers, kv_orders, strict=False):
        kv_pruning.reorder(layer.self_attn, order)


def _scores_for(
    model: Showo2Qwen2_5, scores: WandaScores | str | Path | None, tokenizer: PromptTokenizer | None
) -> WandaScores:
    if scores is None:
        from flashu.calibration import calibrate

        return calibrate(model, tokenizer=tokenizer)
    if not isinstance(scores, WandaScores):
        scores = WandaScores.load(scores)
    if scores.task != GENERATION:
        raise InputError(
            f"these scores were measured for {scores.task}; generating is pruned by scores for {GENERATION}"
        )
    if scores.fingerprint != (own := fingerprint(model)):
        raise InputError(
            f"these scores were measured on another model (fingerprint {scores.fingerprint[:12]}…, this one has "
            f"{own[:12]}…); run flashu calibrate on this one"
        )
    return scores
