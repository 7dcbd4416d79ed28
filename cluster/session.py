"""Joining a Ray cluster, or starting Ray on this machine."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

from cluster import authentication
from cluster.authentication import RefusedError

LOCAL, AUTO = "local", "auto"
ADDRESS_VARIABLE = "RAY_ADDRESS"
CLIENT = "ray"  # the scheme of addresses that are joined through a server on the cluster


class SessionError(RuntimeError):
    """There is no Ray cluster at the address given, or it lets nobody in without its token."""


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


@dataclass(frozen=True)
class ClusterAddress:
    """A cluster that may be there."""

    address: str  # as Ray takes it
    source: str  # where it is named, for errors
    named: bool  # by the user, not by a file that Ray left behind


@contextmanager
def session(
    address: str | None, *, local_cpus: float = 0, note: Callable[[str], object] = lambda text: None
) -> Iterator[Session]:
    """Be connected to Ray, and disconnect afterwards.

    address: `auto`, host:port or ray://host:port; `local` starts Ray here; None joins the cluster that this process
        runs in (under `ray job submit`, or where RAY_ADDRESS is set or `ray start` ran), and else starts one here.
    local_cpus: CPUs that a Ray started here must have at least, whatever the machine has.
    note: is told in a line of a cluster that is no more.
    Raises `SessionError`.
    """
    # Ray warns at every start that a coming release will no longer hide GPUs from workers that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    found = _find(address)
    variables = _variables_to_join(found) if found else None
    if found and variables is None:
        note(f"No Ray answers at {found.address}, which {found.source} names: starting Ray on this machine")
        found = None
    import ray  # which takes a second, and is not needed to know this module's error

    with authentication.environment(authentication.variables_to_start() if variables is None else variables):
        try:
            _connect(ray, found, local_cpus)
            nodes = sum(node["Alive"] for node in ray.nodes())
            resources = ray.cluster_resources()
            yield Session(found is not None, nodes, resources.get("CPU", 0), resources.get("GPU", 0))
        finally:
            with suppress(Exception):
                ray.shutdown()


def check_address(address: str | None) -> None:
    """See that a cluster that was named can be joined, before anything is done. Raises `SessionError` as `session`."""
    if found := _find(address):
        _variables_to_join(found)


def _find(address: str | None) -> ClusterAddress | None:
    """The cluster to join, if any. Raises `SessionError` where `auto` has none to find."""
    if address == LOCAL:
        return None
    if address not in (None, AUTO):
        return ClusterAddress(address, f"cluster.address {address}", True)
    variable = os.environ.get(ADDRESS_VARIABLE)
    if variable == LOCAL and address is None:
        return None
    if variable and variable not in (AUTO, LOCAL):
        return ClusterAddress(variable, f"{ADDRESS_VARIABLE} {variable}", True)
    named, file = AUTO in (address, variable), _address_file()
    with suppress(OSError, UnicodeDecodeError):
        # Another user's file is not to lead a run, and this user's token, elsewhere.
        mine = named or file.stat().st_uid == os.getuid()
        if mine and (current := file.read_text(encoding="utf-8").strip()):
            return ClusterAddress(current, str(file), named)
    if not named:
        return None
    if running := _running():
        return ClusterAddress(running, "cluster.address auto", True)
    raise SessionError(f"cluster.address is auto, and no Ray was started on this machine: {file} is not there")


def _running() -> str | None:
    """The address of the one cluster of which a process runs on this machine, wherever its files are."""
    with suppress(Exception):  # nothing of it is public
        from ray._private.services import find_gcs_addresses

        (address,) = find_gcs_addresses()
        return str(address)
    return None


def _address_file() -> Path:
    """Where `ray start` writes the address of the cluster that it started or joined."""
    folder = os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"
    return Path(folder) / "ray" / "ray_current_cluster"


def _variables_to_join(found: ClusterAddress) -> dict[str, str] | None:
    """The environment to join a cluster with; None where none answers that was not named."""
    try:
        place = urlsplit(found.address if "://" in found.address else f"//{found.address}")
        if place.scheme not in ("", CLIENT) or place.hostname is None or place.port is None:
            raise ValueError
    except ValueError:
        raise SessionError(f"{found.source}: give auto, local, host:port or ray://host:port") from None
    host = f"[{place.hostname}]" if ":" in place.hostname else place.hostname
    try:
        variables = authentication.variables_to_join(f"{host}:{place.port}", client=place.scheme == CLIENT)
    except RefusedError as error:
        raise SessionError(f"the Ray cluster at {found.source} cannot be joined: {error}") from None
    if variables is None and found.named:
        raise SessionError(f"no Ray cluster can be joined at {found.source}: nothing answers there")
    return variables


def _connect(ray: ModuleType, found: ClusterAddress | None, local_cpus: float) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if found is None:
        cpus = max(os.cpu_count() or 1, math.ceil(local_cpus))
        ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, **quiet)
        return
    before = os.environ.pop(ADDRESS_VARIABLE, None)  # which Ray would prefer
    try:
        ray.init(address=found.address, **quiet)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SessionError(f"no Ray cluster can be joined at {found.source}: {reason}") from None
    finally:
        if before is not None:
            os.environ[ADDRESS_VARIABLE] = before
