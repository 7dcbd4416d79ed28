"""What Arrow's file systems complain of, told in one line that names the file and holds no credentials."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from manifests.errors import ManifestError, UnreachableError
from manifests.s3_errors import BROKEN_OFF, UNREACHABLE, UNTRUSTED, answer_of, meaning_of

# "AWS Error NO_SUCH_KEY during GetObject operation: …" or, with a code that Arrow does not know, "AWS Error UNKNOWN
# (HTTP status 400) during GetObject operation: Unable to parse ExceptionName: ExpiredToken Message: …"
_S3_ERROR = re.compile(r"AWS Error (\[code \d+\]|\w+)(?: \(HTTP (?:status|response code) (\d+)\))?(.*)", re.DOTALL)
_NETWORK = (  # what curl says of a connection that came about
    (re.compile(r"curlCode: (35|60|77),"), UNTRUSTED),
    (re.compile(r"curlCode: (18|52|55|56),|Operation (too slow|timed out)"), BROKEN_OFF),
)
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN)  # of a network mount


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
