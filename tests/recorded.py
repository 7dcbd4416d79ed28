"""A stand-in for a CUDA graph, for where there is no CUDA: it captures a call's operators, and replays them.

As a graph does, it keeps which memory each operator reads and writes, and all that is no tensor's content, so that what
a call decides by anything else shows in the numbers. What no capture may do on CUDA, to wait for the device or to copy
from the host, raises here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in WAITS:
            raise RuntimeError(f"{function._schema.name} is not permitted while a call is captured")
        made = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        outputs = [leaf for leaf in tree_leaves(made) if _is_tensor(leaf)]
        if function._schema.is_mutable or any(one.untyped_storage().data_ptr() not in given for one in outputs):
            self.operators.append((function, args, kwargs or {}, outputs))
        return made


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def record(work: Callable[[], Any]) -> tuple[Any, Callable[[], None], int]:
    """As `flashu.models.graphs.CudaCapture`: what `work` returns is not made until it is replayed."""
    work()
    with _Recorder() as recorder:
        returns = work()
    for _, _, _, outputs in recorder.operators:
        for tensor in outputs:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)

    def replay() -> None:
        for function, args, kwargs, outputs in recorder.operators:
            made = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if _is_tensor(leaf)]
            for there, now in zip(outputs, made, strict=True):
                if there.data_ptr() != now.data_ptr():
                    there.copy_(now)

    return (
        returns,
        replay,
        sum(one.numel() * one.element_size() for *_, outputs in recorder.operators for one in outputs),
    )
