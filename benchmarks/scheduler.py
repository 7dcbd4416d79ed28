"""Time the scheduler, with a sleep in place of the model: what is left is what scheduling costs.

    python benchmarks/scheduler.py                        # 32 simulated workers on this machine; about ten minutes
    python benchmarks/scheduler.py --quick --only pool

leases     shards per second that the queue can hand out and take back: its rules alone, and as a Ray actor that several
           processes call at once, each for the five messages that a shard costs a worker
pool       a run through `WorkerPool`, its reports merged by the driver, as large as those of a shard of 64 images
ray-data   the same shards through Ray Data's `map_batches` on an actor pool, with the same results merged
memory     of the queue and of the driver, as the number of shards grows
planning   a manifest of 100 million rows in 1,000 files, all of them links to one of 100,000 rows that are all alike

Efficiency is the seconds that all shards sleep / (workers x wall). Wall begins when the last worker is set up (all of
them wait for it in their `setup`), so starting processes is not in it, and ends with the last shard: its commit in
`pool`, and the end of its batch in `ray-data`, which has no leases and no commits to pay for. Shards sleep for 1 s,
give or take 20%, as those of a real run differ; and in a second run for 1 s exactly, so that all workers ask at the
same moment: the worst case, and the worse the fewer CPUs the simulated workers share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from hardware import describe_host
from ray.actor import ActorHandle

from cluster.pool import POLL_S, WorkerPool
from cluster.pool_options import PoolOptions
from cluster.queue import WAIT, ShardQueue
from cluster.queue_actor import QueueActor, Snapshot
from cluster.session import session
from cluster.work import Lease, Place, ShardWork, Times
from jobs.statistics.mergeable import Timeline
from jobs.statistics.run import RunStatistics
from manifests.plan import Manifest

IMAGES = 64  # of a shard, all in one batch
GATE_TIMEOUT_S = 600


@dataclass(frozen=True)
class Load:
    """Shards that take `shard_s` on average, each up to `spread` of it more or less."""

    workers: int
    shards_per_worker: int
    shard_s: float
    spread: float = 0.0

    @property
    def shards(self) -> int:
        return self.workers * self.shards_per_worker

    def seconds(self, shard: int) -> float:
        return self.shard_s * (1 + self.spread * random.Random(shard).uniform(-1, 1))

    def efficiency(self, wall_s: float) -> float:
        return sum(map(self.seconds, range(self.shards))) / (self.workers * wall_s)


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    loads: tuple[Load, ...] = (Load(32, 60, 1.0, spread=0.2), Load(32, 30, 1.0))
    callers: int = 4
    actor_leases: int = 5_000
    leases: int = 200_000
    queue_sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    driver_sizes: tuple[int, ...] = (1_000, 10_000, 100_000)
    files: int = 1_000
    file_rows: int = 100_000
    lookups: int = 100_000
    spare_cpus: int = 2  # for Ray Data's tasks that read


QUICK = Scale(
    loads=(Load(2, 6, 0.2, spread=0.2),),
    callers=2,
    actor_leases=200,
    leases=5_000,
    queue_sizes=(1_000, 10_000),
    driver_sizes=(200, 400),
    files=20,
    lookups=1_000,
    spare_cpus=1,
)

# ------------------------------------------------------------------------------------------------- simulated shards


def shard_statistics(shard: int) -> str:
    """What a worker would report of a shard, with values at random: as many and as long as real ones."""
    rng = random.Random(shard)
    rows = [
        {
            "prompt_id": f"{rng.getrandbits(64):016x}",
            "prompt": "a photograph of a red fox in deep snow, " * rng.randint(1, 8),
            "image_index": 0,
            "seed": rng.getrandbits(63),
            "file_name": f"{rng.getrandbits(64):016x}-0.png",
            "size_bytes": rng.randint(100_000, 500_000),
            "truncated": False,
            "seconds": rng.lognormvariate(0, 0.2),
            "quality_brightness": rng.random(),
            "quality_contrast": rng.random() / 2,
            "quality_sharpness": rng.lognormvariate(5, 1),
            "quality_colourfulness": rng.random() * 100,
            "quality_entropy": rng.random() * 8,
            "quality_broken": rng.random() < 0.01,
            "quality_phash": f"{rng.getrandbits(64):016x}",
        }
        for _ in range(IMAGES)
    ]
    work = {"shard": shard, "worker": f"worker-{shard:04d}", "node": "node", "attempt": 1, "gpus": 1.0}
    work |= {"started_at": 1.8e9, "finished_at": 1.8e9 + 1}
    work |= dict.fromkeys(("read_s", "wait_s", "generate_s", "encode_s", "write_s"), 0.1)
    return RunStatistics.of_shard(rows, [], work).to_json()


class Gate:
    """An actor that keeps workers waiting until all are there."""

    def __init__(self, workers: int):
        self.missing, self.opened_at, self.open = workers, 0.0, asyncio.Event()

    async def arrive(self) -> None:
        self.missing -= 1
        if self.missing == 0:
            self.opened_at = time.time()
            self.open.set()
        await asyncio.wait_for(self.open.wait(), GATE_TIMEOUT_S)

    async def when_opened(self) -> float:
        return self.opened_at


def make_gate(workers: int) -> ActorHandle:
    return ray.remote(Gate).options(num_cpus=0, max_concurrency=workers + 1).remote(workers)


class SleepWork(ShardWork):
    """Shards for `WorkerPool`. A commit is the time it was made at."""

    def __init__(self, gate: ActorHandle, load: Load, report: str):
        self.gate, self.load, self.report = gate, load, report

    def setup(self, place: Place) -> str:
        ray.get(self.gate.arrive.remote())
        return "asleep"

    def read(self, lease: Lease) -> None:
        pass

    def process(self, lease: Lease, inputs: None, running: Callable[[Sequence[int]], None]) -> None:
        running(range(IMAGES))
        time.sleep(self.load.seconds(lease.shard))

    def encode(self, results: None) -> None:
        pass

    def write(self, lease: Lease, encoded: None, times: Times) -> dict:
        return {"statistics": self.report, "finished_at": time.time(), "wait_s": times.wait_s}


class SleepBatches:
    """Shards for Ray Data: batches of one row each."""

    def __init__(self, gate: ActorHandle, load: Load, report: str):
        self.load, self.report = load, report
        ray.get(gate.arrive.remote())

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(self.load.seconds(int(batch["id"][0])))
        return {"statistics": np.array([self.report]), "finished_at": np.array([time.time()])}


# --------------------------------------------------------------------------------------------------------- leases


def run_rules(queue: ShardQueue, workers: int = 32) -> None:
    """All of a queue's shards, with two leases out for each worker."""
    turns = deque(f"worker-{number % workers}" for number in range(2 * workers))
    out = deque((worker, queue.lease(worker)) for worker in turns)
    while out:
        worker, lease = out.popleft()
        if lease is WAIT or lease is None:
            continue
        queue.start(lease.id)
        queue.processed(lease.id)
        queue.may_commit(lease.id)
        queue.committed(lease.id, lease.shard)
        out.append((worker, queue.lease(worker)))
    assert not queue.remaining


class Caller:
    """The calls of a `cluster.worker.Worker`, as fast as they are answered."""

    def run(self, queue: ActorHandle, name: str, report: dict) -> None:
        while (lease := ray.get(queue.lease.remote(name))) is not None:
            if ray.get(queue.start.remote(lease.id)):
                queue.processed.remote(lease.id)
                if ray.get(queue.may_commit.remote(lease.id)):
                    ray.get(queue.committed.remote(lease.id, lease.shard, report))


def measure_leases(scale: Scale) -> dict[str, Any]:
    start = time.perf_counter()
    run_rules(ShardQueue(scale.leases))
    alone = scale.leases / (time.perf_counter() - start)

    report = {"statistics": shard_statistics(0)}
    queue = ray.remote(QueueActor).options(num_cpus=0, max_concurrency=1_000)
    queue = queue.remote(scale.actor_leases, (), None, PoolOptions())
    callers = [ray.remote(Caller).options(num_cpus=0).remote() for _ in range(scale.callers)]
    ray.get([actor.__ray_ready__.remote() for actor in (queue, *callers)])
    start = time.perf_counter()
    busy = [caller.run.remote(queue, f"caller-{number}", report) for number, caller in enumerate(callers)]
    while busy:
        busy = ray.wait(busy, num_returns=len(busy), timeout=POLL_S)[1]
        snapshot = ray.get(queue.snapshot.remote(60.0))  # takes the reports away, as the driver does
    assert not snapshot.remaining
    through_actor = scale.actor_leases / (time.perf_counter() - start)
    for actor in (queue, *callers):
        ray.kill(actor)
    print(f"leases    rules alone {alone:,.0f} /s; actor with {scale.callers} callers {through_actor:,.0f} /s")
    return {"rules_per_s": alone, "actor_per_s": through_actor, "callers": scale.callers, "shards": scale.actor_leases}


# ------------------------------------------------------------------------------------------------------ efficiency


def run_pool(load: Load) -> dict[str, Any]:
    gate, total, reports = make_gate(load.workers), RunStatistics(), []

    def watch(snapshot: Snapshot) -> None:
        for report in snapshot.reports:
            total.merge(RunStatistics.from_json(report.pop("statistics")))
            reports.append(report)
        assert not snapshot.lost, snapshot.lost

    begun_at = time.time()
    work = SleepWork(gate, load, shard_statistics(0))
    options = PoolOptions(workers=load.workers, cpus_per_worker=1)
    last = WorkerPool(work, load.shards, options=options).run(watch)
    assert total.shards == load.shards
    more = {"wait_s": statistics.mean(report["wait_s"] for report in reports), "run_again": last.run_again}
    return _efficiency("pool", load, gate, begun_at, reports) | more


def run_ray_data(load: Load) -> dict[str, Any]:
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data import range as rows

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    gate, total, reports = make_gate(load.workers), RunStatistics(), []
    begun_at = time.time()
    # One row is one block, so that shards are handed out singly: a block is what Ray Data schedules.
    done = rows(load.shards, override_num_blocks=load.shards).map_batches(
        SleepBatches,
        batch_size=1,
        compute=ActorPoolStrategy(size=load.workers),
        num_cpus=1,
        fn_constructor_args=(gate, load, shard_statistics(0)),
    )
    for report in done.iter_rows():
        total.merge(RunStatistics.from_json(report.pop("statistics")))
        reports.append(report)
    assert total.shards == load.shards
    return _efficiency("ray-data", load, gate, begun_at, reports)


def _efficiency(name: str, load: Load, gate: ActorHandle, begun_at: float, reports: list[dict]) -> dict[str, Any]:
    opened_at, total_s = ray.get(gate.when_opened.remote()), time.time() - begun_at
    ray.kill(gate)
    wall_s = max(report["finished_at"] for report in reports) - opened_at
    start_s = opened_at - begun_at
    efficiency = load.efficiency(wall_s)
    print(
        f"{name:<10}{load.shards:,} shards of {load.shard_s:g} s ± {load.spread:.0%}, {load.workers} workers: "
        f"{efficiency:.1%} in {wall_s:.2f} s; {start_s:.1f} s to start, {total_s:.1f} s in all",
        flush=True,
    )
    load_facts = asdict(load) | {"shards": load.shards}
    return {**load_facts, "efficiency": efficiency, "wall_s": wall_s, "start_s": start_s, "total_s": total_s}


def measure_pool(scale: Scale) -> list[dict[str, Any]]:
    return [run_pool(load) for load in scale.loads]


def measure_ray_data(scale: Scale) -> list[dict[str, Any]]:
    return [run_ray_data(load) for load in scale.loads]


# ------------------------------------------------------------------------------------------- memory and planning


def apart(function: Callable, *arguments: Any) -> Any:
    """Called in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *arguments).result()


def peak_mib() -> float:
    """The most memory this process has had. Not from `getrusage` on Linux, which counts the parent's as well."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def queue_memory(shards: int) -> dict[str, Any]:
    """What Python allocates for a queue of which every shard is leased and committed."""
    before = peak_mib()
    tracemalloc.start()
    queue = ShardQueue(shards)
    run_rules(queue)
    now, peak = tracemalloc.get_traced_memory()
    return {"shards": shards, "bytes": now, "peak_bytes": peak, "process_grew_mib": peak_mib() - before}


def driver_memory(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The driver's process as the reports of ever more shards are merged: 256 different ones, made at other times."""
    texts = [shard_statistics(shard) for shard in range(256)]
    total, results, start = RunStatistics(), [], time.perf_counter()
    for shard in range(max(sizes)):
        part = RunStatistics.from_json(texts[shard % len(texts)])
        part.timeline = Timeline.of(IMAGES, 1.8e9 + shard, 1.8e9 + shard + 1)
        total.merge(part)
        if shard + 1 in sizes:
            seconds = time.perf_counter() - start
            state = {"state_kib": len(total.to_json()) / 1024, "peak_mib": peak_mib()}
            results.append({"shards": shard + 1, **state, "merged_per_s": (shard + 1) / seconds})
    return results


def measure_memory(scale: Scale) -> dict[str, Any]:
    result = {"report_kib": len(shard_statistics(0)) / 1024, "queue": [], "driver": []}
    for shards in scale.queue_sizes:
        result["queue"].append(one := apart(queue_memory, shards))
        print(
            f"memory    queue, {shards:>9,} shards: {one['bytes']:>9,} bytes, {one['peak_bytes']:,} at most; "
            f"process + {one['process_grew_mib']:.1f} MiB",
            flush=True,
        )
    result["driver"] = apart(driver_memory, scale.driver_sizes)
    for one in result["driver"]:
        print(
            f"memory    driver, {one['shards']:>8,} shards: {one['state_kib']:.0f} KiB of statistics, process "
            f"{one['peak_mib']:.1f} MiB; merged {one['merged_per_s']:,.0f} /s",
            flush=True,
        )
    return result


def plan(folder: str, lookups: int) -> dict[str, Any]:
    before, start = peak_mib(), time.perf_counter()
    manifest = Manifest.open(folder, shard_size=IMAGES)
    open_s = time.perf_counter() - start
    shards = [random.Random(0).randrange(manifest.num_shards) for _ in range(lookups)]
    start = time.perf_counter()
    rows = [manifest.rows(shard) for shard in shards]
    lookup_s = (time.perf_counter() - start) / lookups
    assert all(one.start == shard * IMAGES for one, shard in zip(rows, shards, strict=True))
    return {
        "rows": manifest.num_rows,
        "files": len(manifest.files),
        "row_groups": manifest.num_row_groups,
        "shards": manifest.num_shards,
        "open_s": open_s,
        "lookup_us": lookup_s * 1e6,
        "plan_kib": len(pickle.dumps(manifest)) / 1024,  # what is sent to every worker
        "process_grew_mib": peak_mib() - before,
    }


def measure_planning(scale: Scale) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, "part-00000.parquet")
        table = pa.table({name: pa.array(["the same"] * scale.file_rows) for name in ("prompt_id", "prompt")})
        pq.write_table(table, first, row_group_size=4096)  # as `flashu manifest build` does
        for number in range(1, scale.files):
            os.link(first, Path(folder, f"part-{number:05d}.parquet"))
        result = apart(plan, folder, scale.lookups)
    print(
        f"planning  {result['rows']:,} rows in {result['files']:,} files: {result['shards']:,} shards planned in "
        f"{result['open_s']:.2f} s; a lookup {result['lookup_us']:.1f} µs; plan {result['plan_kib']:.0f} KiB, process "
        f"+ {result['process_grew_mib']:.1f} MiB",
        flush=True,
    )
    return result


MEASURES: dict[str, Callable[[Scale], Any]] = {
    "leases": measure_leases,
    "pool": measure_pool,
    "ray-data": measure_ray_data,
    "memory": measure_memory,
    "planning": measure_planning,
}
ON_RAY = ("leases", "pool", "ray-data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds of each, to see that it works")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=MEASURES, metavar="NAME", help=", ".join(MEASURES)
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write the results there, as JSON")
    options = parser.parse_args()
    scale = QUICK if options.quick else Scale()

    result = {**describe_host(), "cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}
    result |= {"ray": ray.__version__, "pyarrow": pa.__version__}
    chosen = {name: measure for name, measure in MEASURES.items() if name in options.only}
    if chosen.keys() & ON_RAY:
        with session("local", local_cpus=max(load.workers for load in scale.loads) + scale.spare_cpus):
            result |= {name: chosen.pop(name)(scale) for name in ON_RAY if name in chosen}
    result |= {name: measure(scale) for name, measure in chosen.items()}
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
