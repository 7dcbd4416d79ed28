"""Joining a Ray cluster, or starting Ray on this machine."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class SessionError(RuntimeError):
    """There is no Ray cluster at the address given."""


@contextmanager
def session(address: str | None, *, local_cpus: float = 0) -> Iterator[str]:
    """Be connected to Ray, and disconnect afterwards. Yields what it is connected to, in words.

    address: `auto`, host:port or ray://host:port; `local` starts Ray here; None joins the cluster that this process
        runs in (under `ray job submit`, or where RAY_ADDRESS is set or `ray start` ran), and else starts one here.
    local_cpus: CPUs that a Ray started here must have at least, whatever the machine has.
    Raises `SessionError`.
    """
    # Ray warns at every start that a coming release will no longer hide GPUs from workers that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray  # which takes a second, and is not needed to know this module's error

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    joined = False
    if address != "local":
        try:
            ray.init(address=address or "auto", **quiet)
            joined = True
        except Exception as error:
            if address is not None:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise SessionError(f"no Ray cluster can be joined at cluster.address {address}: {reason}") from None
    if not joined:
        cpus = max(os.cpu_count() or 1, math.ceil(local_cpus))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    try:
        yield _describe(joined, ray.nodes(), ray.cluster_resources())
    finally:
        with suppress(Exception):
            ray.shutdown()


def _describe(joined: bool, known: list[dict], resources: dict[str, float]) -> str:
    nodes = sum(node["Alive"] for node in known)
    has = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    where = f"Ray cluster of {nodes} node{'s'[: nodes > 1]}" if joined else "Ray on this machine"
    return f"{where}: {has}"
