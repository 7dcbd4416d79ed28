"""FlashU: Show-o2, from prompts to pictures and from questions to answers, as it was released and accelerated.

One process, one device. Names below are imported on first use, so that `import flashu` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashu.acceleration.applied import remove_flashu_patch
    from flashu.acceleration.wanda import WandaScores
    from flashu.calibration import calibrate, calibrate_understanding
    from flashu.config import FLASHU_PRESETS, FlashUConfig
    from flashu.errors import CheckpointError, InputError, OutOfMemoryError
    from flashu.patch import apply_flashu_patch
    from flashu.pipeline import TextToImagePipeline
    from flashu.pretrained import Showo2Qwen2_5

_HOMES = {
    "CheckpointError": "flashu.errors",
    "FLASHU_PRESETS": "flashu.config",
    "FlashUConfig": "flashu.config",
    "InputError": "flashu.errors",
    "OutOfMemoryError": "flashu.errors",
    "Showo2Qwen2_5": "flashu.pretrained",
    "TextToImagePipeline": "flashu.pipeline",
    "WandaScores": "flashu.acceleration.wanda",
    "apply_flashu_patch": "flashu.patch",
    "calibrate": "flashu.calibration",
    "calibrate_understanding": "flashu.calibration",
    "remove_flashu_patch": "flashu.acceleration.applied",
}

__all__ = [
    "FLASHU_PRESETS",
    "CheckpointError",
    "FlashUConfig",
    "InputError",
    "OutOfMemoryError",
    "Showo2Qwen2_5",
    "TextToImagePipeline",
    "WandaScores",
    "apply_flashu_patch",
    "calibrate",
    "calibrate_understanding",
    "remove_flashu_patch",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flashu' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
