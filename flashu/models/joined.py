"""Linear layers that read one input, made into one matrix product: q, k and v of an attention, gate and up of an FFN.

Small products leave a GPU's units idle, and each is a launch. So the layers' weights are laid behind each other in
memory, and used as one where all of them are wanted; the layers keep their parameters, as views, under their names.
Where a layer is more than its weights (gradients are wanted, a hook watches it, another module stands in its place),
the layers run one by one, as they would have without this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Joined(nn.Module):
    """A module with such layers. Joined on CUDA, where it saves time, and elsewhere when `join` is called.

    (A checkpoint on a CPU stays mapped to its file until then.) Weights may be changed in any way: in place, by
    `load_state_dict`, or by other data behind a parameter, after which they are joined anew when they are next used.
    """

    layers_joined: tuple[str, ...]  # the layers' names; with biases all of them, or none

    def __init__(self) -> None:
        super().__init__()
        self._whole: tuple[Tensor, Tensor | None] | None = None  # weight and bias of all the layers
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def join(self) -> None:
        """Lay the weights behind each other; not where something else stands in a layer's place."""
        linears = self._linears()
        if any(map(_is_other, linears)):
            self._whole = None
            return
        self._sizes = [linear.out_features for linear in linears]
        weight = _lay(_parameters(linears, "weight"))
        self._whole = weight, None if linears[0].bias is None else _lay(_parameters(linears, "bias"))

    def join_again_if_moved(self) -> None:
        """Join layers that were joined, and whose parameters were given other data since.

        Compiled code does not look; `Showo2.read_text` does so before it.
        """
        linears = self._linears()
        if self._whole is None or any(map(_is_other, linears)):
            return
        weight, bias = self._whole
        together = _lie_in(weight, _parameters(linears, "weight"))
        if not (together and (bias is None or _lie_in(bias, _parameters(linears, "bias")))):
            self.join()

    def project(self, x: Tensor, first: int = 0) -> tuple[Tensor, ...]:
        """What the layers make of `x` (…, in), from the layer number `first` on."""
        linears = self._linears()
        if self._whole is None or torch.is_grad_enabled() or any(_is_other(one) or _is_watched(one) for one in linears):
            return tuple(linear(x) for linear in linears[first:])
        if not torch.compiler.is_compiling():
            self.join_again_if_moved()
        weight, bias = self._whole
        start = sum(self._sizes[:first])
        return F.linear(x, weight[start:], None if bias is None else bias[start:]).split(self._sizes[first:], dim=-1)

    def _linears(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.layers_joined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Joined:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._changed()
        return self

    def _changed(self) -> None:
        linears = self._linears()
        if self._whole is not None:
            self.join_again_if_moved()  # and otherwise not: an optimiser may hold views of where they lie
        elif not any(map(_is_other, linears)) and linears[0].weight.is_cuda:
            self.join()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the parameters alone. A copy of what they are views of would be of no parameter any more."""
        return {**self.__dict__, "_whole": self._whole is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_joined = state["_whole"]
        super().__setstate__({**state, "_whole": None})  # type: ignore[no-untyped-call]
        if was_joined:
            self.join()


def _parameters(linears: list[nn.Linear], name: str) -> list[nn.Parameter]:
    return [getattr(linear, name) for linear in linears]


def _is_other(linear: nn.Module) -> bool:
    """Whether something else stands where a linear layer was, such as one with an adapter or a parametrization."""
    return type(linear) is not nn.Linear


def _is_watched(linear: nn.Module) -> bool:
    return bool(linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)


def _lay(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor of the parameters' data, which they are views of from now on."""
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return whole


def _lie_in(whole: Tensor, parameters: list[nn.Parameter]) -> bool:
    """Whether `whole` is still what the parameters are views of, one behind the other."""
    if whole.is_meta:
        return all(parameter.is_meta for parameter in parameters)
    place = whole.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != place:
            return False
        place += parameter.numel() * parameter.element_size()
    return True


def _loaded(module: Joined, _: Any) -> None:
    """After a module's part of a state dict was loaded, which may have given it other parameters."""
    module._changed()
