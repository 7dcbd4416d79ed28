"""The error of this package, and how a user's own text is shown inside one.

Whoever catches a `ManifestError` may print it alone, with no traceback: it says what was wrong, where, and what would
be right. It never holds credentials.
"""

from __future__ import annotations

from collections.abc import Sequence


class ManifestError(ValueError):
    """A manifest, or a source for one, cannot be used as it is."""


class UnreachableError(ManifestError):
    """A manifest cannot be reached now; it may well be later."""


def quoted(value: object, length: int = 60) -> str:
    """A value as one short line without control characters, whatever the user put into it."""
    return repr(shortened(str(value), length))


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def printable(value: object, length: int = 100) -> str:
    """A value on one line of a terminal, which it cannot control; shortened."""
    if value is None:
        return ""
    text = shortened(str(value), length)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def named(names: Sequence[str], most: int = 12) -> str:
    """Some names for an error: 'a, b, c and 8 more'."""
    shown = ", ".join(names[:most]) or "none"
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown
