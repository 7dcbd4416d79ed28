"""What a run tells the person watching where it stands: a live line in a terminal, plain lines in a job's log."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichProgress

LOG_EVERY_S = 15.0
LOG_AGAIN_S = 60.0  # where nothing has changed since


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
