"""One traceback of each kind of error that workers ran into, kept in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress

from cluster.storage import Storage, StorageError
from cluster.tracebacks import Traceback

LOGS = "logs/"
MOST_KINDS = 50  # of which a run keeps one each
AGAIN_S = 10.0  # before another of the same kind is written: every shard may fail alike


class Tracebacks:
    """Written as they come, and named beside the lines that tell of them."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.places: dict[str, str] = {}  # by the error's line
        self._kinds: dict[str, float] = {}  # that are kept, and from when on the next of them is

    def keep(self, found: Iterable[Traceback]) -> None:
        for one in found:
            if one.kind not in self._kinds and len(self._kinds) >= MOST_KINDS:
                continue
            key, now = f"{LOGS}{one.kind}.txt", time.monotonic()
            if now >= self._kinds.get(one.kind, now):
                with suppress(StorageError):  # the line is told all the same
                    self.storage.put(key, one.text.encode("utf-8", "backslashreplace"))
                    self._kinds[one.kind] = now + AGAIN_S
            if one.kind in self._kinds:
                if len(self.places) >= MOST_KINDS:
                    self.places.pop(next(iter(self.places)))
                self.places[one.line] = f"{self.storage.url}/{key}"

    def beside(self, text: str) -> str:
        """A text that tells of an error, with the place of its traceback, if it is kept."""
        lines = [line for line in self.places if line in text]
        place = self.places[max(lines, key=len)] if lines else None
        return f"{text} (traceback: {place})" if place else text
