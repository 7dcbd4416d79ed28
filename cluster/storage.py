"""Where a run's files live: one small interface over objects under a URL, and what is told to reach them.

A folder on disk is in `local_storage`, S3 in `s3_storage`, and `open_storage` picks by the URL. Storage knows keys and
bytes, not what they mean. Every put is atomic: a reader sees the whole object, the one before it, or none. That is what
makes "the metadata file exists" a safe sign of a committed shard.
"""

from __future__ import annotations

import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import urlsplit

TEMPORARY = ".tmp-"  # how the names of half-written files begin; they are never listed
CREDENTIALS_BELONG = (
    "Remove them there, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, "
    "or name a profile in AWS_PROFILE"
)


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

    def __post_init__(self) -> None:
        if self.endpoint_url is None:
            return
        parts = urlsplit(self.endpoint_url)
        if "@" in self.endpoint_url or parts.query:
            raise StorageError(f"storage.endpoint_url holds credentials. {CREDENTIALS_BELONG}")
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
    def get(self, key: str) -> bytes:
        """A whole object. Raises `NotFound`."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A seekable file that fetches only what is read, and a little ahead."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object under this key."""

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


def check_key(key: str) -> str:
    """Return a key that stays under its URL; keys are made by code, so another kind is a bug."""
    parts = key.split("/")
    if "\0" in key or any(part in ("", ".", "..") for part in parts) or parts[-1].startswith(TEMPORARY):
        raise ValueError(f"{key!r} cannot be a storage key: it must be relative, without empty, '.' or '..' parts")
    return key
