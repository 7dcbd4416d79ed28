"""What a job gives the cluster to run: work cut into shards, each done by one worker and committed as a whole.

Nothing here knows what a shard holds. Its *items* (prompts, say) are told apart by whole numbers that the job chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.tracebacks import Traceback


class SetupError(RuntimeError):
    """No worker can be set up, and trying again will not help: the run stops with this text."""


class WorkerBrokenError(RuntimeError):
    """This process cannot go on, as after a CUDA error: it is replaced, and its lease goes back to the queue."""


@dataclass(frozen=True)
class Lease:
    """A shard in a worker's hands."""

    id: int
    shard: int
    attempt: int  # 1 for the first; later ones run with nothing beside them in their worker
    alone: frozenset[int] = frozenset()  # items to run one at a time: a worker died with them in flight
    given_up: Mapping[int, str] = field(default_factory=dict)  # items not to run at all, with the reason


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    worker: str
    node: str
    gpus: float
    tell: Callable[[Traceback], None] = lambda told: None  # of an item's error, which costs no more than the item


@dataclass(frozen=True)
class Times:
    """How a worker spent its time on a shard, in seconds; `started_at` is Unix time."""

    started_at: float
    read_s: float  # reading inputs, while the shard before it was processed
    wait_s: float  # nothing to process: for a lease, its inputs, or the writing of the shard before last
    process_s: float


class ShardWork(ABC):
    """A job's work. Pickled once for each worker, which calls `setup` first.

    `read`, `process` and `encode` with `write` run in three threads of a worker, each on another shard.
    """

    @abstractmethod
    def setup(self, place: Place) -> str:
        """Load what all shards need. Returns what has to be alike on all workers, such as a model's fingerprint.

        Raises `SetupError` where trying again, here or elsewhere, is no use.
        """

    @abstractmethod
    def read(self, lease: Lease) -> Any:
        """The shard's inputs. Called again after a `StorageError`."""

    @abstractmethod
    def process(self, lease: Lease, inputs: Any, running: Callable[[Sequence[int]], None]) -> Any:
        """The shard's results. Calls `running(items)` before it runs items, so that a death can be laid at their door.

        Deals with items that raise on its own; raises `WorkerBrokenError` when the process cannot go on.
        """

    @abstractmethod
    def encode(self, results: Any) -> Any:
        """Results to what is written."""

    @abstractmethod
    def write(self, lease: Lease, encoded: Any, times: Times) -> dict[str, Any]:
        """Write the shard, its commit last, and return the report that the driver gets.

        Called again after a `StorageError`, so it must be able to write over what it left.
        """
