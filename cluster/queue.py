"""Which shard goes to whom. Plain state and rules, without Ray or threads; `cluster.queue_actor` makes an actor of it.

Memory is one byte per shard, and otherwise grows with the leases out and the shards in trouble.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from cluster.work import Lease

DEATHS_ALONE = 2  # an item that takes its worker down this often, running by itself, is given up
STRAGGLER = 2.0  # times the median shard's time, after which an idle worker takes a second lease,
STRAGGLER_S = 5.0  # and at least so many seconds


class Wait(Enum):
    """In place of a lease: none now, perhaps later."""

    WAIT = auto()


WAIT: Final = Wait.WAIT


class Stage(Enum):
    HELD = auto()  # prefetched
    RUNNING = auto()
    WRITING = auto()  # encoding too


@dataclass
class _Holding:
    lease: Lease
    worker: str
    touched: float  # when its worker was last heard of
    second: bool = False  # given out while another worker was running the same shard
    stage: Stage = Stage.HELD
    started: float = 0.0
    items: Sequence[int] = ()  # running at this moment


@dataclass
class _Trouble:
    """What went wrong with a shard so far."""

    attempts: int = 0
    failures: int = 0
    unexplained: int = 0  # failures with no item in flight
    alone: set[int] = field(default_factory=set)
    deaths_alone: dict[int, int] = field(default_factory=dict)
    given_up: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Silence:
    """A worker that has not been heard of for too long."""

    worker: str
    shard: int | None  # None: it is still being set up
    seconds: float


class ShardQueue:
    """Shards to do, leases out, and what to do when they come back undone.

    committed: shards that are done already.
    max_attempts: failures of a shard after which its items in flight are run one at a time. A shard that fails twice
        as often without any item to blame is abandoned: left out of this run, tried again by the next.
    lease_timeout_s: how long a worker may run without a sign of progress.
    hedge: whether idle workers take second leases on stragglers at the end.
    """

    def __init__(
        self,
        num_shards: int,
        committed: Iterable[int] = (),
        *,
        max_attempts: int = 3,
        lease_timeout_s: float = 600.0,
        hedge: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_attempts, self.lease_timeout_s, self.hedge, self.clock = max_attempts, lease_timeout_s, hedge, clock
        self.remaining = num_shards
        self.abandoned: dict[int, str] = {}
        self.abandoned_in_a_row = 0  # since the last commit
        self.run_again = 0  # leases on shards that had been started before
        self.stopped = False
        self._finished = bytearray(num_shards)  # committed or abandoned
        self._cursor = 0  # shards from here on have never been given out
        self._returned: deque[int] = deque()
        self._holdings: dict[int, _Holding] = {}
        self._by_worker: dict[str, set[int]] = {}
        self._by_shard: dict[int, set[int]] = {}
        self._granted: dict[int, int] = {}  # shard to the lease that may commit it
        self._trouble: dict[int, _Trouble] = {}
        self._durations: deque[float] = deque(maxlen=101)
        self._last_id = 0
        for shard in committed:
            self._finish(shard)

    # ------------------------------------------------------------------------------------------- from the workers

    def lease(self, worker: str) -> Lease | Wait | None:
        """A shard to do; `WAIT` when there is none now; None when there will be none."""
        if self.stopped or not self.remaining:
            return None
        shard, second = self._next_shard(), False
        if shard is None:
            shard, second = self._shard_to_share(worker)
        return WAIT if shard is None else self._hand_out(shard, worker, second)

    def start(self, lease_id: int) -> bool:
        """Whether to run a lease that was held so far: not if its shard is done, another worker was faster, or the
        queue was stopped."""
        holding = self._holdings.get(lease_id)
        if holding is None:
            return False
        others = [self._holdings[other] for other in self._by_shard[holding.lease.shard] if other != lease_id]
        overtaken = not holding.second and any(other.stage is not Stage.HELD for other in others)
        if self.stopped or overtaken:
            self._drop(lease_id)
            return False
        holding.stage, holding.started = Stage.RUNNING, self.clock()
        self.run_again += holding.second or holding.lease.attempt > 1
        self._touch(holding)
        return True

    def running(self, lease_id: int, items: Sequence[int]) -> None:
        """These items of a started lease run from now on."""
        if holding := self._holdings.get(lease_id):
            holding.items = items
            self._touch(holding)

    def processed(self, lease_id: int) -> None:
        """Nothing of a lease runs any more; its results are on their way."""
        if holding := self._holdings.get(lease_id):
            holding.stage, holding.items = Stage.WRITING, ()
            self._touch(holding)

    def alive(self, lease_id: int) -> None:
        """A sign of life from whoever waits with a lease, as for storage."""
        if holding := self._holdings.get(lease_id):
            self._touch(holding)

    def may_commit(self, lease_id: int) -> bool:
        """Whether to write and commit: the first of several workers to ask, as long as it lives."""
        holding = self._holdings.get(lease_id)
        if holding is None:
            return False
        if self._granted.setdefault(holding.lease.shard, lease_id) != lease_id:
            self._drop(lease_id)
            return False
        self._touch(holding)
        return True

    def committed(self, lease_id: int, shard: int) -> bool:
        """A shard is committed, by a lease that may have been taken back meanwhile. Whether that is news."""
        if holding := self._holdings.get(lease_id):
            self._durations.append(self.clock() - holding.started)
        self.abandoned_in_a_row = 0
        news = not self._finished[shard] or self.abandoned.pop(shard, None) is not None
        self._finish(shard)
        return news

    def failed(self, lease_id: int, error: str) -> None:
        """A lease could not be done, by no fault of its worker."""
        if holding := self._holdings.get(lease_id):
            self._blame(holding, error)
            self._give_back(holding)

    # ---------------------------------------------------------------------------------------------- from the driver

    def worker_lost(self, worker: str, error: str, *, blame: bool) -> None:
        """A worker is gone: its leases go back. `blame` is whether what it did may have brought it down.

        Reading the inputs of a lease that it held is blamed only if it did nothing else.
        """
        holdings = [self._holdings[lease_id] for lease_id in sorted(self._by_worker.pop(worker, ()))]
        suspects = [holding for holding in holdings if holding.stage is not Stage.HELD] or holdings
        for holding in holdings:
            if blame and holding in suspects:
                self._blame(holding, error)
            self._give_back(holding)

    def silent(self) -> list[Silence]:
        """Workers that should have been heard of, the longest silence of each."""
        now = self.clock()
        silences: dict[str, Silence] = {}
        for holding in self._holdings.values():
            seconds = now - holding.touched
            if seconds > self.lease_timeout_s:
                known = silences.get(holding.worker)
                if known is None or known.seconds < seconds:
                    silences[holding.worker] = Silence(holding.worker, holding.lease.shard, seconds)
        return list(silences.values())

    @property
    def in_flight(self) -> int:
        """Shards in workers' hands."""
        return len(self._by_shard)

    # ------------------------------------------------------------------------------------------------------- rules

    def _next_shard(self) -> int | None:
        while self._returned:
            shard = self._returned.popleft()
            if not self._finished[shard]:
                return shard
        while self._cursor < len(self._finished):
            self._cursor += 1
            if not self._finished[self._cursor - 1]:
                return self._cursor - 1
        return None

    def _shard_to_share(self, worker: str) -> tuple[int | None, bool]:
        """A shard in another worker's hands that an idle worker may do, and whether it is running there already."""
        own = [self._holdings[lease_id] for lease_id in self._by_worker.get(worker, ())]
        if not self.hedge or any(holding.stage is not Stage.WRITING for holding in own):
            return None, False
        single = [
            self._holdings[lease_id]
            for leases in self._by_shard.values()
            if len(leases) == 1
            for lease_id in leases
            if self._holdings[lease_id].worker != worker
        ]
        held = [holding for holding in single if holding.stage is Stage.HELD and self._is_busy(holding.worker)]
        if held:  # in the order of leasing: the first will wait the longest
            return min(held, key=lambda holding: holding.lease.id).lease.shard, False
        if not self._durations:
            return None, False
        patience = max(STRAGGLER_S, STRAGGLER * statistics.median(self._durations))
        slow = [holding for holding in single if holding.stage is not Stage.HELD]
        slow = [holding for holding in slow if self.clock() - holding.started > patience]
        if slow:
            return min(slow, key=lambda holding: holding.started).lease.shard, True
        return None, False

    def _is_busy(self, worker: str) -> bool:
        return any(self._holdings[lease_id].stage is Stage.RUNNING for lease_id in self._by_worker[worker])

    def _hand_out(self, shard: int, worker: str, second: bool) -> Lease:
        self._last_id += 1
        trouble = self._trouble.get(shard, _Trouble())
        alone = frozenset(trouble.alone - trouble.given_up.keys())
        lease = Lease(self._last_id, shard, trouble.attempts + 1, alone, dict(trouble.given_up))
        self._holdings[lease.id] = _Holding(lease, worker, touched=self.clock(), second=second)
        self._by_worker.setdefault(worker, set()).add(lease.id)
        self._by_shard.setdefault(shard, set()).add(lease.id)
        return lease

    def _touch(self, holding: _Holding) -> None:
        """A worker was heard of. What waits for its turn there, to be run or to be written, is not silent meanwhile."""
        now = self.clock()
        for lease_id in self._by_worker[holding.worker]:
            other = self._holdings[lease_id]
            if other is holding or other.stage is Stage.HELD or other.stage is holding.stage is Stage.WRITING:
                other.touched = now

    def _blame(self, holding: _Holding, error: str) -> None:
        shard, items = holding.lease.shard, holding.items
        trouble = self._trouble.setdefault(shard, _Trouble())
        trouble.failures += 1
        trouble.unexplained += not items
        if len(items) == 1 and items[0] in holding.lease.alone:
            item = items[0]
            trouble.deaths_alone[item] = trouble.deaths_alone.get(item, 0) + 1
            if trouble.deaths_alone[item] >= DEATHS_ALONE:
                trouble.given_up[item] = error
        elif trouble.failures >= self.max_attempts and items:
            trouble.alone.update(items)
        elif trouble.unexplained >= 2 * self.max_attempts:
            self._finish(shard)
            self.abandoned[shard] = error
            self.abandoned_in_a_row += 1

    def _give_back(self, holding: _Holding) -> None:
        shard = holding.lease.shard
        if holding.lease.id not in self._holdings:
            return  # its shard was abandoned just now
        if holding.stage is not Stage.HELD:
            self._trouble.setdefault(shard, _Trouble()).attempts += 1
        self._drop(holding.lease.id)
        if shard not in self._by_shard:
            self._returned.append(shard)

    def _drop(self, lease_id: int) -> None:
        holding = self._holdings.pop(lease_id)
        shard = holding.lease.shard
        if mine := self._by_worker.get(holding.worker):
            mine.discard(lease_id)
        self._by_shard[shard].discard(lease_id)
        if not self._by_shard[shard]:
            del self._by_shard[shard]
        if self._granted.get(shard) == lease_id:
            del self._granted[shard]

    def _finish(self, shard: int) -> None:
        if self._finished[shard]:
            return
        self._finished[shard] = 1
        self.remaining -= 1
        for lease_id in list(self._by_shard.get(shard, ())):
            self._drop(lease_id)
        self._granted.pop(shard, None)
        self._trouble.pop(shard, None)
