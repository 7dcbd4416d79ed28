"""The shard queue as a Ray actor, which the workers ask for leases and report to, and the driver looks at.

Which shard goes to whom is for `cluster.queue` to say. This adds the waiting for a lease, what is known of each worker
and passed on to the driver, and when a run is stopped because it is hopeless.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cluster.pool_options import PoolOptions
from cluster.queue import WAIT, ShardQueue, Silence
from cluster.tracebacks import Traceback
from cluster.work import Lease

WAIT_S = 1.0  # how often a waiting worker is looked after even if nothing happened
ABANDONED_IN_A_ROW = 5  # shards: then it is no shard's fault, and the run stops


@dataclass(frozen=True)
class Snapshot:
    """Where a pool stands."""

    reports: list[dict[str, Any]]  # of the shards committed since the last snapshot
    remaining: int  # shards neither committed nor abandoned
    in_flight: int
    run_again: int  # leases on shards that had been started before
    abandoned: dict[int, str]  # shards left out of this run, with the error
    identity: str | None  # what `ShardWork.setup` returned
    ready: frozenset[str]  # workers that are set up
    starting: int  # workers being set up
    silent: list[Silence]
    fatal: str  # why no more leases are given out
    tracebacks: list[Traceback] = field(default_factory=list)  # since the last snapshot, the last of each kind
    lost: list[str] = field(default_factory=list)  # workers lost since the last snapshot, and why


class QueueActor:
    """`ShardQueue` as an asynchronous actor: one thread, so its rules need no locks, and waiting costs nothing."""

    def __init__(self, num_shards: int, committed: Iterable[int], identity: str | None, options: PoolOptions):
        self.queue = ShardQueue(
            num_shards,
            committed,
            max_attempts=options.max_attempts,
            lease_timeout_s=options.lease_timeout_s,
            hedge=options.hedge,
        )
        self.identity = identity
        self.fatal = ""
        self.reports: list[dict[str, Any]] = []
        self.starting: dict[str, float] = {}  # workers being set up, since when
        self.whereabouts: dict[str, tuple[str, str]] = {}  # workers' nodes and own logs
        self.tracebacks: dict[str, Traceback] = {}
        self.set_up: set[str] = set()  # workers that are set up
        self.gone: set[str] = set()
        self.cut_off: set[str] = set()  # workers that could not read or write, since the last commit
        self._changed = asyncio.Event()

    async def arrived(self, worker: str, node: str, own_log: str) -> None:
        self.starting[worker] = time.monotonic()
        self.whereabouts[worker] = (node, own_log)

    async def whereabouts_of(self, worker: str) -> tuple[str, str]:
        """Its node and its own log, each "" for one that has not arrived."""
        return self.whereabouts.get(worker, ("", ""))

    async def add_traceback(self, traceback: Traceback) -> None:
        self.tracebacks[traceback.kind] = traceback

    async def ready(self, worker: str, identity: str) -> str:
        """ "" if this worker is like the others, else why it is not."""
        self.starting.pop(worker, None)
        if self.identity is None:
            self.identity = identity
        if identity == self.identity:
            self.set_up |= {worker} - self.gone
            return ""
        return f"a worker was set up as {identity}, while this run was begun with {self.identity}"

    async def lease(self, worker: str) -> Lease | None:
        while worker not in self.gone:
            answer = self.queue.lease(worker)
            if answer is not WAIT:
                return answer
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WAIT_S)
        return None

    async def start(self, lease_id: int) -> bool:
        return self.queue.start(lease_id)

    async def running(self, lease_id: int, items: list[int]) -> None:
        self.queue.running(lease_id, items)

    async def processed(self, lease_id: int) -> None:
        self.queue.processed(lease_id)

    async def alive(self, lease_id: int) -> None:
        self.queue.alive(lease_id)

    async def may_commit(self, lease_id: int) -> bool:
        return self.queue.may_commit(lease_id)

    async def committed(self, lease_id: int, shard: int, report: dict[str, Any]) -> None:
        self.cut_off.clear()
        if self.queue.committed(lease_id, shard):
            self.reports.append(report)
        if not self.queue.remaining:  # else there is nothing new for those who wait
            self._wake_waiting()

    async def failed(self, lease_id: int, error: str) -> None:
        self.queue.failed(lease_id, error)
        await self._stop_if_hopeless(error)
        self._wake_waiting()

    async def worker_lost(self, worker: str, error: str, blame: bool) -> None:
        self.starting.pop(worker, None)
        self.set_up.discard(worker)
        self.gone.add(worker)
        self.queue.worker_lost(worker, error, blame=blame)
        await self._stop_if_hopeless(error)
        self._wake_waiting()

    async def _stop_if_hopeless(self, error: str) -> None:
        if self.queue.abandoned_in_a_row >= ABANDONED_IN_A_ROW:
            await self.stop(f"{ABANDONED_IN_A_ROW} shards one after the other could not be done; the last: {error}")

    async def without_storage(self, worker: str, error: str) -> None:
        """A worker could not read or write for too long. When as many as there are could not, the run stops."""
        self.cut_off.add(worker)
        if len(self.cut_off) >= len(self.set_up):
            await self.stop(error)

    async def stop(self, error: str = "") -> None:
        """No more leases; those out may be finished. `error` is why, unless a person asked for it."""
        self.queue.stopped = True
        self.fatal = self.fatal or error
        self._wake_waiting()

    async def snapshot(self, start_timeout_s: float) -> Snapshot:
        reports, self.reports = self.reports, []
        tracebacks, self.tracebacks = self.tracebacks, {}
        now = time.monotonic()
        starting = [Silence(name, None, now - since) for name, since in self.starting.items()]
        return Snapshot(
            reports=reports,
            remaining=self.queue.remaining,
            in_flight=self.queue.in_flight,
            run_again=self.queue.run_again,
            abandoned=dict(self.queue.abandoned),
            identity=self.identity,
            ready=frozenset(self.set_up),
            starting=len(self.starting),
            silent=self.queue.silent() + [worker for worker in starting if worker.seconds > start_timeout_s],
            fatal=self.fatal,
            tracebacks=list(tracebacks.values()),
        )

    def _wake_waiting(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
