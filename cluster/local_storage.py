"""Objects as files in a folder, which may be a network mount."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cluster.disk_errors import plain_errors
from cluster.storage import TEMPORARY, Storage, check_key

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalStorage(Storage):
    """A folder. Files are written under a hidden name, synced, and renamed."""

    def __init__(self, root: Path):
        self.root = Path(os.path.abspath(root))
        self.url = str(self.root)

    def put(self, key: str, data: bytes) -> None:
        with self._temporary(key, data) as (temporary, path):
            os.replace(temporary, path)

    def put_new(self, key: str, data: bytes) -> bool:
        with self._temporary(key, data) as (temporary, path):
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                # Some mounts have no hard links: still whole or not at all, but two callers at once may both get True.
                if path.exists():
                    return False
                os.replace(temporary, path)
        return True

    def get(self, key: str) -> bytes:
        with self.open(key) as file, plain_errors("read", self._path(key)):
            return file.read()

    def open(self, key: str) -> BinaryIO:
        with plain_errors("read", self._path(key)):
            return open(self._path(key), "rb")

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[str]:
        folder, slash, start = prefix.rpartition("/")
        return _walk(self._path(folder) if folder else self.root, folder + slash, start)

    def delete(self, key: str) -> None:
        with plain_errors("delete", self._path(key)):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextmanager
    def _temporary(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """The data under a hidden name beside its place, for the caller to move there; nothing stays of it."""
        path = self._path(key)
        temporary = path.with_name(TEMPORARY + uuid.uuid4().hex)
        with plain_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as file:  # not mkstemp, whose files others may not read
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary, path
                _sync_folder(path.parent)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make renames last through a power cut, in order: metadata must never outlive the payload it speaks of."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: Path, base: str, start: str = "") -> Iterator[str]:
    with plain_errors("list", folder), suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(start) or entry.name.startswith(TEMPORARY):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{base}{entry.name}/")
            else:
                yield base + entry.name
