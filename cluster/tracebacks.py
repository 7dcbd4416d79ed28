"""What a worker's error says in full, for whoever looks into it; and texts without the secrets that errors may hold."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import traceback
from dataclasses import dataclass
from datetime import datetime, timezone

# But not a tokenizer.
SECRET_NAME = re.compile("secret|token(?!i)|passw|credential|api_?key|access_?key|private_?key", re.IGNORECASE)
NO_SECRET_NAME = re.compile("_(path|file|dir|mode)$", re.IGNORECASE)  # such as RAY_AUTH_TOKEN_PATH
SHORTEST = 8  # letters of a secret; what is shorter may be part of any word
HIDDEN = "***"
SECRETS = [
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}\b"), HIDDEN),
    (re.compile(r"(?i)(x-amz-(?:signature|credential|security-token)=)[^&\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)([?&](?:\w*(?:signature|token|policy)|sig|key-pair-id)=)[^&\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)(\bbearer |authorization['\"]?[:=]\s*['\"]?basic )[\w+/=.~-]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(r"(\w://)[^/\s@'\"]+@"), rf"\1{HIDDEN}@"),
    (re.compile(rf"(?i)(\w*(?:{SECRET_NAME.pattern})\w*['\"]?\s*[:=]\s*b?)(['\"])[^'\"]+\2"), rf"\1\2{HIDDEN}\2"),
    (re.compile(rf"(?i)(\b\w*(?:{SECRET_NAME.pattern})\w*\s*=\s*)[\w+/.~-]{{8,}}(?![\w(.])"), rf"\1{HIDDEN}"),
]


@dataclass(frozen=True)
class Traceback:
    """What is known of an error in a worker."""

    kind: str  # the same for errors of one type from one place in the code; a name for a file
    line: str  # the error, as it is told
    text: str


def traceback_of(error: BaseException, doing: str, what: str, worker: str) -> Traceback:
    """Of an error that was just caught: `doing`, in a word, `what`."""
    whole, line = "".join(traceback.format_exception(error)), describe(error)
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    name = type(error).__name__
    number = hashlib.sha256(f"{doing} {type(error).__module__}.{name} {place}".encode()).hexdigest()[:8]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    head = f"{now}  {worker}  {doing}{what}\nThe worker's own log is at {own_log() or 'no file'}\n\n"
    kind = f"{doing}-{re.sub('[^A-Za-z0-9]', '_', name)[:60]}-{number}"
    return Traceback(kind, line, scrubbed(head + whole))


def describe(error: BaseException) -> str:
    """An error in a line, for lists of failures."""
    return scrubbed(" ".join(f"{type(error).__name__}: {error}".split()))[:1000]


def own_log() -> str:
    """Where this process writes what it has to say, as host:path; "" where that is no file."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return f"{socket.gethostname()}:{path}" if path.startswith("/") and not path.startswith("/dev/") else ""


def scrubbed(text: str) -> str:
    """Without the values of environment variables that are named like secrets, and what looks like a credential."""
    values = [
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and not NO_SECRET_NAME.search(name) and len(value) >= SHORTEST
    ]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text
