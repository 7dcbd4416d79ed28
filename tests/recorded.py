"""A stand-in for CUDA's graphs, for where there is no CUDA: it captures a call's operators, and replays them.

As a graph does, it keeps which memory each operator reads and writes, and all that is no tensor's content, so that what
a call decides by anything else shows in the numbers. As graphs of one pool do, which may lie in each other's memory, a
replay spoils all that operators of others have made. And what no capture may do on CUDA, to wait for the device or to
copy from the host, raises here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh")
Operator = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.made: list[Tensor] = []  # in memory of their own, which on CUDA is the pool's

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in WAITS:
            raise RuntimeError(f"{function._schema.name} is not permitted while a call is captured")
        given = {_place(leaf) for leaf in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        outputs = _tensors(result)
        new = [one for one in outputs if _place(one) not in given]
        if function._schema.is_mutable or new:
            self.operators.append((function, args, kwargs or {}, outputs))
        self.made += new
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording:
    """As `flashu.models.graphs.CudaCapture`."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self.pool: list[Tensor] = []

    def __call__(self, work: Callable[[], object]) -> tuple[Callable[[], None], int]:
        work()
        with _Recorder() as recorder:
            work()
        pool = self.pool
        pool += recorder.made

        written = [tensor for *_, outputs in recorder.operators for tensor in outputs]

        def replay() -> None:
            with torch.autograd._unsafe_preserve_version_counter((*pool, *written)):  # as PyTorch sees no kernel of it
                for tensor in pool:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
                for function, args, kwargs, outputs in recorder.operators:
                    for there, now in zip(outputs, _tensors(function(*args, **kwargs)), strict=True):
                        if there.data_ptr() != now.data_ptr():
                            there.copy_(now)

        return replay, sum(tensor.numel() * tensor.element_size() for tensor in recorder.made)
