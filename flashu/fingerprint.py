"""A short name for a model's weights: the same on every worker, device and number format."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

SAMPLES = 64  # evenly spaced values read from each parameter


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) over the parameters' names, shapes and a sample of their values, rounded to bfloat16.

    A copy of the model in float32, in bfloat16 and in float8 has one fingerprint. Made to tell models apart, not to
    detect tampering: most values are not read. Take it of a model that is not patched.
    """
    original = getattr(model, "original_fingerprint", None)
    if original is not None:
        return original
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.flatten()
        index = torch.linspace(0, len(values) - 1, min(SAMPLES, len(values)), dtype=torch.float64).long()
        sample = values[index.to(values.device)].to(torch.bfloat16).float().cpu()
        digest.update(json.dumps([name, list(parameter.shape)]).encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
