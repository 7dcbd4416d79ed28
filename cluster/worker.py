"""A worker: the Ray actor that pulls leases and does a job's work on them, three shards at a time.

prefetch thread     lease 3: read
main thread                     lease 2: process
writer thread                                       lease 1: encode, write, commit
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.storage import StorageError
from cluster.tracebacks import Traceback, describe, own_log, scrubbed, traceback_of
from cluster.work import Lease, Place, SetupError, ShardWork, Times, WorkerBrokenError

BACKOFF_S = (1.0, 30.0)  # first and longest wait between tries to read or write
BEAT_S = 1.0
_NONE = object()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """How a worker's life ended by its own account."""

    error: str = ""  # "" when there was nothing left to do
    hopeless: bool = False  # whether another worker would fare alike


class Worker:
    """`run` until the queue has nothing left. An error of the job's code is the lease's, not the worker's."""

    def __init__(self, work: ShardWork, queue: ActorHandle[Any], name: str, gpus: float, storage_patience_s: float):
        self.work, self.queue, self.storage_patience_s = work, queue, storage_patience_s
        self.place = Place(name, socket.gethostname(), gpus, self._tell)
        self.end = Ended()

    def run(self) -> Ended:
        try:
            self.end = self._run()
        except Exception as error:
            self._tell(traceback_of(error, "work", "", self.place.worker))
            raise
        return self.end

    def ended(self) -> Ended:
        """What `run` returned, for a driver that lost sight of this worker. Answers after `run`, like any actor."""
        return self.end

    def _run(self) -> Ended:
        name = self.place.worker
        ray.get(self.queue.arrived.remote(name, ray.get_runtime_context().get_node_id(), own_log()))
        try:
            identity = self.work.setup(self.place)
        except SetupError as error:
            return Ended(scrubbed(str(error)), hopeless=True)
        except Exception as error:
            self._tell(traceback_of(error, "set-up", "", name))
            return Ended(describe(error))
        if refusal := ray.get(self.queue.ready.remote(name, identity)):
            return Ended(refusal, hopeless=True)
        prefetch = ThreadPoolExecutor(1, "prefetch")
        with ThreadPoolExecutor(1, "writer") as writer:
            try:
                self._work_through(prefetch, writer)
            except WorkerBrokenError as error:
                return Ended(str(error))
            finally:
                prefetch.shutdown(wait=False)  # it may be waiting for a lease that this worker will never run
        return Ended()

    def _work_through(self, prefetch: ThreadPoolExecutor, writer: ThreadPoolExecutor) -> None:
        upcoming = prefetch.submit(self._next)
        writing: Future[None] | None = None
        idle_since = time.perf_counter()
        while (arrived := upcoming.result()) is not None:
            lease, inputs, read_s = arrived
            # What was begun before and not finished runs by itself, so that no other shard is blamed with it again.
            by_itself = lease.attempt > 1
            if by_itself:
                _wait_for(writing)
            else:
                upcoming = prefetch.submit(self._next)
            if ray.get(self.queue.start.remote(lease.id)):
                started_at, start = time.time(), time.perf_counter()
                results = self._process(lease, inputs)
                done = time.perf_counter()
                if results is not _NONE:
                    _wait_for(writing)  # one shard's results wait at most, beside the ones being written
                    times = Times(started_at, read_s, start - idle_since, done - start)
                    writing = writer.submit(self._write, lease, results, times)
                idle_since = done
            if by_itself:
                _wait_for(writing)
                upcoming = prefetch.submit(self._next)
        _wait_for(writing)

    def _process(self, lease: Lease, inputs: Any) -> Any:
        """The shard's results, or `_NONE` if processing raised."""
        try:
            results = self.work.process(lease, inputs, self._running(lease))
        except Exception as error:
            self._fail(lease, error)
            if isinstance(error, WorkerBrokenError):
                raise
            return _NONE
        self.queue.processed.remote(lease.id)
        return results

    def _next(self) -> tuple[Lease, Any, float] | None:
        """The next lease with its inputs, or None when there will be none."""
        wait, longest = BACKOFF_S
        while (lease := ray.get(self.queue.lease.remote(self.place.worker))) is not None:
            start = time.perf_counter()
            try:
                with self._beating(lease):
                    inputs = self._patiently(partial(self.work.read, lease))
            except StorageError as error:
                self._without_storage(f"shard {lease.shard} could not be read: {error}")
            except Exception as error:
                self._fail(lease, error)
                time.sleep(wait)
                wait = min(2 * wait, longest)
            else:
                return lease, inputs, time.perf_counter() - start
        return None

    def _running(self, lease: Lease) -> Callable[[Sequence[int]], None]:
        # Waits for the answer: what runs next may end this process before a message without one has left it.
        return lambda items: ray.get(self.queue.running.remote(lease.id, list(items)))

    def _write(self, lease: Lease, results: Any, times: Times) -> None:
        try:
            with self._beating(lease):
                encoded = self.work.encode(results)
                if ray.get(self.queue.may_commit.remote(lease.id)):
                    report = self._patiently(partial(self.work.write, lease, encoded, times))
                    ray.get(self.queue.committed.remote(lease.id, lease.shard, report))
        except StorageError as error:
            self._without_storage(f"shard {lease.shard} could not be written: {error}")
        except Exception as error:
            self._fail(lease, error)

    def _patiently(self, act: Callable[[], Any]) -> Any:
        """Read or write, again and again while storage fails: what was computed is worth more than the wait."""
        give_up_at = time.monotonic() + self.storage_patience_s
        wait, longest = BACKOFF_S
        while True:
            try:
                return act()
            except StorageError:
                if time.monotonic() + wait > give_up_at:
                    raise
            time.sleep(wait)
            wait = min(2 * wait, longest)

    @contextmanager
    def _beating(self, lease: Lease) -> Iterator[None]:
        """Give signs of life for a lease that waits for storage; not for ever, as storage may hang for good."""
        done = threading.Event()

        def beat() -> None:
            give_up_at = time.monotonic() + self.storage_patience_s
            while not done.wait(BEAT_S) and time.monotonic() < give_up_at:
                self.queue.alive.remote(lease.id)

        threading.Thread(target=beat, name="beat", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _fail(self, lease: Lease, error: Exception) -> None:
        self._tell(traceback_of(error, "shard", f" {lease.shard}", self.place.worker))
        ray.get(self.queue.failed.remote(lease.id, describe(error)))

    def _tell(self, traceback: Traceback) -> None:
        """Of an error in full: to the driver, and this process's own log."""
        log.error(traceback.text)
        ray.get(self.queue.add_traceback.remote(traceback))

    def _without_storage(self, error: str) -> None:
        """Storage failed for too long. Where it is this node's trouble alone, other workers go on."""
        ray.get(self.queue.without_storage.remote(self.place.worker, error))
        raise WorkerBrokenError(error)


def _wait_for(writing: Future[None] | None) -> None:
    if writing is not None:
        writing.result()
