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
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flashu.devices import is_out_of_memory
from flashu.models import attention

LARGEST_SHARE = 1 / 8  # of a GPU's memory that graphs may take
MOST_DROPS = 3  # for want of memory, after which nothing is captured any more

log = logging.getLogger(__name__)

Function = Callable[..., Any]


class Capture(Protocol):
    """How a device captures."""

    def __call__(self, work: Callable[[], object]) -> tuple[Callable[[], object], int]:
        """Do some work once as it is, and capture it. How to do it again over the same memory, and the bytes that this
        takes."""

    def renew(self) -> None:
        """Wait for all that was captured, as it is to be dropped, and begin anew."""


class Graphs:
    """The captured calls of one pipeline."""

    def __init__(self, capture: Capture, most_bytes: float):
        """`most_bytes` of memory are taken at most, roughly."""
        self._capture, self.most_bytes = capture, most_bytes
        self.captures = 0  # so far, dropped ones too
        self._drops = 0
        self._identity: tuple[Any, ...] = ()
        self._forget()

    @property
    def count(self) -> int:
        """How many calls are captured."""
        return len(self._calls)

    def watch(self, model: nn.Module) -> None:
        """Drop all graphs unless they are of this model, whose weights lie where they lay, attending as it does now."""
        tensors = (*model.parameters(), *model.buffers())
        identity = (id(model), attention.choice(), *((tensor.data_ptr(), tensor.dtype) for tensor in tensors))
        if identity != self._identity:
            self.drop()
            self._identity = identity

    def drop(self) -> None:
        """Give their memory back. Calls are captured anew as they come."""
        self._capture.renew()
        self._forget()

    def _forget(self) -> None:
        self.bytes = 0  # that graphs, and what they read and write, take
        self._calls: dict[Any, _Call] = {}
        self._seen: set[Any] = set()
        self._inputs: dict[int, _Input] = {}  # by the tensor that they hold
        self._in_place: dict[Any, Tensor] = {}  # by shape and number format

    def __call__(self, function: Function, *args: Any) -> Any:
        """`function(*args)`, whose tensors lie in arguments, or in lists and tuples of them."""
        return self._run(function, args, in_place=False)

    def in_place(self, function: Function, *args: Any) -> Any:
        """`function(*args)`, of which the first tensor becomes what it returns, or what it returns first.

        So all layers of a network run over one piece of memory, and what passes through them is good until the next
        call in place of its shape.
        """
        return self._run(function, args, in_place=True)

    def _run(self, function: Function, args: tuple[Any, ...], in_place: bool) -> Any:
        if torch.is_inference_mode_enabled():  # in which no tensor tells that it changed
            return function(*args)
        tensors: list[Tensor] = []
        key = (function, _parts(args, tensors))
        call = self._calls.get(key)
        if call is None:
            if key not in self._seen:
                self._seen.add(key)
                return function(*args)
            call = self._captured(function, args, tensors, in_place) if self._drops < MOST_DROPS else None
            if call is None:
                return function(*args)
            self._calls[key] = call
        call.take(tensors)
        call.replay()
        torch.autograd.graph.increment_version(call.written)  # which is how another call sees that they changed
        return call.returns

    def _captured(
        self, function: Function, args: tuple[Any, ...], tensors: list[Tensor], in_place: bool
    ) -> _Call | None:
        """A call as a graph; None where it is to be made as it is."""
        if self.bytes > self.most_bytes:
            self._drop_for_want_of_memory()
            if self._drops >= MOST_DROPS:
                return None
        inputs, given = list[_Input](), None
        try:
            inputs = self._inputs_for(tensors, in_place)
            given = tensors[0].clone() if in_place else None  # as it may lie where the call writes
            for one, tensor in zip(inputs, tensors, strict=True):
                one.tensor.copy_(tensor)
            own_args = _rebuilt(args, iter([one.tensor for one in inputs]))
            # What is returned lies outside of the memory that graphs share: there, one that was captured earlier may
            # write where a later one's results are.
            written = [inputs[0].tensor] if in_place else []
            returns: Any = None

            def work() -> None:
                nonlocal returns
                made: list[Tensor] = []
                _parts(returned := function(*own_args), made)
                if returns is None:
                    written.extend(self._memory_like(tensor) for tensor in made[len(written) :])
                    returns = _rebuilt(returned, iter(written))
                for there, tensor in zip(written, made, strict=True):
                    there.copy_(tensor)

            replay, taken = self._capture(work)
        except Exception as error:
            self.drop()
            if not is_out_of_memory(error):
                self._drops = MOST_DROPS
                log.warning("no CUDA graphs: capturing failed; calls run as they are", exc_info=error)
                return None
        else:
            self.bytes += taken
            self.captures += 1
            return _Call(inputs, replay, returns, written)
        finally:
            if given is not None:
                inputs[0].tensor.copy_(given)
        # Outside the handler, whose traceback would hold on to what was made.
        self._drop_for_want_of_memory()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # which an allocation within a capture cannot ask for
        return None

    def _drop_for_want_of_memory(self) -> None:
        """For good, after some times."""
        self.drop()
        self._drops += 1
        if self._drops == MOST_DROPS:
            log.warning(
                "no more CUDA graphs: they need more than their share of the memory, %.1f GiB; calls run as they are, "
                "as with compile=auto",
                self.most_bytes / 2**30,
            )

    def _inputs_for(self, tensors: list[Tensor], in_place: bool) -> list[_Input]:
        """Where to read from: of what an earlier call was given too, the memory that holds it already."""
        inputs: list[_Input] = []
        for index, tensor in enumerate(tensors):
            if in_place and index == 0:
                shape = (tensor.shape, tensor.dtype)
                if shape not in self._in_place:
                    self._in_place[shape] = self._memory_like(tensor)
                inputs.append(_InPlace(self._in_place[shape]))
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


class _InPlace(_Input):
    """Memory that graphs read from and write to: it holds what the last of them wrote, and nothing else."""

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
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def renew(self) -> None:
        torch.cuda.synchronize(self.device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], object]) -> tuple[Callable[[], object], int]:
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
                    work()
                finally:
                    graph.capture_end()
            taken = torch.cuda.memory_reserved(self.device) - reserved
        around.wait_stream(self.stream)
        return graph.replay, max(0, taken)


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
