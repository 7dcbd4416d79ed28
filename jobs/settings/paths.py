"""Paths of settings: whether one is of something here, and how workers take it, which run in another folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.settings.config import ModelSection


def local(path: str) -> Path | None:
    """The path, if there is something there on this machine."""
    try:
        found = None if "://" in path else Path(path).expanduser()
        return found if found and found.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a path; no such home; a null character
        return None


def absolute(path: str | None) -> str | None:
    """A path that means something here, made absolute; anything else as it is."""
    return os.path.abspath(local(path)) if path and local(path) else path


def absolute_model(model: Mapping[str, Any]) -> ModelSection:
    """The model section of a config, or of a run.json, likewise."""
    return ModelSection(**model | {name: absolute(model[name]) for name in ("path", "vae", "tokenizer")})
