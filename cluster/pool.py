"""The worker pool: as many workers as asked for, for as long as there is work, whatever becomes of them.

The queue is an actor on the driver's own node, and dies with it; what counts is in storage, where the next run of the
same command finds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.pool_options import PoolOptions
from cluster.queue_actor import QueueActor, Snapshot
from cluster.stop import Stop
from cluster.tracebacks import describe
from cluster.work import ShardWork
from cluster.worker import Ended, Worker

POLL_S = 0.5
FAILED_STARTS = 3  # in a row, and at least two per worker: then no worker will ever start


class PoolError(RuntimeError):
    """The run cannot go on; what was committed stays."""


@dataclass
class _RunningWorker:
    actor: ActorHandle[Any]
    ended: ray.ObjectRef[Ended]  # resolves when its `run` is over


class WorkerPool:
    """Runs `work` over shards 0 … num_shards - 1, except those in `committed`, on the Ray that is connected.

    identity: what `ShardWork.setup` has to return; None for whatever the first worker says.
    """

    def __init__(
        self,
        work: ShardWork,
        num_shards: int,
        committed: Iterable[int] = (),
        options: PoolOptions | None = None,
        *,
        identity: str | None = None,
    ):
        self.work = ray.put(work)  # pickled once, however many workers there will be
        self.options = options or PoolOptions()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        place = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": 10_000}
        committed = list(committed)
        self.queue = _start_actor(QueueActor, place, num_shards, committed, identity, self.options)
        self.to_do = num_shards - len(set(committed))
        self.workers: dict[str, _RunningWorker] = {}
        self.lost: list[str] = []
        self.ever_ready: set[str] = set()
        self.failed_starts = 0
        self.next_start = 0.0
        self.started = 0

    def run(self, watch: Callable[[Snapshot], None], stop: Callable[[], Stop] = lambda: Stop.NO) -> Snapshot:
        """Work until every shard is committed or abandoned, or `stop` says so. Returns the last snapshot.

        `watch` sees every snapshot. Raises `PoolError` when no worker can be set up, or results cannot be written.
        """
        try:
            if self.to_do and stop() is Stop.NO:
                self._start_missing(self.to_do)  # while the queue's own process starts
            while True:
                snapshot = self._snapshot()
                watch(snapshot)
                stopping = stop()
                if not snapshot.remaining or stopping is Stop.NOW:
                    return snapshot
                self._reap(snapshot)
                if snapshot.fatal or stopping is Stop.SOON:
                    self._wind_down(snapshot)
                    if not self.workers:
                        snapshot = self._snapshot()  # with what the last of them committed
                        watch(snapshot)
                        break
                else:
                    self._start_missing(snapshot.remaining)
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
            for worker in self.workers.values():
                ray.kill(worker.actor)
            ray.kill(self.queue)

    def _snapshot(self) -> Snapshot:
        snapshot: Snapshot = ray.get(self.queue.snapshot.remote(self.options.start_timeout_s))
        if snapshot.ready - self.ever_ready:
            self.failed_starts = 0
        self.ever_ready |= snapshot.ready
        lost, self.lost = self.lost, []
        return replace(snapshot, lost=lost)

    def _reap(self, snapshot: Snapshot) -> None:
        """Take leave of workers that ended, died, or fell silent."""
        for silence in snapshot.silent:
            if worker := self.workers.get(silence.worker):
                ray.kill(worker.actor)
                doing = "being set up" if silence.shard is None else f"at shard {silence.shard}"
                self._drop(silence.worker, f"no sign of life for {silence.seconds:.0f} s {doing}")
        refs = {worker.ended: name for name, worker in self.workers.items()}
        for ref in ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else ():
            name = refs[ref]
            try:
                ended: Ended = ray.get(ref)
            except ActorUnavailableError:
                # Out of sight. Ray will know soon whether it is dead, or its node: till then nobody is blamed.
                self.workers[name].ended = self.workers[name].actor.ended.remote()
                continue
            except RayActorError as error:
                node, own_log = ray.get(self.queue.whereabouts_of.remote(name))
                self._drop(name, _cause_of_death(error), blame=not node or _is_alive(node), own_log=own_log)
                continue
            except RayError as error:
                self._drop(name, describe(getattr(error, "cause", None) or error))
                continue
            if ended.hopeless and not snapshot.ready:  # where others run, it is that node's trouble
                raise PoolError(ended.error)
            self._drop(name, ended.error, blame=False)  # it has told of its leases itself

    def _drop(self, name: str, error: str, *, blame: bool = True, own_log: str = "") -> None:
        """`own_log` is where there may be more to read, of a worker that could not tell."""
        worker = self.workers.pop(name)
        ray.get(self.queue.worker_lost.remote(name, error, blame))
        ray.kill(worker.actor)
        if not error:
            return
        if own_log:
            error += f" (its log: {own_log})"
        self.lost.append(f"{name}: {error}")
        if name not in self.ever_ready:
            self.failed_starts += 1
            self.next_start = time.monotonic() + min(300, 2**self.failed_starts)
            enough = max(FAILED_STARTS, 2 * (self.options.workers or capacity(self.options)))
            if self.failed_starts >= enough and not self.ever_ready & self.workers.keys():
                raise PoolError(f"no worker can be set up; the last one: {error}")

    def _start_missing(self, remaining: int) -> None:
        """Have as many workers as there are places, or shards that remain."""
        wanted = min(self.options.workers or max(1, capacity(self.options)), remaining)
        if time.monotonic() < self.next_start:
            return
        while len(self.workers) < wanted:
            self._start_worker()

    def _start_worker(self) -> None:
        name = f"worker-{self.started:04d}"
        self.started += 1
        cpus, gpus = self.options.cpus_per_worker, self.options.gpus_per_worker
        place = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        patience_s = self.options.storage_patience_s
        actor = _start_actor(Worker, place, self.work, self.queue, name, gpus, patience_s)
        self.workers[name] = _RunningWorker(actor, actor.run.remote())

    def _wind_down(self, snapshot: Snapshot) -> None:
        """No more leases, and no waiting for workers that have none yet."""
        ray.get(self.queue.stop.remote())
        for name in self.workers.keys() - snapshot.ready:
            ray.kill(self.workers.pop(name).actor)

    def _sleep(self) -> None:
        """Until the next look; less if a worker ends."""
        if self.workers:
            ray.wait([worker.ended for worker in self.workers.values()], timeout=POLL_S)
        else:
            time.sleep(POLL_S)


def _start_actor(actor_class: type, place: Mapping[str, Any], *arguments: object) -> ActorHandle[Any]:
    """`place`: what of the cluster it takes, and where, in Ray's words."""
    return cast("ActorHandle[Any]", ray.remote(actor_class).options(**place).remote(*arguments))


def _is_alive(node: str) -> bool:
    return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())


def capacity(options: PoolOptions) -> int:
    """Workers that the connected cluster has room for, as it is now."""
    return sum(_capacity_of_node(node["Resources"], options) for node in ray.nodes() if node["Alive"])


def _capacity_of_node(resources: dict[str, float], options: PoolOptions) -> int:
    """Workers that one node has room for."""
    needs = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    return min(int(resources.get(name, 0) / amount) for name, amount in needs.items() if amount)


def _cause_of_death(error: RayActorError) -> str:
    """Ray's account of a death, in a line, without its list of possible causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-2:]).partition(" Some common causes")[0]
