"""Workers for a job's shards, as its config asks for them, on the Ray that is joined or started for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from cluster.pool import WorkerPool, capacity
from cluster.pool_options import PoolOptions
from cluster.session import Session, session
from cluster.work import ShardWork
from flashu.errors import InputError
from jobs.settings.config import AUTO, RunConfig


def pool_options(config: RunConfig) -> PoolOptions:
    cluster = config.cluster
    return PoolOptions(
        workers=None if cluster.workers == AUTO else cluster.workers,
        gpus_per_worker=cluster.gpus_per_worker or 0.0,
        cpus_per_worker=cluster.cpus_per_worker,
        max_attempts=cluster.max_attempts,
        lease_timeout_s=cluster.lease_timeout_s,
        start_timeout_s=cluster.start_timeout_s,
        storage_patience_s=config.storage.retry_for_s,
        hedge=cluster.hedge,
    )


@contextmanager
def workers_for(
    work: ShardWork,
    num_shards: int,
    done: Collection[int],
    config: RunConfig,
    note: Callable[[str], object],
    identity: str | None = None,
) -> Iterator[WorkerPool]:
    """A pool for the shards that are not `done`, within a session on Ray. See `WorkerPool` for `identity`.

    Raises `SessionError` where no cluster can be joined, `InputError` where no worker will ever find a place.
    """
    options, cluster = pool_options(config), config.cluster
    local_cpus = (options.workers or 1) * options.cpus_per_worker
    with session(cluster.address, local_cpus=local_cpus, note=note) as where:
        note(str(where))
        if cluster.gpus_per_worker is None and where.gpus:
            options = replace(options, gpus_per_worker=1.0)
        _check_capacity(options, where, num_shards - len(done), note)
        yield WorkerPool(work, num_shards, done, options, identity=identity)


def _check_capacity(options: PoolOptions, where: Session, shards: int, note: Callable[[str], object]) -> None:
    """Warn of workers that find no place now. Raises `InputError` where none ever will."""
    room = capacity(options)
    wanted = min(options.workers or 1, shards)
    if wanted <= room:
        return
    gpus = f" and {options.gpus_per_worker:g} GPUs" if options.gpus_per_worker else ""
    text = (
        f"{wanted} workers of {options.cpus_per_worker:g} CPUs{gpus} each are asked for, and there is room for "
        f"{room} ({where})"
    )
    if not room and not where.joined:
        raise InputError(f"{text}; lower cluster.gpus_per_worker, or name a cluster with cluster.address")
    note(f"Warning: {text}; the others wait until nodes join")
