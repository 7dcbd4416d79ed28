"""Work that may fail, or that there may be no time for, with no harm to what was measured before it."""

from __future__ import annotations

import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from flashu.devices import is_device_error, is_out_of_memory
from flashu.errors import InputError


class Budget:
    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        return self._end - time.monotonic()


class OutOfTime(BaseException):
    """Time is up. Not an `Exception`, so that nothing on the way takes it for a failure of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Break off what is under way, by `OutOfTime`, once so many seconds are over; and by `SystemExit` on SIGTERM."""

    def over(_: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"broken off {seconds:.0f} s after it began")

    def told_to_end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGALRM, over), signal.signal(signal.SIGTERM, told_to_end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGTERM, before[1])


@dataclass(frozen=True)
class Failure:
    why: str
    out_of_memory: bool = False
    foreseen: bool = False  # a limit of the device or the model that its error explains


def one_line(error: Exception) -> str:
    """Its type, and the first line of what it says; where it says nothing, where it was raised."""
    said = str(error).strip().partition("\n")[0]
    if said.rstrip(":") in ("", "backend raised", type(error).__name__):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{said} raised in {Path(frame.filename).name}, line {frame.lineno}, {frame.name}".strip()
    return f"{type(error).__name__}: {said}"


class Attempts:
    """What was attempted, and of that what was left out. Entries name an arm and a batch size where there is one."""

    def __init__(self, device: torch.device, budget: Budget, on_change: Callable[[], None] = lambda: None):
        """`on_change` is called after every attempt, and when something was left out."""
        self.device, self.budget, self.on_change = device, budget, on_change
        self.left_out: dict[tuple[str, str | None, int | None], str] = {}  # what, arm, batch size: why

    def leave_out(self, what: str, why: str, arm: str | None = None, batch: int | None = None) -> None:
        self.left_out[what, arm, batch] = why
        self.on_change()

    def is_time_for(self, what: str, expected_s: float, arm: str | None = None, batch: int | None = None) -> bool:
        left_s = max(self.budget.left_s(), 0)
        if expected_s > left_s or left_s == 0:
            self.leave_out(what, f"no time: about {expected_s:.0f} s of {left_s:.0f} s left", arm, batch)
            return False
        return True

    def attempt(
        self, what: str, work: Callable[[], object], arm: str | None = None, batch: int | None = None
    ) -> Failure | None:
        """Do some work. What goes wrong is noted and returned; where the device does not survive it, also raised."""
        self.left_out.pop((what, arm, batch), None)
        failure = None
        try:
            work()
        except Exception as error:
            line = one_line(error)
            if is_device_error(error):
                self.leave_out(what, f"the device failed: {line}", arm, batch)
                raise
            if is_out_of_memory(error):
                failure = Failure("out of memory", out_of_memory=True)
            elif isinstance(error, InputError):
                failure = Failure(str(error), foreseen=True)
            else:
                traceback.print_exc()
                failure = Failure(line)
        if failure is None:
            self.on_change()
            return None
        # Outside the handler, whose traceback would hold on to the batch's tensors.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.leave_out(what, failure.why, arm, batch)
        return failure
