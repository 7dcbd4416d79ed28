"""Seeing what is dispatched to a device that is not there: operators, waits, and calls of compiled or captured blocks.

An operator is what PyTorch dispatches to the device below its composite functions, in inference. Left out are views
(whose schema says that the result shares its argument's memory), what only sets memory aside, what makes nothing (a
result without elements), and the host's own arithmetic. It is not a kernel: some launch several, as a convolution with
a bias does. Two functions are one operator here because a GPU has one for them, while `meta` takes them apart:
`scaled_dot_product_attention`, whatever a backend does with its mask, with a result that lies in memory as its query
does (cuDNN's; that of others may take a copy more or less), and `rms_norm`: on CUDA `_fused_rms_norm`, which copies an
input that is not contiguous first.

A wait is a tensor of the device made from Python's numbers, or a copy from the host that is not `non_blocking`: the
host goes on when the device has come that far. Reading the device (`item`, `tolist`, `nonzero`) cannot be tried out:
without data it is an error. The one place that does, on a GPU, is the choice of layers after a step that measures; it
is counted from the plan, without its operators. Images of a batch are taken to skip the same layers.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from time_split import OTHER
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flashu
from flashu.flops import REPEATED_BLOCKS
from flashu.models.blocks import AS_THEY_ARE, Blocks
from flashu.models.graphs import Graphs

aten = torch.ops.aten

ONE_OPERATOR = {F.scaled_dot_product_attention, F.rms_norm, torch.rms_norm}
FROM_PYTHON = {torch.tensor: 0, torch.as_tensor: 0, torch.asarray: 0, Tensor.new_tensor: 1}  # which argument is data
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
COPIES = {aten._to_copy, aten.copy_}
NO_LAUNCH = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view
}  # fmt: skip
PACKAGE = str(Path(flashu.__file__).parent)

UNCOMPILED, COMPILED, CAPTURED = WAYS = "uncompiled", "compiled", "captured"
CALLS = [field.name for field in fields(Blocks) if field.name not in ("compiler", "graphs")]
OPERATOR, WAIT, CALL = "operator", "wait", "call"


class Event(NamedTuple):
    part: str
    step: int  # how many steps were done before it
    kind: str
    name: str  # of the operator, of what waits, or of the field of `Blocks` that is called
    place: str  # file and line of ours


class Launches:
    """What is dispatched to the device where this is entered."""

    def __init__(self) -> None:
        self.events: Counter[Event] = Counter()
        self.part, self.step = OTHER, 0
        self._quiet = False
        self._remembered: dict[Any, tuple[Any, Counter[Event]]] = {}
        self._modes = (_Functions(self), _Operators(self))

    def __enter__(self) -> Launches:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def by(self, key: Callable[[Event], Any], *kinds: str, steps: range | None = None) -> dict[Any, int]:
        """How many events of these kinds, and of these steps, have what `key` says in common: most first."""
        counts: Counter[Any] = Counter()
        for event, count in self.events.items():
            if event.kind in kinds and (steps is None or event.step in steps):
                counts[key(event)] += count
        return dict(counts.most_common())

    def note(self, kind: str, name: str) -> None:
        if not self._quiet:
            self.events[Event(self.part, self.step, kind, name, _place())] += 1

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What is dispatched belongs to `part`; where parts are nested, to the innermost."""
        around, self.part = self.part, part
        try:
            yield
        finally:
            self.part = around

    @contextmanager
    def as_one(self, kind: str, name: str) -> Iterator[None]:
        """What is dispatched counts as one event."""
        self.note(kind, name)
        around, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = around

    def blocks(self, way: str) -> Blocks:
        """Blocks that count, called in one of `WAYS`: as they are, with each compiled call as one event, or with each
        replay of a graph as one.

        Calls that dispatch the same are dispatched once, and counted as often as they come.
        """
        blocks = Blocks.through(lambda function: function) if way != UNCOMPILED else AS_THEY_ARE
        calls = {name: self._watched(name, getattr(blocks, name), way != UNCOMPILED) for name in CALLS}
        if way != UNCOMPILED:
            calls["compiler"] = lambda function: self._watched(function.__name__.strip("_"), function, True)
        blocks = replace(blocks, **calls)
        return blocks.captured(Graphs(_Replays(self), math.inf)) if way == CAPTURED else blocks

    def _watched(self, name: str, call: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
        def once(*args: Any, **kwargs: Any) -> Any:
            key = (name, self.part, _alike(args), _alike(tuple(kwargs.items())))
            if key in self._remembered:
                result, events = self._remembered[key]
                for event, count in events.items():
                    self.events[event._replace(step=self.step)] += count
                return result
            before = self.events.copy()
            result = call(*args, **kwargs)
            self._remembered[key] = result, self.events - before
            return result

        def as_one(*args: Any, **kwargs: Any) -> Any:
            with self.as_one(CALL, name):
                return once(*args, **kwargs)

        return as_one if compiled else once


class _Replays:
    """Captures calls, each replay of which is one event; see `flashu.models.graphs.Capture`."""

    def __init__(self, launches: Launches):
        self.launches = launches

    def __call__(self, work: Callable[[], object]) -> tuple[Callable[[], None], int]:
        with self.launches.as_one(CALL, "capture"):
            work()
        return lambda: self.launches.note(CALL, "graph"), 0

    def renew(self) -> None:
        pass


class _Functions(TorchFunctionMode):
    """Sees what `meta` takes apart before the dispatcher, or makes without it."""

    def __init__(self, launches: Launches):
        super().__init__()
        self.launches = launches

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in ONE_OPERATOR:
            with self.launches.as_one(OPERATOR, function.__name__):
                result = function(*args, **kwargs)
                return torch.empty_like(args[0]) if function is F.scaled_dot_product_attention else result
        result = function(*args, **kwargs)
        if function in FROM_PYTHON and _on_device(result):
            if not isinstance((*args, *kwargs.values())[FROM_PYTHON[function]], Tensor):
                self._made_from_python(function.__name__)
        elif function in INDEXING and isinstance(args[0], Tensor) and _on_device(args[0]):
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(index, (list, range)):
                    self._made_from_python("index")
        return result

    def _made_from_python(self, name: str) -> None:
        self.launches.note(OPERATOR, name)  # the copy
        self.launches.note(WAIT, name)


class _Operators(TorchDispatchMode):
    """Sees what is dispatched."""

    def __init__(self, launches: Launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        kind = operator.overloadpacket
        made = tree_leaves(result) if result is not None else tree_leaves(args)  # or written, where nothing is returned
        if not any(map(_on_device, made)) or operator.is_view or kind in NO_LAUNCH:
            return result
        name = kind.__name__
        self.launches.note(OPERATOR, name)
        from_host = (one for one in tree_leaves(args) if isinstance(one, Tensor) and not one.is_meta)
        if any(kind in COPIES or one.ndim for one in from_host):  # other operators are given a scalar by value
            waits = not kwargs.get("non_blocking") and not (kind is aten.copy_ and args[2:] == (True,))
            if waits:
                self.launches.note(WAIT, name)
        return result


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta and value.numel() > 0


def _place() -> str:
    """The innermost line of the package that is being run."""
    frame = sys._getframe(1)
    while frame.f_back and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    file = frame.f_code.co_filename
    return told_place(file, frame.f_lineno) if file.startswith(PACKAGE) else "elsewhere"


def told_place(file: str, line: int) -> str:
    return f"{Path(file).relative_to(Path(PACKAGE).parent)}:{line}"


def _alike(value: Any) -> Any:
    """What is the same in calls that dispatch the same."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, (tuple, list)):
        return tuple(map(_alike, value))
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), _alike(tuple(vars(value).values()))
    return type(value) if isinstance(value, REPEATED_BLOCKS) else value
