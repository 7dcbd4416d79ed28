"""Which device and number format to run in: names from a user to torch objects, with errors that help."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashu.errors import InputError, OutOfMemoryError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FLOAT8 = "float8"  # bfloat16, but for the FFNs: see `flashu.models.float8`


def resolve_device(device: torch.device | str | None) -> torch.device:
    """A device that exists, one GPU by its number. None picks CUDA where there is one, else the CPU.

    Raises `InputError`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}; there is: {_available()}") from None
    if resolved.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {device!r} is not supported; there is: {_available()}")
    missing = (resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count()) or (
        resolved.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise InputError(f"device {str(device)!r} is not there; there is: {_available()}")
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device, name: str = "dtype") -> torch.dtype:
    """A number format to run in. None picks bfloat16 on CUDA and float32 elsewhere; float8 is bfloat16 here.

    Raises `InputError` under the setting's `name`.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype == FLOAT8:
        return torch.bfloat16
    named = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if named is None or named not in DTYPES.values():
        raise InputError(f"{name} {dtype} is not supported; choose one of: {', '.join((*DTYPES, FLOAT8))}")
    return named


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the host's on `device`. A GPU is not waited for: it copies when it comes to it."""
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


def send_numbers(device: torch.device, *values: Any) -> list[Tensor]:
    """Whole numbers, each of `values` in a list or a list of lists, as int64 tensors on `device`: in one copy."""
    tensors = [torch.tensor(value, dtype=torch.int64, device="cpu") for value in values]
    if not tensors:
        return []
    sent = send(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = sent.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or in the CPU's allocator, in our own network or in another's."""
    signs = (
        "can't allocate memory",
        "Storage size calculation overflowed",
        "CUDA out of memory",  # as the compiler passes it on
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    known = (OutOfMemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or any(sign in str(error) for sign in signs)


def is_device_error(error: Exception) -> bool:
    """Whether a GPU failed in a way that this process does not recover from: each later call would raise too."""
    signs = ("CUDA error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "device-side assert", "NCCL error")
    refused = "_STATUS_NOT_SUPPORTED" in str(error)  # by a library that was asked for what it cannot do
    return not (refused or is_out_of_memory(error)) and any(sign in str(error) for sign in signs)


def _available() -> str:
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return ", ".join(names + (["mps"] if torch.backends.mps.is_available() else []))
