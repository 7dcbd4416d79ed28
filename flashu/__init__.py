"""FlashU: Show-o2, from a prompt to a picture, at the least exact cost.

One process, one device. Names below are imported on first use, so that `import flashu` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashu.errors import CheckpointError, InputError, OutOfMemoryError
    from flashu.models import Showo2Qwen2_5
    from flashu.pipeline import TextToImagePipeline

_HOMES = {
    "CheckpointError": "flashu.errors",
    "InputError": "flashu.errors",
    "OutOfMemoryError": "flashu.errors",
    "Showo2Qwen2_5": "flashu.models",
    "TextToImagePipeline": "flashu.pipeline",
}

__all__ = ["CheckpointError", "InputError", "OutOfMemoryError", "Showo2Qwen2_5", "TextToImagePipeline"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flashu' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
