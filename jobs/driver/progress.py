"""What a run tells the person watching: where it stands, as a live line in a terminal or plain lines in a job's log;
and one traceback of each kind of error that workers ran into, kept in the run's folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichProgress

from cluster.storage import Storage, StorageError
from cluster.tracebacks import Traceback

LOG_EVERY_S = 15.0
LOG_AGAIN_S = 60.0  # where nothing has changed since
LOGS = "logs/"
MOST_KINDS = 50  # of which a run keeps one each
AGAIN_S = 10.0  # before another of the same kind is written: every shard may fail alike


@dataclass(frozen=True)
class ProgressUpdate:
    """Where a run stands at one moment."""

    prompts: int  # finished: with all their images, or given up
    total_prompts: int
    images: int
    failed_prompts: int
    images_per_second: float | None
    eta_s: float | None
    workers: int
    starting: int

    @property
    def line(self) -> str:
        parts = [f"{self.prompts:,}/{self.total_prompts:,} prompts", f"{self.images:,} images"]
        if self.failed_prompts:
            parts.append(f"{self.failed_prompts:,} failed")
        if self.images_per_second:
            parts.append(f"{self.images_per_second:.3g} images/s")
        waiting = f" (+{self.starting} starting)" if self.starting else ""
        parts.append(f"{self.workers} worker{'s'[: self.workers != 1]}{waiting}")
        if self.eta_s is not None and self.prompts < self.total_prompts:
            parts.append(f"{duration(self.eta_s)} left")
        return " · ".join(parts)


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Shows updates and notes. A context; its `note`s stay on the screen."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.next_line = self.next_same = 0.0
        self.last: ProgressUpdate | None = None  # that was written

    def __enter__(self) -> Progress:
        if self.live:
            console = Console(file=self.stream, highlight=False)
            columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
            self.rich = RichProgress(*columns, console=console)
            self.task = self.rich.add_task("starting workers")
            self.rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.rich.stop()

    def show(self, update: ProgressUpdate) -> None:
        if self.live:
            self.rich.update(self.task, description=update.line, completed=update.prompts, total=update.total_prompts)
        elif (now := time.monotonic()) >= (self.next_line if update != self.last else self.next_same):
            self.next_line, self.next_same = now + LOG_EVERY_S, now + LOG_AGAIN_S
            self.last = update
            self._write(update.line)

    def note(self, text: str) -> None:
        if self.live:
            self.rich.console.print(text, markup=False)
        else:
            self._write(text)

    def _write(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=self.stream, flush=True)


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
