"""The last traceback of each kind of error that workers ran into, kept in the run's folder."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from cluster.storage import Storage, StorageError
from cluster.tracebacks import Traceback

LOGS = "logs/"
MOST_KINDS = 50  # of which a run keeps one each


class Tracebacks:
    """Written as they come, and named beside the lines that tell of them."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.places: dict[str, str] = {}  # by the error's line
        self._kinds: set[str] = set()

    def keep(self, found: Iterable[Traceback]) -> None:
        for one in found:
            if one.kind not in self._kinds and len(self._kinds) >= MOST_KINDS:
                continue
            with suppress(StorageError):  # the line is told all the same
                key = f"{LOGS}{one.kind}.txt"
                self.storage.put(key, one.text.encode("utf-8", "backslashreplace"))
                self._kinds.add(one.kind)
                self.places[one.line] = f"{self.storage.url}/{key}"

    def beside(self, text: str) -> str:
        """A text that tells of an error, with the place of its traceback, if it is kept."""
        place = next((place for line, place in self.places.items() if line in text), None)
        return f"{text} (traceback: {place})" if place else text
