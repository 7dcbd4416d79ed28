"""Local paths of settings as workers take them, which run in another folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.settings.config import ModelSection


def absolute(path: str | None) -> str | None:
    """A path that means something here, made absolute; anything else as it is."""
    is_local = path and "://" not in path and Path(path).expanduser().exists()
    return os.path.abspath(os.path.expanduser(path)) if is_local else path


def absolute_model(model: Mapping[str, Any]) -> ModelSection:
    """The model section of a config, or of a run.json, likewise."""
    return ModelSection(**model | {name: absolute(model[name]) for name in ("path", "vae", "tokenizer")})
