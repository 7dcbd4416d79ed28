"""Linear layers that read one input, made into one matrix product: q, k and v of an attention, gate and up of an FFN.

Small products leave a GPU's units idle, and each is a launch. So the layers' weights are laid behind each other in
memory, and used as one where all of them are wanted; the layers keep their parameters, as views, under their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Joined(nn.Module):
    """A module with such layers. Joined on CUDA, where it saves time, and elsewhere when `join` is called.

    (A checkpoint on a CPU stays mapped to its file until then.) Copying into the parameters, moving them and
    `load_state_dict` are seen; code that puts other data behind a parameter calls `join_again`.
    """

    layers_joined: tuple[str, ...]  # the layers' names; with biases all of them, or none

    def __init__(self) -> None:
        super().__init__()
        self._whole: tuple[Tensor, Tensor | None] | None = None  # weight and bias of all the layers
        self.register_load_state_dict_post_hook(_loaded)

    @torch.no_grad()
    def join(self) -> None:
        """Lay the weights behind each other."""
        linears = [getattr(self, name) for name in self.layers_joined]
        self._sizes = [linear.out_features for linear in linears]
        weight = _lay([linear.weight for linear in linears])
        self._whole = weight, None if linears[0].bias is None else _lay([linear.bias for linear in linears])

    def join_again(self) -> None:
        """Join layers that were joined, after their parameters were given other data."""
        if self._whole is not None:
            self.join()

    def project(self, x: Tensor, first: int = 0) -> tuple[Tensor, ...]:
        """What the layers make of `x` (…, in), from the layer number `first` on."""
        if self._whole is None:
            return tuple(getattr(self, name)(x) for name in self.layers_joined[first:])
        weight, bias = self._whole
        start = sum(self._sizes[:first])
        return F.linear(x, weight[start:], None if bias is None else bias[start:]).split(self._sizes[first:], dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Joined:
        super()._apply(fn, recurse)
        self._changed()
        return self

    def _changed(self) -> None:
        if self._whole is not None or getattr(self, self.layers_joined[0]).weight.is_cuda:
            self.join()


def _lay(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor of the parameters' data, which they are views of from now on."""
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return whole


def _loaded(module: Joined, _: Any) -> None:
    """After a module's part of a state dict was loaded, which may have given it other parameters."""
    module._changed()
