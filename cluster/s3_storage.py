"""Objects in S3 or a server that speaks it, through boto3.

Requests are retried by botocore (adaptive mode) and bodies that break off by this file. A PUT and a completed multipart
upload both appear whole or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import io
import mimetypes
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

from cluster.disk_errors import disk_error
from cluster.s3_errors import S3_ERRORS, error_code, is_missing, is_passing, reason
from cluster.storage import CREDENTIALS_BELONG, NotFound, S3Options, Storage, StorageError, check_key
from manifests.urls import holds_credentials

MULTIPART_SIZE = 64 * 2**20  # larger objects are written in parts, so that a broken connection costs one part
READ_AHEAD = 2**20  # a request takes about as long as transferring this much
REQUESTS_PER_ATTEMPT = 3  # botocore's own quick retries, which stop early when a client has used many of them
LONGEST_WAIT_S = 20.0

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """An object in a listing. `version` changes with its content."""

    key: str
    size: int
    version: str


class S3Storage(Storage):
    """Objects under `s3://bucket/prefix`."""

    def __init__(self, url: str, options: S3Options):
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if holds_credentials(url):
            raise StorageError(f"an s3:// URL holds credentials. {CREDENTIALS_BELONG}")
        if not re.fullmatch(r"[a-zA-Z0-9._-]{3,255}", bucket):
            raise StorageError(f"{url!r} names no bucket; write s3://bucket/prefix")
        prefix = prefix.strip("/")
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.options = options
        self._lock = threading.Lock()
        self._connected: tuple[int, Any] | None = None  # the process that made the client, and the client

    def __reduce__(self) -> tuple[type[S3Storage], tuple[str, S3Options]]:
        return S3Storage, (self.url, self.options)  # without the client: the other process makes its own

    def put(self, key: str, data: bytes) -> None:
        with self._errors("write", key):
            self._retrying(partial(self._put, key, data))

    def put_new(self, key: str, data: bytes) -> bool:
        # A retried PUT whose first answer was lost finds its own object there; the mark tells it from another's.
        mark = {"flashu-put": uuid.uuid4().hex}
        with self._errors("write", key):
            return self._retrying(partial(self._put_new, key, data, mark))

    def get(self, key: str) -> bytes:
        with self._errors("read", key):
            return self._retrying(partial(self._get, **self._address(key)))

    def open(self, key: str) -> BinaryIO:
        with self._errors("read", key):
            head = self._retrying(lambda: self._client.head_object(**self._address(key)))
        # The ETag holds readers to one version of an object that is replaced meanwhile.
        read = partial(self._read_range, key, head["ETag"])
        return io.BufferedReader(_RangeFile(read, head["ContentLength"]), READ_AHEAD)

    def exists(self, key: str) -> bool:
        try:
            with self._errors("look for", key):
                self._retrying(lambda: self._client.head_object(**self._address(key)))
        except NotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """The keys that begin with `prefix`, with their sizes and versions, in order."""
        request = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        while True:
            with self._errors("list", prefix):
                page = self._retrying(lambda: self._client.list_objects_v2(**request))
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(self.prefix)
                if key and not key.endswith("/"):  # some tools mark folders with an empty object
                    yield Entry(key, found["Size"], found["ETag"])
            if not page.get("NextContinuationToken"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        with self._errors("delete", key):
            self._retrying(lambda: self._client.delete_object(**self._address(key)))

    def download(self, key: str, path: Path) -> None:
        """Write an object to a local file, in parts at once when it is large."""
        with self._errors("read", key):
            try:
                self._retrying(lambda: self._client.download_file(self.bucket, self._full_key(key), str(path)))
            except OSError as error:
                if isinstance(error, S3_ERRORS):  # some of botocore's are both
                    raise
                raise disk_error("write", path, error) from None

    def check(self) -> None:
        # A wrong endpoint should be known in seconds.
        patience = replace(self.options, max_attempts=2, connect_timeout_s=min(5, self.options.connect_timeout_s))
        Storage.check(S3Storage(self.url, patience))

    @property
    def _client(self) -> Any:
        with self._lock:
            if self._connected is None or self._connected[0] != os.getpid():  # connections do not survive a fork
                self._connected = os.getpid(), _make_client(self.options)
            return self._connected[1]

    def _full_key(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _address(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._full_key(key)}

    def _get(self, **request: str) -> bytes:
        body: bytes = self._client.get_object(**request)["Body"].read()
        return body

    def _put(self, key: str, data: bytes) -> None:
        if len(data) <= MULTIPART_SIZE:
            self._client.put_object(**self._put_request(key, data))
            return
        self._client.upload_fileobj(
            io.BytesIO(data),
            self.bucket,
            self._full_key(key),
            ExtraArgs={"ContentType": _content_type(key)},
            Config=TransferConfig(multipart_threshold=MULTIPART_SIZE, multipart_chunksize=MULTIPART_SIZE // 4),
        )

    def _put_new(self, key: str, data: bytes, mark: dict[str, str]) -> bool:
        try:
            self._client.put_object(**self._put_request(key, data), IfNoneMatch="*", Metadata=mark)
        except ClientError as error:
            if error_code(error) != "PreconditionFailed":
                raise
            return bool(self._client.head_object(**self._address(key))["Metadata"] == mark)
        return True

    def _put_request(self, key: str, data: bytes) -> dict[str, Any]:
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        return {**self._address(key), "Body": data, "ContentType": _content_type(key), "ChecksumSHA256": checksum}

    def _read_range(self, key: str, version: str, start: int, end: int) -> bytes:
        request = {**self._address(key), "Range": f"bytes={start}-{end - 1}", "IfMatch": version}
        with self._errors("read", key):
            return self._retrying(partial(self._get, **request))

    def _retrying(self, call: Callable[[], T]) -> T:
        """Do something that may be done twice until no passing fault stops it; a body may break off half-read, too."""
        for attempt in range(1, self.options.max_attempts):
            try:
                return call()
            except S3_ERRORS as error:
                if not is_passing(error):
                    raise
                time.sleep(random.uniform(0, min(LONGEST_WAIT_S, 2.0 ** (attempt - 1))))
        return call()

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        """boto3's exceptions as one line for the user."""
        try:
            yield
        except S3_ERRORS as error:
            where = f"{self.url}/{key}" if key else self.url
            failure = NotFound if is_missing(error) else StorageError
            raise failure(f"cannot {verb} {where}: {reason(error, self._endpoint)}") from None

    @property
    def _endpoint(self) -> str:
        """The server's address as errors name it; one from the environment may hold a password."""
        if self._connected is None:
            return "S3"
        parts = urlsplit(self._connected[1].meta.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


class _RangeFile(io.RawIOBase):
    """An object as a seekable file without a buffer: every read is one request."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int):
        self._read_range, self._size, self._position = read_range, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._take(self._size)

    def _take(self, count: int) -> bytes:
        end = min(self._position + count, self._size)
        if end <= self._position:
            return b""
        data = self._read_range(self._position, end)
        self._position += len(data)
        return data


@cache
def _loader() -> Any:
    """Of the descriptions of AWS's services, which take most of a session's time."""
    return botocore.session.Session().get_component("data_loader")


def _make_client(options: S3Options) -> Any:
    config = Config(
        retries={"mode": "adaptive", "total_max_attempts": min(REQUESTS_PER_ATTEMPT, options.max_attempts)},
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=32,
        s3={"addressing_style": "path" if options.path_style else "auto"},
    )
    own = botocore.session.Session()  # the default session is not safe to use from threads
    own.register_component("data_loader", _loader())
    session = boto3.session.Session(botocore_session=own)
    return session.client("s3", region_name=options.region, endpoint_url=options.endpoint_url, config=config)


def _content_type(key: str) -> str:
    return _CONTENT_TYPES.get(Path(key).suffix) or mimetypes.guess_type(key)[0] or "application/octet-stream"


_CONTENT_TYPES = {  # those that Python's table lacks, or takes from the machine it runs on
    ".parquet": "application/vnd.apache.parquet",
    ".webp": "image/webp",
    ".md": "text/markdown; charset=utf-8",
    ".html": "text/html; charset=utf-8",
}
