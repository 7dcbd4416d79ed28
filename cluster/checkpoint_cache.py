"""A checkpoint in S3 as a folder on this node, fetched once however many workers the node has.

A copy is kept under a hash of its URL and of the names, sizes and versions found there, so a changed source is fetched
anew. It appears under that name when it is complete; a process killed halfway leaves a partial folder, which the next
one starts over, and a lock that the operating system frees. Copies are never removed: delete the cache to make room.

Hub ids are not fetched here. `huggingface_hub` keeps its own cache, and takes a lock for each file, so workers that ask
for one id at once are safe too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from cluster.disk_errors import plain_errors
from cluster.node_cache import CACHE_VARIABLE, cache_folder
from cluster.storage import S3Options, StorageError, check_key

if TYPE_CHECKING:
    from cluster.s3_storage import Entry, S3Storage

FILES_AT_ONCE = 4  # each in up to ten parts

log = logging.getLogger(__name__)


def local_copy(url: str, s3: S3Options | None = None, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Where `url` can be read on this node. What is not `s3://` (a folder, a hub id) is returned as it is.

    `url` may be a folder or a single object, whose name the copy keeps. `cache_dir` is `$FLASHU_CACHE` or
    `~/.cache/flashu` unless given. Raises `StorageError`.
    """
    if not url.startswith("s3://"):
        return url
    cache = cache_folder(cache_dir) / "s3"
    storage, entries, name = _find(url, s3 or S3Options())
    listing = json.dumps([storage.url, sorted((entry.key, entry.size, entry.version) for entry in entries)])
    folder = cache / hashlib.sha256(listing.encode()).hexdigest()[:32]
    if not folder.exists():
        with plain_errors("write", cache):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock", poll_interval=0.2):
                if not folder.exists():
                    _fetch(storage, entries, folder)
    return str(folder / name if name else folder)


def _find(url: str, s3: S3Options) -> tuple[S3Storage, Sequence[Entry], str | None]:
    """The storage, its objects to fetch, and the object's name if `url` is one object rather than a folder."""
    from cluster.s3_storage import S3Storage  # boto3 takes long to import, and most models are not there

    storage = S3Storage(url, s3)
    entries = list(storage.entries())
    if entries:
        _refuse_strange_names(storage, entries)
        return storage, entries, None
    parent, _, name = storage.url.rpartition("/")
    if name and parent != "s3:/":
        storage = S3Storage(parent, s3)
        entries = [entry for entry in storage.entries(name) if entry.key == name]
    if not entries:
        raise StorageError(f"cannot read {url}: there is neither a folder nor an object of that name")
    return storage, entries, name


def _refuse_strange_names(storage: S3Storage, entries: Sequence[Entry]) -> None:
    for entry in entries:
        try:
            check_key(entry.key)
        except ValueError:
            raise StorageError(f"{storage.url} holds {entry.key!r}, which is no name of a file") from None


def _fetch(storage: S3Storage, entries: Sequence[Entry], folder: Path) -> None:
    size = sum(entry.size for entry in entries)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise StorageError(
            f"cannot fetch {storage.url}: it takes {size / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB "
            f"left; make room, or set {CACHE_VARIABLE} to a folder on a larger disk"
        )
    log.info("fetching %s: %d files, %.2f GB", storage.url, len(entries), size / 1e9)
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)

    def fetch(entry: Entry) -> None:
        path = partial / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.download(entry.key, path)
        if path.stat().st_size != entry.size:
            raise StorageError(f"{storage.url}/{entry.key} was replaced while it was fetched; start again")

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(fetch, entries))
    partial.rename(folder)
