"""Where files are: a path or an `s3://` URL to a file system and a sorted list of names, and plain errors.

It knows nothing of what is in a file. Credentials come from where AWS tools look for them (environment, profile,
instance role), never from a URL.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from operator import methodcaller
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from manifests.errors import ManifestError, UnreachableError, named
from manifests.s3_errors import BROKEN_OFF, NO_BUCKET, UNREACHABLE, UNTRUSTED, answer_of, meaning_of
from manifests.urls import holds_credentials

# "AWS Error NO_SUCH_KEY during GetObject operation: …" or, with a code that Arrow does not know, "AWS Error UNKNOWN
# (HTTP status 400) during GetObject operation: Unable to parse ExceptionName: ExpiredToken Message: …"
_S3_ERROR = re.compile(r"AWS Error (\[code \d+\]|\w+)(?: \(HTTP (?:status|response code) (\d+)\))?(.*)", re.DOTALL)
_NETWORK = (  # what curl says of a connection that came about
    (re.compile(r"curlCode: (35|60|77),"), UNTRUSTED),
    (re.compile(r"curlCode: (18|52|55|56),|Operation (too slow|timed out)"), BROKEN_OFF),
)
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN)  # of a network mount


@dataclass(frozen=True)
class FileSet:
    """Files under one root: `names` are relative to it, and sorted."""

    filesystem: fs.FileSystem
    root: str  # up to where the names begin: before a name, it makes the path
    label: str  # the root as the user named it
    names: tuple[str, ...]
    is_folder: bool


def open_filesystem(url: str, endpoint_url: str | None = None, region: str | None = None) -> tuple[fs.FileSystem, str]:
    """The file system that a path or URL means, and what the path is called there."""
    if "://" not in url:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(url)).rstrip("/") or "/"
    scheme, _, rest = url.partition("://")
    if scheme not in ("file", "s3"):  # the rest of which may hold a password
        raise ManifestError(f"there are local paths and s3://bucket/path, not {scheme}://")
    if holds_credentials(url):
        raise ManifestError(
            f"a {scheme}:// URL must not hold credentials; give them in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    if scheme == "file":
        return open_filesystem("/" + rest.lstrip("/"))
    path = rest.strip("/")
    bucket = path.partition("/")[0]
    if not bucket:
        raise ManifestError(f"{url}: no bucket; s3://bucket/path is needed")
    endpoint = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _s3(bucket if not endpoint and not region else None, endpoint, region), path


@lru_cache(maxsize=16)
def _s3(bucket: str | None, endpoint: str | None, region: str | None) -> fs.S3FileSystem:
    """One client for each place. `bucket` only where its region must be asked for."""
    place = {}
    if endpoint:
        if "@" in endpoint:
            raise ManifestError("the S3 endpoint must not hold credentials; give them in the environment")
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ManifestError(f"the S3 endpoint {endpoint} must look like http://host:port or https://host")
        place = {"scheme": parts.scheme, "endpoint_override": parts.netloc + parts.path.rstrip("/")}
    elif bucket:
        with plain_errors(f"s3://{bucket}"):
            region = fs.resolve_s3_region(bucket)
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=5)
    return fs.S3FileSystem(
        region=region or "us-east-1", connect_timeout=10, request_timeout=60, retry_strategy=retries, **place
    )


def find(url: str, suffixes: tuple[str, ...], **place: str | None) -> FileSet:
    """The files that a file, folder or glob means, at the `place` that `open_filesystem` takes.

    A folder means the files with these suffixes in it and in its folders; a glob (`*`, `?`, `[ab]`, `**/`) all that
    match. In both, names that begin with '.' or '_' do not count.
    """
    filesystem, path = open_filesystem(url, **place)
    with plain_errors(url):
        info = look_at(filesystem, path)
    if info.type == fs.FileType.File:
        name = path.rpartition("/")[2]
        root = path[: -len(name)]
        label = url.rstrip("/")[: -len(name)] if url.rstrip("/").endswith(name) else root
        return FileSet(filesystem, root, label, (name,), is_folder=False)
    is_glob = info.type == fs.FileType.NotFound and re.search(r"[*?\[]", path)
    if is_glob:
        root, label = _fixed_folder(path), _fixed_folder(url)
        deep, matches = "/" in path[len(root) :], _glob(path[len(root) :])
    elif info.type == fs.FileType.Directory:
        root, label = path.rstrip("/") + "/", url.rstrip("/") + "/"
        deep, matches = True, methodcaller("endswith", suffixes)
    else:
        bucket = path.partition("/")[0]
        lost = isinstance(filesystem, fs.S3FileSystem) and filesystem.get_file_info(bucket).type == info.type
        raise ManifestError(f"{url} does not exist" + (f": {NO_BUCKET.told()}" if lost else ""))
    with plain_errors(url):
        folder = fs.FileSelector(root.rstrip("/") or root, recursive=deep, allow_not_found=True)
        listed = filesystem.get_file_info(folder)
    inside = sorted(item.path[len(root) :] for item in listed if item.type == fs.FileType.File)
    names = tuple(name for name in inside if matches(name) and not re.search(r"(^|/)[._]", name))
    if not names:
        if is_glob:
            raise ManifestError(f"{url} matches no file")
        raise ManifestError(f"{url} holds no file that ends in {' or '.join(suffixes)}; it holds {named(inside)}")
    return FileSet(filesystem, root, label, names, is_folder=not is_glob)


def look_at(filesystem: fs.FileSystem, path: str) -> fs.FileInfo:
    """What is there, if anything; a refusal says why."""
    try:
        return filesystem.get_file_info(path)
    except OSError as error:
        if "ACCESS_DENIED" in str(error) or "status 400" in str(error):
            # Asked for one object, S3 refuses without saying why; asked for a list, it says.
            filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        raise


def _fixed_folder(pattern: str) -> str:
    """The folder that a glob begins with, with its slash."""
    start = re.split(r"[*?\[]", pattern)[0]
    return start[: start.rfind("/") + 1]


def _glob(pattern: str) -> Callable[[str], object]:
    """Whether a relative path matches a glob; '*' stays within one folder."""

    def expression(part: str) -> str:
        if part == "**/":
            return "(?:[^/]+/)*"
        if part[0] == "*":
            return "[^/]*"
        if part == "?":
            return "[^/]"
        if part[0] == "[" and len(part) > 1:
            return "[" + part[1:].replace("!", "^", 1)
        return re.escape(part)

    parts = re.split(r"(\*\*/|\*+|\?|\[[^]]+\])", pattern)
    try:
        return re.compile("".join(expression(part) for part in parts if part)).fullmatch
    except re.error:
        raise ManifestError(f"{pattern} is not a valid glob") from None


@contextmanager
def plain_errors(label: str, doing: str = "read") -> Iterator[None]:
    """Raise `ManifestError` for what a file system complains of; `UnreachableError` where the same may work later."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason, passing = reason_of(error)
        raise (UnreachableError if passing else ManifestError)(f"{label} cannot be {doing}: {reason}") from None


def reason_of(error: Exception) -> tuple[str, bool]:
    """What a file system's error comes to for a user, and whether it may pass."""
    text = str(error)
    if s3 := _S3_ERROR.search(text):
        return _s3_reason(*s3.groups(""))
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno), error.errno in _PASSING
    return text.splitlines()[0][:200] if text else type(error).__name__, False


def _s3_reason(code: str, status: str, details: str) -> tuple[str, bool]:
    if code == "UNKNOWN":
        name = re.search(r"ExceptionName: (\w+)", details)
        code = name[1] if name else status or code
    meaning = meaning_of(code, int(status or 0))
    if meaning is UNREACHABLE:
        meaning = next((kind for sign, kind in _NETWORK if sign.search(details)), meaning)
    region = re.search(r"bucket is located in '([\w-]+)'", details)  # where that is not the region asked
    return meaning.told(region=region[1] if region else "", answer=answer_of(code, int(status or 0))), meaning.passing
