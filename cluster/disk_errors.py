"""What the operating system's errors mean for files on a disk or a network mount, in words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.storage import NotFound, StorageError

_FILE_IN_THE_WAY = "a part of this path is a file, where a folder is needed"
_NOT_ALLOWED = "this user may not do that there; change its permissions or choose another folder"
_REASONS = {
    errno.ENOSPC: "the disk is full (No space left on device)",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: "it lies on a read-only file system",
    errno.ENOTDIR: _FILE_IN_THE_WAY,
    errno.EEXIST: _FILE_IN_THE_WAY,  # from making the folder
    errno.EISDIR: "it is a folder, where a file is needed",
    errno.ENAMETOOLONG: "its name is too long for the file system",
}


def disk_error(verb: str, path: Path, error: OSError) -> StorageError:
    """An error of the operating system, in words."""
    if isinstance(error, FileNotFoundError):
        return NotFound(f"cannot {verb} {path}: it does not exist")
    reason = _REASONS.get(error.errno or 0) or error.strerror or error
    return StorageError(f"cannot {verb} {path}: {reason}")


@contextmanager
def plain_errors(verb: str, path: Path) -> Iterator[None]:
    """Raise `StorageError` for what the operating system complains of."""
    try:
        yield
    except OSError as error:
        raise disk_error(verb, path, error) from None
