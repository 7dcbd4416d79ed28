"""The networks. `from flashu.models import Showo2Qwen2_5` is the drop-in for the release's `from models import …`.

Names below are imported on first use, so that what needs no torch in this folder does not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashu.pretrained import Showo2Qwen2_5, WanImageVAE
    from flashu.tokenizer import PromptTokenizer

_HOMES = {
    "PromptTokenizer": "flashu.tokenizer",
    "Showo2Qwen2_5": "flashu.pretrained",
    "WanImageVAE": "flashu.pretrained",
}

__all__ = ["PromptTokenizer", "Showo2Qwen2_5", "WanImageVAE"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flashu.models' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
