"""Seeded random weights, for benchmarks and for tests, at any geometry."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flashu.models.showo2 import Showo2

Model = TypeVar("Model", bound=nn.Module)


def random_model(
    cls: type[Model],
    config: Any,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    draw_on_device: bool = False,
) -> Model:
    """`cls(config)` with weights drawn from `seed`, ready to run.

    One seed gives one model, whatever the device and `dtype`. With `draw_on_device` it is quicker to make at full size,
    but another on every kind of device.
    """
    with torch.device("meta"):
        model = cls(config)
    generator = torch.Generator(device if draw_on_device else "cpu").manual_seed(seed)
    weights = {
        f"{path}.{name}".removeprefix("."): _draw(module, name, parameter, generator).to(device, dtype)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    model.load_state_dict(weights, assign=True)
    if isinstance(model, Showo2):
        model.showo.tie_weights()
    return model.eval()


def _draw(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Gains 1, biases 0, embeddings N(0, 0.02²), the rest N(0, 1 / fan_in); float32."""
    device = generator.device
    if name == "bias":
        return torch.zeros(parameter.shape, device=device)
    if parameter.ndim == 1 or name == "gamma":
        return torch.ones(parameter.shape, device=device)
    std = 0.02 if isinstance(module, nn.Embedding) else parameter[0].numel() ** -0.5
    return std * torch.randn(parameter.shape, generator=generator, device=device)
