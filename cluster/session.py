"""Joining a Ray cluster, or starting Ray on this machine."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

LOCAL = "local"
ADDRESS_VARIABLE = "RAY_ADDRESS"
CONNECT_S = 10.0


class SessionError(RuntimeError):
    """There is no Ray cluster at the address given."""


@dataclass(frozen=True)
class Session:
    """What a driver is connected to, as it was at the start."""

    joined: bool  # a cluster that was there, not a Ray started for the run
    nodes: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        where = f"Ray cluster of {self.nodes} node{'s'[: self.nodes > 1]}" if self.joined else "Ray on this machine"
        return f"{where}: {self.cpus:g} CPUs, {self.gpus:g} GPUs"


@contextmanager
def session(address: str | None, *, local_cpus: float = 0) -> Iterator[Session]:
    """Be connected to Ray, and disconnect afterwards.

    address: `auto`, host:port or ray://host:port; `local` starts Ray here; None joins the cluster that this process
        runs in (under `ray job submit`, or where RAY_ADDRESS is set or `ray start` ran), and else starts one here.
    local_cpus: CPUs that a Ray started here must have at least, whatever the machine has.
    Raises `SessionError`.
    """
    # Ray warns at every start that a coming release will no longer hide GPUs from workers that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray  # which takes a second, and is not needed to know this module's error

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    joined = address != LOCAL and _join(address, quiet)
    if not joined:
        cpus = max(os.cpu_count() or 1, math.ceil(local_cpus))
        ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, **quiet)
    try:
        nodes = sum(node["Alive"] for node in ray.nodes())
        resources = ray.cluster_resources()
        yield Session(joined, nodes, resources.get("CPU", 0), resources.get("GPU", 0))
    finally:
        with suppress(Exception):
            ray.shutdown()


def _join(address: str | None, options: dict) -> bool:
    """Whether a cluster was joined; False only where none was named and none is there."""
    import ray

    named = address or os.environ.get(ADDRESS_VARIABLE)
    before = os.environ.get(ADDRESS_VARIABLE)
    if address not in (None, "auto"):
        _check_reachable(address)
        os.environ.pop(ADDRESS_VARIABLE, None)  # which Ray would prefer
    try:
        ray.init(address=address or "auto", **options)
    except Exception as error:
        if named:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            setting = f"cluster.address {address}" if address else f"{ADDRESS_VARIABLE} {named}"
            raise SessionError(f"no Ray cluster can be joined at {setting}: {reason}") from None
        return False
    finally:
        if before is not None:
            os.environ[ADDRESS_VARIABLE] = before
    return True


def _check_reachable(address: str) -> None:
    """Ask for a connection first: Ray would try for minutes."""
    place = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        if place.hostname is None or place.port is None:
            raise SessionError(f"cluster.address is {address!r}; give auto, local, host:port or ray://host:port")
        socket.create_connection((place.hostname, place.port), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise SessionError(f"no Ray cluster can be joined at cluster.address {address}: {error}") from None
