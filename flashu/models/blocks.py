"""How a generation calls the blocks that the network repeats: as they are, or compiled.

One block of each kind is compiled, not the network: every layer is then a call of the same code, whichever layers a
step skips, and compiling takes seconds. Sizes that vary from batch to batch (rows, and a prompt's length) are told to
the compiler beforehand, and an image's tokens and all widths are constants; so it compiles once for each way in which a
block is called (one row apart from several), and never for a new prompt. What is compiled is kept on disk by PyTorch
(`TORCHINDUCTOR_CACHE_DIR`), so the next process starts warm.

Calibration, analysis and answering call blocks as they are: they watch them, or run too short to gain.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from flashu.errors import InputError
from flashu.models.attention import Halves, KeyValue
from flashu.models.diffusion_head import ModulatedAttentionBlock, run_text
from flashu.models.graphs import LARGEST_SHARE, CudaCapture, Graphs
from flashu.models.layers import Rotary
from flashu.models.qwen2 import DecoderLayer, Subnetwork, measured_layer
from flashu.models.siglip import EncoderLayer

T = TypeVar("T")

COMPILE_MODES = ("auto", "off", "max", "graphs")
MOST_POSITIONS = 12_000  # that a batch whose calls are captured runs at once: eight guided images of 27 x 27 tokens
KEYS = 32  # of how many the number of keys is a multiple where calls are captured: prompts of some length share graphs

# Ways to call one block: text, span or whole row; one row or several; all neurons or a slice; masked or not; in halves
# or not. PyTorch's own limit of 8 is below their number, and past it calls run uncompiled, with a line in the log. One
# FlashU setting takes 20 to 40 of them; the limit is for all models and settings of a process together.
MOST_WAYS = 256


@dataclass(frozen=True)
class Blocks:
    """Each takes a block, and what its `forward` takes."""

    llm_layer: Callable[..., tuple[Tensor, KeyValue]] = DecoderLayer.__call__
    measured_layer: Callable[..., tuple[Tensor, KeyValue, Tensor]] = measured_layer
    vision_layer: Callable[..., Tensor] = EncoderLayer.__call__
    head_block: Callable[..., Tensor] = ModulatedAttentionBlock.__call__
    head_text_block: Callable[..., tuple[Tensor, KeyValue]] = run_text
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None  # where they are compiled
    graphs: Graphs | None = None  # where calls are captured

    @property
    def compiled(self) -> bool:
        return self.compiler is not None

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        """A function that is no block, compiled where blocks are."""
        return _compiled(self.compiler, function) if self.compiler else function

    def captured(self, graphs: Graphs | None) -> Blocks:
        """The same, captured; with None, not captured."""
        return replace(self, graphs=graphs)

    def for_batch(self, model: nn.Module, positions: int) -> Blocks:
        """How to call the blocks of `model` for a batch of so many positions: captured where a GPU would be done with
        kernels before the next are launched."""
        if positions > MOST_POSITIONS:
            return self.captured(None)
        if self.graphs:
            self.graphs.watch(model)
        return self

    def of_layers(self, subnetwork: Subnetwork) -> Blocks:
        """How to call the layers of it. Where some of the rows run a layer and others do not, as images of a batch skip
        others, they are not captured: there would be graphs of every number of rows."""
        return self.captured(None) if subnetwork.parts_rows else self

    def run_in_place(self, function: Callable[..., T], *args: Any) -> T:
        """As `run`, of layers: the first tensor becomes what they return first."""
        return self.graphs.in_place(function, *args) if self.graphs else function(*args)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """A call of what is more than a block, `function(*args)`. What it returns is good until the next one of its
        kind; see `kept`."""
        return self.graphs(function, *args) if self.graphs else function(*args)

    def kept(self, tensor: Tensor) -> Tensor:
        """What a call returned, where it is to outlast the next one of its kind."""
        return tensor.clone() if self.graphs else tensor

    @property
    def key_multiple(self) -> int:
        """What the number of keys is to be a multiple of where there is a mask.

        GPUs' kernels want its rows aligned so. Where some batches' are and others' are not, blocks compile twice.
        """
        return KEYS if self.graphs else 8 if self.compiled else 1

    @property
    def always_padded(self) -> bool:
        """Whether prompts that need no padding are padded and masked all the same, as others of their length are."""
        return self.graphs is not None

    def padded_length(self, lengths: Sequence[int], span: int) -> int:
        """To which rows of text are padded that are followed by a span of so many positions."""
        room = -(max(lengths) + span) % self.key_multiple  # for more padding, where there is some
        return max(lengths) + (room if self.always_padded or len(set(lengths)) > 1 else 0)

    @property
    def least_images(self) -> int:
        """For how many of several images a layer runs that some of them skip: one would be compiled apart."""
        return 2 if self.compiled else 1

    @classmethod
    def through(cls, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Blocks:
        """Blocks that are called as `compiler`, such as `torch.compile`, makes them."""
        return cls(
            llm_layer=compiler(DecoderLayer.forward),
            measured_layer=compiler(measured_layer),
            vision_layer=compiler(EncoderLayer.forward),
            head_block=compiler(ModulatedAttentionBlock.forward),
            head_text_block=compiler(run_text),
            compiler=compiler,
        )

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Where blocks are called: with room for all the ways to call them, which is a thread's own setting."""
        if not self.compiled:
            yield
            return
        config = torch._dynamo.config
        with config.patch(recompile_limit=max(config.recompile_limit, MOST_WAYS)):
            yield

    def mark_dynamic(self, dims: tuple[int, ...], *tensors: Tensor | KeyValue | Halves | Rotary | None) -> None:
        """Tell the compiler that these dimensions of an input of blocks are not the same in every batch."""
        if not self.compiled:
            return
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, [dim for dim in dims if tensor.shape[dim] > 1])
            elif tensor is not None:
                self.mark_dynamic(dims, *tensor)


AS_THEY_ARE = Blocks()


def compile_blocks(mode: str, device: torch.device) -> Blocks:
    """Blocks that are compiled at their first calls; the same ones for all who ask for them in a process, but for
    graphs, which are one pipeline's.

    mode: "auto" compiles on CUDA, where it can, and leaves other devices alone; "max" compiles on any device, and on
    CUDA has the compiler measure more variants of each kernel; "graphs" compiles on CUDA and captures what is compiled,
    so that small batches do not wait for the host; "off" does nothing.
    Raises `InputError` for another mode, in mode "graphs" without CUDA, and in modes "max" and "graphs" when there is
    nothing to compile with; "auto" then warns.
    """
    check_mode("compile", mode)
    if mode == "graphs" and device.type != "cuda":
        raise InputError(f"compile=graphs needs CUDA, and this runs on {device}; choose auto, off or max")
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return AS_THEY_ARE
    # Neither hands out memory that a later call overwrites, as keys and values of a prompt are kept.
    how = "max-autotune-no-cudagraphs" if mode == "max" and device.type == "cuda" else "default"
    try:
        importlib.import_module("torch._dynamo")  # makes the folder of compiled code, and raises where it cannot
        with _through(how).compiling():
            torch.compile(_twice, mode=how)(torch.ones(2, 16, device=device))
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, a GPU that is too old
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if mode != "auto":
            raise InputError(f"compile={mode}, but torch.compile does not work here: {reason}") from None
        warnings.warn(f"running uncompiled, as torch.compile does not work here: {reason}", stacklevel=2)
        return AS_THEY_ARE
    if mode == "graphs":
        most_bytes = LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory
        return _through(how).captured(Graphs(CudaCapture(device), most_bytes))
    return _through(how)


@cache
def _compiled(compiler: Callable[..., Any], function: Callable[..., T]) -> Callable[..., T]:
    return cast("Callable[..., T]", compiler(function))


@cache
def _through(how: str) -> Blocks:
    return Blocks.through(partial(torch.compile, mode=how))


def check_mode(name: str, mode: Any) -> None:
    """Raises `InputError`, naming the setting, unless it is a mode."""
    if mode not in COMPILE_MODES:
        raise InputError(f"{name} is {mode!r}; choose one of: {', '.join(COMPILE_MODES)}")


def _twice(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * 2
