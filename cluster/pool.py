"""The worker pool: as many workers as asked for, for as long as there is work, whatever becomes of them.

The queue is an actor on the driver's own node, and dies with it; what counts is in storage, where the next run of the
same command finds it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.queue import WAIT, ShardQueue, Silence
from cluster.stop import Stop
from cluster.tracebacks import Traceback, describe
from cluster.work import Lease, ShardWork
from cluster.worker import Ended, Worker

POLL_S = 0.5
WAIT_S = 1.0  # how often a waiting worker is looked after even if nothing happened
ABANDONED_IN_A_ROW = 5  # shards: then it is no shard's fault, and the run stops
FAILED_STARTS = 3  # in a row, and at least two per worker: then no worker will ever start


@dataclass(frozen=True)
class PoolOptions:
    """How many workers, what each needs, and how much is forgiven.

    workers: actors to keep alive; None for one per GPU (or, without GPUs, per `cpus_per_worker` CPUs) of the cluster,
        looked up again and again as nodes come and go.
    """

    workers: int | None = None
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0
    max_attempts: int = 3
    lease_timeout_s: float = 600.0
    start_timeout_s: float = 1800.0
    storage_patience_s: float = 600.0
    hedge: bool = True


@dataclass(frozen=True)
class Snapshot:
    """Where a pool stands."""

    reports: list[dict]  # of the shards committed since the last snapshot
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


class PoolError(RuntimeError):
    """The run cannot go on; what was committed stays."""


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
        self.reports: list[dict] = []
        self.arrivals: dict[str, float] = {}  # workers being set up, since when
        self.whereabouts: dict[str, tuple[str, str]] = {}  # workers' nodes and own logs
        self.tracebacks: dict[str, Traceback] = {}
        self.members: set[str] = set()  # workers that are set up
        self.gone: set[str] = set()
        self.cut_off: set[str] = set()  # workers that could not read or write, since the last commit
        self._changed = asyncio.Event()

    async def arrived(self, worker: str, node: str, own_log: str) -> None:
        self.arrivals[worker] = time.monotonic()
        self.whereabouts[worker] = (node, own_log)

    async def whereabouts_of(self, worker: str) -> tuple[str, str]:
        """Its node and its own log, each "" for one that has not arrived."""
        return self.whereabouts.get(worker, ("", ""))

    async def told(self, traceback: Traceback) -> None:
        self.tracebacks[traceback.kind] = traceback

    async def ready(self, worker: str, identity: str) -> str:
        """ "" if this worker is like the others, else why it is not."""
        self.arrivals.pop(worker, None)
        if self.identity is None:
            self.identity = identity
        if identity == self.identity:
            self.members |= {worker} - self.gone
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

    async def committed(self, lease_id: int, shard: int, report: dict) -> None:
        self.cut_off.clear()
        if self.queue.committed(lease_id, shard):
            self.reports.append(report)
        if not self.queue.remaining:  # else there is nothing new for those who wait
            self._tell()

    async def failed(self, lease_id: int, error: str) -> None:
        self.queue.failed(lease_id, error)
        await self._stop_if_hopeless(error)
        self._tell()

    async def worker_lost(self, worker: str, error: str, blame: bool) -> None:
        self.arrivals.pop(worker, None)
        self.members.discard(worker)
        self.gone.add(worker)
        self.queue.worker_lost(worker, error, blame=blame)
        await self._stop_if_hopeless(error)
        self._tell()

    async def _stop_if_hopeless(self, error: str) -> None:
        if self.queue.abandoned_in_a_row >= ABANDONED_IN_A_ROW:
            await self.stop(f"{ABANDONED_IN_A_ROW} shards one after the other could not be done; the last: {error}")

    async def without_storage(self, worker: str, error: str) -> None:
        """A worker could not read or write for too long. When as many as there are could not, the run stops."""
        self.cut_off.add(worker)
        if len(self.cut_off) >= len(self.members):
            await self.stop(error)

    async def stop(self, error: str = "") -> None:
        """No more leases; those out may be finished. `error` is why, unless a person asked for it."""
        self.queue.stopped = True
        self.fatal = self.fatal or error
        self._tell()

    async def snapshot(self, start_timeout_s: float) -> Snapshot:
        reports, self.reports = self.reports, []
        tracebacks, self.tracebacks = self.tracebacks, {}
        now = time.monotonic()
        starting = [Silence(name, None, now - since) for name, since in self.arrivals.items()]
        return Snapshot(
            reports=reports,
            remaining=self.queue.remaining,
            in_flight=self.queue.in_flight,
            run_again=self.queue.run_again,
            abandoned=dict(self.queue.abandoned),
            identity=self.identity,
            ready=frozenset(self.members),
            starting=len(self.arrivals),
            silent=self.queue.silent() + [worker for worker in starting if worker.seconds > start_timeout_s],
            fatal=self.fatal,
            tracebacks=list(tracebacks.values()),
        )

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass
class _Member:
    actor: ActorHandle
    life: ray.ObjectRef  # resolves when its `run` is over


class WorkerPool:
    """Runs `work` over shards 0 … num_shards - 1, except those in `committed`, on the Ray that is connected.

    identity: what `ShardWork.setup` has to return; None for whatever the first worker says.
    """

    def __init__(
        self,
        work: ShardWork,
        num_shards: int,
        committed: Iterable[int] = (),
        options: PoolOptions = PoolOptions(),
        *,
        identity: str | None = None,
    ):
        self.work, self.options = ray.put(work), options  # pickled once, however many workers there will be
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        queue_class = ray.remote(QueueActor).options(num_cpus=0, scheduling_strategy=here, max_concurrency=10_000)
        committed = list(committed)
        self.queue = queue_class.remote(num_shards, committed, identity, options)
        self.to_do = num_shards - len(set(committed))
        self.members: dict[str, _Member] = {}
        self.lost: list[str] = []
        self.ever_ready: set[str] = set()
        self.failed_starts = 0
        self.next_start = 0.0
        self.made = 0

    def run(self, watch: Callable[[Snapshot], None], stop: Callable[[], Stop] = lambda: Stop.NO) -> Snapshot:
        """Work until every shard is committed or abandoned, or `stop` says so. Returns the last snapshot.

        `watch` sees every snapshot. Raises `PoolError` when no worker can be set up, or results cannot be written.
        """
        try:
            if self.to_do and stop() is Stop.NO:
                self._fill(self.to_do)  # while the queue's own process starts
            while True:
                snapshot = self._snapshot()
                watch(snapshot)
                stopping = stop()
                if not snapshot.remaining or stopping is Stop.NOW:
                    return snapshot
                self._bury(snapshot)
                if snapshot.fatal or stopping is Stop.SOON:
                    self._wind_down(snapshot)
                    if not self.members:
                        snapshot = self._snapshot()  # with what the last of them committed
                        watch(snapshot)
                        break
                else:
                    self._fill(snapshot.remaining)
                self._sleep()
            if snapshot.fatal:
                raise PoolError(snapshot.fatal)
            return snapshot
        except PoolError:
            with suppress(RayError):
                watch(self._snapshot())  # with what was told of it
            raise
        except RayError as error:
            raise PoolError(f"the shard queue died; run the same command again to go on ({describe(error)})") from None
        finally:
            for member in self.members.values():
                ray.kill(member.actor)
            ray.kill(self.queue)

    def _snapshot(self) -> Snapshot:
        snapshot = ray.get(self.queue.snapshot.remote(self.options.start_timeout_s))
        if snapshot.ready - self.ever_ready:
            self.failed_starts = 0
        self.ever_ready |= snapshot.ready
        lost, self.lost = self.lost, []
        return replace(snapshot, lost=lost)

    def _bury(self, snapshot: Snapshot) -> None:
        """Take leave of workers that ended, died, or fell silent."""
        for silence in snapshot.silent:
            if member := self.members.get(silence.worker):
                ray.kill(member.actor)
                doing = "being set up" if silence.shard is None else f"at shard {silence.shard}"
                self._lose(silence.worker, f"no sign of life for {silence.seconds:.0f} s {doing}")
        refs = {member.life: name for name, member in self.members.items()}
        for ref in ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else ():
            name = refs[ref]
            try:
                ended: Ended = ray.get(ref)
            except ActorUnavailableError:
                # Out of sight. Ray will know soon whether it is dead, or its node: till then nobody is blamed.
                self.members[name].life = self.members[name].actor.ended.remote()
                continue
            except RayActorError as error:
                node, own_log = ray.get(self.queue.whereabouts_of.remote(name))
                self._lose(name, _why(error), blame=not node or _lives(node), own_log=own_log)
                continue
            except RayError as error:
                self._lose(name, describe(getattr(error, "cause", None) or error))
                continue
            if ended.hopeless and not snapshot.ready:  # where others run, it is that node's trouble
                raise PoolError(ended.error)
            self._lose(name, ended.error, blame=False)  # it has told of its leases itself

    def _lose(self, name: str, error: str, *, blame: bool = True, own_log: str = "") -> None:
        """`own_log` is where there may be more to read, of a worker that could not tell."""
        member = self.members.pop(name)
        ray.get(self.queue.worker_lost.remote(name, error, blame))
        ray.kill(member.actor)
        if not error:
            return
        if own_log:
            error += f" (its log: {own_log})"
        self.lost.append(f"{name}: {error}")
        if name not in self.ever_ready:
            self.failed_starts += 1
            self.next_start = time.monotonic() + min(300, 2**self.failed_starts)
            enough = max(FAILED_STARTS, 2 * (self.options.workers or capacity(self.options)))
            if self.failed_starts >= enough and not self.ever_ready & self.members.keys():
                raise PoolError(f"no worker can be set up; the last one: {error}")

    def _fill(self, remaining: int) -> None:
        """Hire as many workers as there are places, or shards that remain."""
        wanted = min(self.options.workers or max(1, capacity(self.options)), remaining)
        if time.monotonic() < self.next_start:
            return
        while len(self.members) < wanted:
            self._hire()

    def _hire(self) -> None:
        name = f"worker-{self.made:04d}"
        self.made += 1
        needs = {"num_cpus": self.options.cpus_per_worker, "num_gpus": self.options.gpus_per_worker}
        actor_class = ray.remote(Worker).options(**needs, scheduling_strategy="SPREAD", max_restarts=0)
        actor = actor_class.remote(
            self.work, self.queue, name, self.options.gpus_per_worker, self.options.storage_patience_s
        )
        self.members[name] = _Member(actor, actor.run.remote())

    def _wind_down(self, snapshot: Snapshot) -> None:
        """No more leases, and no waiting for workers that have none yet."""
        ray.get(self.queue.stop.remote())
        for name in self.members.keys() - snapshot.ready:
            ray.kill(self.members.pop(name).actor)

    def _sleep(self) -> None:
        """Until the next look; less if a worker ends."""
        lives = [member.life for member in self.members.values()]
        if lives:
            ray.wait(lives, timeout=POLL_S)
        else:
            time.sleep(POLL_S)


def _lives(node: str) -> bool:
    return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())


def capacity(options: PoolOptions) -> int:
    """Workers that the connected cluster has room for, as it is now."""
    return sum(_room(node["Resources"], options) for node in ray.nodes() if node["Alive"])


def _room(resources: dict[str, float], options: PoolOptions) -> int:
    """Workers that one node has room for."""
    needs = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    return min(int(resources.get(name, 0) / amount) for name, amount in needs.items() if amount)


def _why(error: RayActorError) -> str:
    """Ray's account of a death, in a line, without its list of possible causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-2:]).partition(" Some common causes")[0]
