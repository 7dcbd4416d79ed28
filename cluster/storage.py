"""Where a run's files live: one small interface over objects under a URL, the options of S3, and a folder on disk.

`open_storage` picks the class by the URL; S3 itself is in `s3_storage.py`. Storage knows keys and bytes, not what they
mean. Every put is atomic: a reader sees the whole object, the one before it, or none. That is what makes "the metadata
file exists" a safe sign of a committed shard.
"""

from __future__ import annotations

import errno
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

TEMPORARY = ".tmp-"  # how the names of half-written files begin; they are never listed


class StorageError(RuntimeError):
    """Storage could not do what was asked. The text is for the user, and holds no credentials."""


class NotFound(StorageError, LookupError):  # noqa: N818 - the state of an object, often expected
    """There is no object under this key."""


@dataclass(frozen=True)
class S3Options:
    """How to reach S3. Credentials are not here: they come from the environment, a profile or the machine's role."""

    endpoint_url: str | None = None  # for a server other than AWS
    region: str | None = None
    path_style: bool = False  # http://host/bucket/key instead of http://bucket.host/key
    max_attempts: int = 8  # each up to three requests; in all, an outage of half a minute to a minute is sat out
    connect_timeout_s: float = 10
    read_timeout_s: float = 60

    def __post_init__(self):
        if self.endpoint_url is None:
            return
        parts = urlsplit(self.endpoint_url)
        if "@" in self.endpoint_url or parts.query:
            raise StorageError(
                "storage.endpoint_url holds credentials. Remove them there, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment, or name a profile in AWS_PROFILE"
            )
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise StorageError(f"storage.endpoint_url is {self.endpoint_url!r}; it must begin with http:// or https://")


class Storage(ABC):
    """Objects under `url`. Keys are relative, with `/` between their parts. Picklable, and safe to use from threads."""

    url: str

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write a whole object or none, in place of an earlier one."""

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object if there is none. False when there is one; of many callers at once, one gets True."""

    @abstractmethod
    def get(self, key: str) -> bytes: ...

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A seekable file that fetches only what is read, and a little ahead."""

    @abstractmethod
    def exists(self, key: str) -> bool: ...

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that begin with `prefix`, in any order, as they arrive."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""

    def check(self) -> None:
        """Write, read, list and delete a small object, so that what is wrong is known before any work is done."""
        key, data = f".flashu-check-{uuid.uuid4().hex}", os.urandom(32)
        self.put(key, data)
        try:
            if self.get(key) != data:
                raise StorageError(f"{self.url} gives back other bytes than were written")
            if key not in self.list(key):
                raise StorageError(f"{self.url} does not list what was written")
        finally:
            self.delete(key)


def open_storage(url: str, s3: S3Options | None = None) -> Storage:
    """A local path, `file:///path` or `s3://bucket/prefix`. Touches nothing yet; `check` does."""
    scheme, separator, rest = url.partition("://")
    if not url:
        raise StorageError("a storage path is empty; give a folder or s3://bucket/prefix")
    if not separator:
        return LocalStorage(Path(url).expanduser())
    if scheme == "file":
        if not rest.startswith("/"):
            raise StorageError("a file:// URL names a host; a local path is written file:///path")
        return LocalStorage(Path(unquote(rest)))
    if scheme == "s3":
        from cluster.s3_storage import S3Storage  # boto3 takes half a second to import

        return S3Storage(url, s3 or S3Options())
    raise StorageError(
        f"storage of the kind {scheme}:// is not known; use a local path, file:// or s3:// "
        "(with storage.endpoint_url for other servers that speak S3)"
    )


def check_key(key: str) -> str:
    """Return a key that stays under its URL; keys are made by code, so another kind is a bug."""
    parts = key.split("/")
    if "\0" in key or any(part in ("", ".", "..") for part in parts) or parts[-1].startswith(TEMPORARY):
        raise ValueError(f"{key!r} cannot be a storage key: it must be relative, without empty, '.' or '..' parts")
    return key


class LocalStorage(Storage):
    """A folder, which may be a network mount. Files are written under a hidden name, synced, and renamed."""

    def __init__(self, root: Path):
        self.root = Path(os.path.abspath(root))
        self.url = str(self.root)

    def put(self, key: str, data: bytes) -> None:
        with self._written(key, data) as (temporary, path):
            os.replace(temporary, path)

    def put_new(self, key: str, data: bytes) -> bool:
        with self._written(key, data) as (temporary, path):
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
        with self.open(key) as file, _local_errors("read", self._path(key)):
            return file.read()

    def open(self, key: str) -> BinaryIO:
        with _local_errors("read", self._path(key)):
            return open(self._path(key), "rb")

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[str]:
        folder, slash, start = prefix.rpartition("/")
        return _walk(self._path(folder) if folder else self.root, folder + slash, start)

    def delete(self, key: str) -> None:
        with _local_errors("delete", self._path(key)):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """The data under a hidden name beside its place, for the caller to move there; nothing stays of it."""
        path = self._path(key)
        temporary = path.with_name(TEMPORARY + uuid.uuid4().hex)
        with _local_errors("write", path):
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
    with _local_errors("list", folder), suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(start) or entry.name.startswith(TEMPORARY):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{base}{entry.name}/")
            else:
                yield base + entry.name


_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_FILE_IN_THE_WAY = "a part of this path is a file, where a folder is needed"
_NOT_ALLOWED = "this user may not do that there; change its permissions or choose another folder"
_LOCAL_REASONS = {
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
    return StorageError(f"cannot {verb} {path}: {_LOCAL_REASONS.get(error.errno, error.strerror or error)}")


@contextmanager
def _local_errors(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(verb, path, error) from None
