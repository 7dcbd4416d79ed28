"""What a node keeps on its disk so that its processes need not fetch, measure or compile it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

CACHE_VARIABLE = "FLASHU_CACHE"


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, else `$FLASHU_CACHE`, else `~/.cache/flashu`; not made yet."""
    return Path(cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/flashu").expanduser()


def name_of(kind: Mapping[str, Any]) -> str:
    """A file's name for what is kept for this `kind`, and for no other."""
    return hashlib.sha256(json.dumps(kind, sort_keys=True, default=str).encode()).hexdigest()[:32]


@contextmanager
def lock_if_possible(file: Path) -> Iterator[None]:
    """Hold a lock beside `file` that a node's processes share; go on without where there can be none, as on a disk
    that cannot be written."""
    lock = FileLock(f"{file}.lock", poll_interval=0.2)
    with suppress(OSError, NotImplementedError):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
