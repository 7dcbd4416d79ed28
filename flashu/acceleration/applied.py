"""What FlashU comes to on one model: how much of it runs, and the order in which its weights then stand.

`flashu.patch` finds the orders, by scores; here is what they do, and how they are undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from flashu.acceleration import ffn_pruning, kv_pruning
from flashu.acceleration.layer_skipping import count_to_skip
from flashu.acceleration.plan import Plan, make_plan
from flashu.acceleration.reading import Reading
from flashu.config import FlashUConfig
from flashu.errors import InputError
from flashu.models.geometry import LlmGeometry
from flashu.models.showo2 import Showo2

Model = TypeVar("Model", bound=Showo2)


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
        nothing: dict[str, Any] = {
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


def remove_flashu_patch(model: Model) -> Model:
    """Switch FlashU off: the model is as it was, bit for bit. Without a patch, nothing happens. Returns the model."""
    if model.acceleration is None:
        return model
    acceleration, model.acceleration = model.acceleration, None
    undo = [[order.argsort() for order in orders] for orders in (acceleration.ffn_orders, acceleration.kv_orders)]
    reorder(model, *undo)
    return model


@contextmanager
def unpatched(model: Showo2) -> Iterator[None]:
    """The model's weights in their own order for a while; the patch, if any, is back afterwards."""
    acceleration = model.acceleration
    remove_flashu_patch(model)
    try:
        yield
    finally:
        if acceleration is not None:
            reorder(model, acceleration.ffn_orders, acceleration.kv_orders)
            model.acceleration = acceleration


def reorder(model: Showo2, ffn_orders: Sequence[Tensor], kv_orders: Sequence[Tensor]) -> None:
    """Put each layer's FFN neurons and KV groups in order; an empty list leaves them as they are."""
    layers = model.showo.model.layers
    for layer, order in zip(layers, ffn_orders, strict=False):
        layer.mlp.reorder(order)
    for layer, order in zip(layers, kv_orders, strict=False):
        kv_pruning.reorder(layer.self_attn, order)
