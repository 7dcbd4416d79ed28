"""What a worker pool is told: how many workers, what each of them needs, and how much is forgiven."""

from __future__ import annotations

from dataclasses import dataclass


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
