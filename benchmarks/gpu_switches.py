"""What arms of `gpu.py` switch for a while: choices of PyTorch's, and ways of ours before, to tell each gain alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flashu.models import Showo2Qwen2_5, showo2
from flashu.models.attention import AttentionChoice, choosing
from flashu.models.blocks import Blocks
from flashu.models.float8 import ffn_owners, to_float8
from flashu.models.geometry import PATCH_SIZE
from flashu.models.patches import PatchProduct


@contextmanager
def compiled_anew() -> Iterator[None]:
    """Blocks compiled before know how they attend, so they are compiled anew, and afterwards once more."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    with compiled_anew():
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(enabled)


@contextmanager
def attending(**choice: Any) -> Iterator[None]:
    """With another `AttentionChoice`."""
    with compiled_anew(), choosing(AttentionChoice(**choice)):
        yield


@contextmanager
def ffns_in_float8(model: Showo2Qwen2_5) -> Iterator[None]:
    """FFNs made in float8 for a while, beside the whole ones, which are back afterwards."""
    whole = [(owner, owner.mlp) for owner in ffn_owners(model)]
    try:
        to_float8(model)
        yield
    finally:
        for owner, mlp in whole:
            owner.mlp = mlp
        model.original_fingerprint = None


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """With another value of an attribute, in compiled code too."""
    before = getattr(owner, name)
    with compiled_anew():
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before)


def convolved_patches() -> AbstractContextManager[None]:
    """Patches embedded by a convolution, which leaves SigLIP's stream channels first in memory."""

    def forward(self: PatchProduct, patches: Tensor) -> Tensor:
        tokens = "images tokens (channels down across)"
        sides = {"down": PATCH_SIZE, "across": PATCH_SIZE}
        strip = rearrange(patches, f"{tokens} -> images channels down (tokens across)", **sides)
        made = F.conv2d(strip, self.weight, self.bias, stride=PATCH_SIZE)
        return rearrange(made, "images hidden 1 tokens -> images tokens hidden")

    return attribute(PatchProduct, "forward", forward)


def measured_by_parts() -> AbstractContextManager[None]:
    """Whole rows run a part at a time, however few they are."""
    return attribute(showo2, "HARDLY_LONGER", 0.0)


def rest_uncompiled() -> AbstractContextManager[None]:
    """What is no block is dispatched operator by operator."""

    def as_it_is(self: Blocks, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    return attribute(Blocks, "compile", as_it_is)
