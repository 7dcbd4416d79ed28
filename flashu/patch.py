"""Switching FlashU on at a model that is loaded.

Applying puts FFN neurons and KV groups in order of importance and sets `model.acceleration`, which tells generation and
sampler what to plan and how much of the LLM a step runs, and answering how much of it reads a question. Removing
(`acceleration.applied`) puts every weight back where it was.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from flashu.acceleration import ffn_pruning, kv_pruning
from flashu.acceleration.applied import Acceleration, remove_flashu_patch, reorder, unpatched
from flashu.acceleration.layer_skipping import least_important
from flashu.acceleration.wanda import GENERATION, UNDERSTANDING, WandaScores, importance_order
from flashu.calibration import calibrate, calibrate_understanding
from flashu.config import FlashUConfig, flashu_preset
from flashu.errors import InputError
from flashu.fingerprint import fingerprint
from flashu.models.geometry import LlmGeometry
from flashu.models.layers import Span
from flashu.models.showo2 import Showo2
from flashu.tokenizer import PromptTokenizer

Model = TypeVar("Model", bound=Showo2)


def apply_flashu_patch(
    model: Model,
    config: FlashUConfig | str | None = None,
    *,
    scores: WandaScores | str | Path | None = None,
    understanding_scores: WandaScores | str | Path | None = None,
    tokenizer: PromptTokenizer | None = None,
) -> Model:
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
    of_generation = of_understanding = None
    with unpatched(model):
        if acceleration.needs_generation_scores:
            of_generation = _scores_for(model, GENERATION, scores, tokenizer)
        if acceleration.needs_understanding_scores:
            of_understanding = _scores_for(model, UNDERSTANDING, understanding_scores, tokenizer)
    if acceleration.ffn_width or acceleration.und_ffn_width:
        acceleration.ffn_orders, spans = _ffn_orders(acceleration, geometry, of_generation, of_understanding)
        if acceleration.und_ffn_width:
            acceleration.reading = replace(acceleration.reading, neurons=tuple(spans))
    if of_understanding and acceleration.und_layers_to_skip and of_understanding.layer_importances is not None:
        (left_out,) = least_important(of_understanding.layer_importances[None], acceleration.und_layers_to_skip)
        acceleration.reading = replace(acceleration.reading, layers_left_out=left_out)
    if of_generation and acceleration.kv_heads:
        acceleration.kv_orders = [
            importance_order(kv_pruning.group_scores(layer_scores, geometry.num_key_value_heads))
            for layer_scores in of_generation.attention
        ]
    remove_flashu_patch(model)
    reorder(model, acceleration.ffn_orders, acceleration.kv_orders)
    model.acceleration = acceleration
    return model


def _ffn_orders(
    acceleration: Acceleration,
    geometry: LlmGeometry,
    scores: WandaScores | None,
    understanding_scores: WandaScores | None,
) -> tuple[list[Tensor], list[Span]]:
    """Each layer's order of neurons, and the span of those that answering runs. A task without pruning keeps all."""
    size = geometry.intermediate_size
    equal = [torch.zeros(size)] * geometry.num_hidden_layers
    generation = scores.ffn if scores and acceleration.ffn_width else equal
    understanding = understanding_scores.ffn if understanding_scores and acceleration.und_ffn_width else equal
    kept, und_kept = (width or size for width in (acceleration.ffn_width, acceleration.und_ffn_width))
    found = [
        ffn_pruning.shared_order(one, kept, other, und_kept)
        for one, other in zip(generation, understanding, strict=True)
    ]
    return [order for order, _ in found], [span for _, span in found]


def _scores_for(
    model: Showo2, task: str, scores: WandaScores | str | Path | None, tokenizer: PromptTokenizer | None
) -> WandaScores:
    if scores is None:
        measure = calibrate if task == GENERATION else calibrate_understanding
        return measure(model, tokenizer=tokenizer)
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
