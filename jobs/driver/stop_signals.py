"""Signals that ask a driver to stop, and how soon."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

from cluster.stop import Stop


class StopSignals:
    """While entered: the first Ctrl-C asks for a stop soon, a second one, or SIGTERM, for a stop now."""

    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell
        self.stop = Stop.NO
        self.exit_code = 0  # 128 + the signal's number, by custom
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 128 + number
        if number == signal.SIGINT and self.stop is Stop.NO:
            self.stop = Stop.SOON
            self.tell("Finishing the shards in flight. Ctrl-C again stops at once.")
        elif self.stop is not Stop.NOW:
            self.stop = Stop.NOW
            self.tell("Stopping. What is committed stays; the same command goes on from there.")
