"""The storage that a URL means."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from cluster.local_storage import LocalStorage
from cluster.storage import S3Options, Storage, StorageError


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
