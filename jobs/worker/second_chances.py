"""Batches and their second chances: halved when memory runs out, prompt by prompt when they raise, a prompt once more.

How a batch is made, and what is kept of its images, is the caller's. Nothing here knows of models, files or storage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from cluster.tracebacks import Traceback, describe, traceback_of
from cluster.work import Place, WorkerBrokenError
from flashu.devices import is_device_error, is_out_of_memory
from flashu.errors import InputError
from jobs.worker.batches import ImageRequest

Image = TypeVar("Image")  # what is kept of one

Running = Callable[[Sequence[int]], None]
"""Told the items that are about to be run, so that a death can be laid at their door."""


class Pending(Protocol):
    """A batch that was begun."""

    @property
    def done(self) -> bool:
        """Whether the device is done with it."""

    def wait(self) -> object:
        """Wait for the device. Raises what failed on it."""


@dataclass
class Outcome(Generic[Image]):
    """What came of a shard's batches."""

    made: list[tuple[ImageRequest, Image]] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)  # by item: why it was given up
    under_way: tuple[set[int], Pending] | None = None  # the last batch and its items, if the device still works at it

    @property
    def items_under_way(self) -> set[int]:
        return self.under_way[0] if self.under_way else set()

    def finish(self) -> bool:
        """Wait for the batch that is under way; whether there was one. Raises what failed on the device."""
        batch, self.under_way = self.under_way, None
        if batch:
            batch[1].wait()
        return batch is not None


@dataclass(frozen=True)
class _Failure:
    """Why a batch was not made."""

    error: Exception
    traceback: Traceback

    @property
    def is_of_memory(self) -> bool:
        return is_out_of_memory(self.error)

    @property
    def is_of_input(self) -> bool:
        """Whether another try would end alike."""
        return isinstance(self.error, InputError)


class SecondChances(Generic[Image]):
    """Makes batches, each begun before the one before it is waited for. What it learns of a worker's memory holds for
    the shards that follow."""

    def __init__(
        self,
        begin: Callable[[list[ImageRequest]], Pending],
        keep: Callable[[list[ImageRequest], Pending], list[Image]],
        batch_size: int,
        place: Place,
    ):
        """`begin` begins a batch, and `keep` takes its images, each as something that is done with when that suits it.

        `place` is told the traceback of an item that is given up.
        """
        self.begin, self.keep, self.batch_size, self.place = begin, keep, batch_size, place
        self.one_at_a_time = False  # whether there is too little memory to begin a batch beside another

    def make(self, batches: Iterable[list[ImageRequest]], alone: Collection[int], running: Running) -> Outcome[Image]:
        """Make batches, those of the items in `alone` with nothing beside them.

        Raises `WorkerBrokenError` when the device failed, or has too little memory for a single image.
        """
        outcome: Outcome[Image] = Outcome()
        for batch in batches:
            if batch[0].item in alone:  # which may bring down the device, and nothing else with it
                self._finish(outcome)
            self._run(batch, outcome, running)
        self._finish(outcome)
        return outcome

    def _run(self, batch: list[ImageRequest], outcome: Outcome[Image], running: Running) -> None:
        """Make a batch's images; halve it when memory runs out, and run its prompts one by one when it raises."""
        batch = [request for request in batch if request.item not in outcome.failures]
        if len(batch) > self.batch_size:  # which has shrunk since, and may shrink again here
            size = self.batch_size
            for start in range(0, len(batch), size):
                self._run(batch[start : start + size], outcome, running)
            return
        items = sorted({request.item for request in batch})
        if not items:
            return
        if self.one_at_a_time:
            self._finish(outcome)
        running(sorted(outcome.items_under_way.union(items)))
        failure = self._attempt(batch, outcome)
        if failure and failure.is_of_memory and self._finish(outcome):  # what was under way took memory too
            self.one_at_a_time = True
            failure = self._attempt(batch, outcome)
        if failure and failure.is_of_memory:
            if len(batch) == 1:
                raise WorkerBrokenError(str(failure.error))
            self.batch_size = max(1, len(batch) // 2)
            self._run(batch, outcome, running)
        elif failure and len(items) > 1:
            for item in items:
                self._run([request for request in batch if request.item == item], outcome, running)
        elif failure:
            self._try_again(items[0], batch, failure, outcome)

    def _try_again(self, item: int, batch: list[ImageRequest], first: _Failure, outcome: Outcome[Image]) -> None:
        """A prompt that raised by itself gets a second chance, and is given up after that, with all its images."""
        last: _Failure | None = first
        if not first.is_of_input:
            self._finish(outcome)
            last = self._attempt(batch, outcome)
        if not last:
            return
        if last.is_of_memory:
            raise WorkerBrokenError(str(last.error))
        if not last.is_of_input:
            self.place.tell(last.traceback)
        outcome.failures[item] = describe(last.error)
        outcome.made = [(request, image) for request, image in outcome.made if request.item != item]

    def _attempt(self, batch: list[ImageRequest], outcome: Outcome[Image]) -> _Failure | None:
        """Make a batch's images, or return why not. Raises `WorkerBrokenError` when the device failed."""
        try:
            with _device_that_may_fail():
                self._make(batch, outcome)
        except WorkerBrokenError:
            raise
        except Exception as error:
            traceback = traceback_of(error, "prompt", "", self.place.worker)
            return _Failure(error.with_traceback(None), traceback)  # its own would hold on to the batch's tensors
        return None

    def _make(self, batch: list[ImageRequest], outcome: Outcome[Image]) -> None:
        """On return, the device works at no other batch."""
        pending = self.begin(batch)
        outcome.finish()
        outcome.made += zip(batch, self.keep(batch, pending), strict=True)
        if not pending.done:
            outcome.under_way = {request.item for request in batch}, pending

    def _finish(self, outcome: Outcome[Image]) -> bool:
        """As `Outcome.finish`. Raises `WorkerBrokenError` when the device failed."""
        with _device_that_may_fail():
            return outcome.finish()


@contextmanager
def _device_that_may_fail() -> Iterator[None]:
    """What it raises when it does, as `WorkerBrokenError`."""
    try:
        yield
    except Exception as error:
        if is_device_error(error):
            raise WorkerBrokenError(describe(error)) from error
        raise
