"""CUDA graphs of the network's calls: what a call launches, some ten to some hundred kernels, as one launch.

Where few images are made at once, a GPU is done with a kernel before the host has launched the next. So a call (a layer
over a span, the image path, the head) is captured over memory of its own, and from then on replayed: what it is given
is copied there, unless that is what lies there already, as a prompt's keys and values do for all steps.

Calls are told apart by their function, by the shapes of the tensors in their arguments, and by all that is no tensor
(layers, neurons, whether there is a mask); so a layer that a step skips is a graph that is not replayed, and there are
no graphs of skip sets. The first call of a kind is made as it is, which has compilers and libraries do what they do
once; the second captures.

A graph knows its weights by where they lie: `watch` has to be called before a batch, and drops graphs of weights that
were moved. The memory of graphs is bounded: past the bound all are dropped, and made anew as calls come.
One batch at a time: what a call returns is good until the next call of its kind.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashu.devices import is_out_of_memory

LARGEST_SHARE = 1 / 8  # of a GPU's memory that graphs may take
MOST_DROPS = 3  # for want of memory, after which nothing is captured any more

log = logging.getLogger(__name__)

Function = Callable[..., Any]
Capture = Callable[[Callable[[], Any]], "tuple[Any, Callable[[], object], int]"]
"""Takes a call's work, and gives what the work returned, how to do it again over the same memory, and the bytes that
doing it takes."""


class Graphs:
    """The captured calls of one pipeline."""

    def __init__(self, new_capture: Callable[[], Capture], most_bytes: float):
        """`new_capture` makes what captures on a device (`CudaCapture`), again when all graphs were dropped.
        `most_bytes` of memory are taken at most, roughly."""
        self._new_capture, self.most_bytes = new_capture, most_bytes
        self.bytes = 0  # that graphs and what they read and write take
        self.captures = 0  # so far, dropped ones too
        self._drops = 0
        self._weights: tuple[Any, ...] = ()
        self._forget()

    @property
    def count(self) -> int:
        """How many calls are captured."""
        return len(self._calls)

    def watch(self, model: nn.Module) -> None:
        """Drop all graphs unless they are of this model, whose weights lie where they lay."""
        tensors = (*model.parameters(), *model.buffers())
        weights = (id(model), *((tensor.data_ptr(), tensor.dtype) for tensor in tensors))
        if weights != self._weights:
            self.drop()
            self._weights = weights

    def drop(self) -> None:
        """Give their memory back. Calls are captured anew as they come."""
        if self._calls and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # as they may be under way
        self._forget()
        self.bytes = 0

    def _forget(self) -> None:
        self._capture = self._new_capture()
        self._calls: dict[Any, _Call] = {}
        self._seen: set[Any] = set()
        self._inputs: dict[int, _Input] = {}  # by the tensor that they hold
        self._streams: dict[Any, Tensor] = {}  # by shape and number format

    def __call__(self, function: Function, *args: Any) -> Any:
        """`function(*args)`, whose tensors lie in arguments, or in lists and tuples of them."""
        return self._run(function, args, streaming=False)

    def stream(self, function: Function, *args: Any) -> Any:
        """`function(*args)`, whose first tensor, a stream, becomes what it returns, or what it returns first.

        So all layers of a network run over one piece of memory, and a stream is good until the next one of its shape.
        """
        return self._run(function, args, streaming=True)

    def _run(self, function: Function, args: tuple[Any, ...], streaming: bool) -> Any:
        tensors: list[Tensor] = []
        key = (function, _parts(args, tensors))
        call = self._calls.get(key)
        if call is None:
            if key not in self._seen:
                self._seen.add(key)
                return function(*args)
            call = self._captured(function, args, tensors, streaming) if self._drops < MOST_DROPS else None
            if call is None:
                return function(*args)
            self._calls[key] = call
        call.take(tensors)
        call.replay()
        torch.autograd.graph.increment_version(call.written)  # which is how another call sees that they changed
        return call.returns

    def _captured(
        self, function: Function, args: tuple[Any, ...], tensors: list[Tensor], streaming: bool
    ) -> _Call | None:
        if self.bytes > self.most_bytes:
            self.drop()
            self._drops += 1
            if self._drops == MOST_DROPS:
                log.warning(
                    "no more CUDA graphs: they take more than %.1f GiB, their share of the memory; calls run as they "
                    "are, as with compile=auto",
                    self.most_bytes / 2**30,
                )
                return None
        inputs, before = self._inputs_for(tensors, streaming), self.bytes
        stream = inputs[0].tensor if streaming else None
        before_it = tensors[0].clone()  # as it may be the stream itself
        for one, tensor in zip(inputs, tensors, strict=True):
            one.tensor.copy_(tensor)
        own_args = _rebuilt(args, iter([one.tensor for one in inputs]))

        def work() -> Any:
            made = function(*own_args)
            if stream is None:
                return made
            stream.copy_(made if isinstance(made, Tensor) else made[0])
            return stream if isinstance(made, Tensor) else (stream, *made[1:])

        try:
            returns, replay, taken = self._capture(work)
        except Exception as error:
            self.drop()
            if is_out_of_memory(error):
                raise
            self._drops = MOST_DROPS
            log.warning("no CUDA graphs: capturing failed; calls run as they are", exc_info=error)
            return None
        self.bytes = before + taken
        self.captures += 1
        if stream is not None:
            stream.copy_(before_it)
        written: list[Tensor] = []
        _parts(returns, written)
        return _Call(inputs, replay, returns, written)

    def _inputs_for(self, tensors: list[Tensor], streaming: bool) -> list[_Input]:
        """Where to read from: of what an earlier call was given too, the memory that holds it already."""
        inputs: list[_Input] = []
        for index, tensor in enumerate(tensors):
            if streaming and index == 0:
                shape = (tensor.shape, tensor.dtype)
                if shape not in self._streams:
                    self._streams[shape] = self._memory_like(tensor)
                inputs.append(_Stream(self._streams[shape]))
                continue
            known = self._inputs.get(id(tensor))
            if known is None or not known.holds(tensor) or known in inputs:
                known = self._inputs[id(tensor)] = _Input(self._memory_like(tensor))
            known.note(tensor)
            inputs.append(known)
        return inputs

    def _memory_like(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.numel() * tensor.element_size()
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class _Input:
    """Memory that graphs read a tensor from."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self._source: weakref.ref[Tensor] | None = None
        self._version = 0

    def note(self, source: Tensor) -> None:
        """`source` is what lies here now."""
        self._source, self._version = weakref.ref(source), source._version

    def holds(self, tensor: Tensor) -> bool:
        return self._source is not None and self._source() is tensor and self._version == tensor._version


class _Stream(_Input):
    """Memory that graphs read a stream from, and write it to: it holds that of the last call alone."""

    def note(self, source: Tensor) -> None:
        pass

    def holds(self, tensor: Tensor) -> bool:
        return tensor is self.tensor


@dataclass(frozen=True)
class _Call:
    inputs: list[_Input]
    replay: Callable[[], object]
    returns: Any
    written: list[Tensor]

    def take(self, tensors: list[Tensor]) -> None:
        """Have a call's tensors where the graph reads them."""
        there, given = [], []
        for one, tensor in zip(self.inputs, tensors, strict=True):
            if not one.holds(tensor):
                there.append(one.tensor)
                given.append(tensor)
                one.note(tensor)
        if there:
            torch._foreach_copy_(there, given)


class CudaCapture:
    """Captures on a CUDA device, all into one pool of memory, which ends with its last graph."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], object], int]:
        around, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
        self.stream.wait_stream(around)
        with torch.cuda.stream(self.stream):
            work()  # over the memory to be captured: attention's plans are made by shape and layout
            torch.cuda.synchronize(self.device)
            reserved = torch.cuda.memory_reserved(self.device)
            with _no_collection():
                # Other threads go on meanwhile: they wait for pictures, and have memory pinned.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    returns = work()
                finally:
                    graph.capture_end()
            taken = torch.cuda.memory_reserved(self.device) - reserved
        around.wait_stream(self.stream)
        return returns, graph.replay, taken


@contextmanager
def _no_collection() -> Iterator[None]:
    """Where another graph must not be freed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parts(value: Any, tensors: list[Tensor]) -> Any:
    """What tells a call's arguments apart from others, hashable; its tensors are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype
    if isinstance(value, (tuple, list)):
        return type(value), *(_parts(part, tensors) for part in value)
    return value


def _rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same, of other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        parts = [_rebuilt(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
