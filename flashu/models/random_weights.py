"""Seeded random weights: for the embedded default, for benchmarks and for tests, at any geometry."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def random_model(
    cls: type[Model],
    config: Any,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Model:
    """`cls(config)` with weights drawn from `seed`, ready to run. One seed gives one model on one device type."""
    with torch.device("meta"):
        model = cls(config)
    model.to(dtype).to_empty(device=device)
    if hasattr(model, "showo"):
        model.showo.tie_weights()
    fill_random(model, seed)
    return model.eval()


@torch.no_grad()
def fill_random(model: nn.Module, seed: int) -> None:
    """Fill every parameter in place: gains 1, biases 0, embeddings N(0, 0.02), the rest N(0, 1 / fan_in)."""
    generator = None
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            generator = generator or torch.Generator(parameter.device).manual_seed(seed)
            if name == "bias":
                parameter.zero_()
            elif parameter.ndim == 1 or name == "gamma":
                parameter.fill_(1)
            else:
                std = 0.02 if isinstance(module, nn.Embedding) else parameter[0].numel() ** -0.5
                # Drawn in float32 whatever the parameter's format, so that both formats hold one model.
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator, device=parameter.device))
