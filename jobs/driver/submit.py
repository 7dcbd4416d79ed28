"""Starting a run as a job of a Ray cluster, from outside it."""

from __future__ import annotations

import asyncio
import json
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.authentication import needed_token
from flashu.config import preset_for
from flashu.errors import InputError
from jobs.settings.config import RunConfig, check_no_credentials

BASE = "default"  # the built-in config that the submitted command starts from


def submit_run(
    config: RunConfig, address: str, working_dir: Path | None, follow: bool, echo: Callable[[str], None]
) -> int:
    """Submit `config` to the cluster whose dashboard is at `address`. Returns the job's exit code, or 0 at once.

    The config travels as settings of the command, so nothing is uploaded but `working_dir`, if given.
    Raises `InputError` when the cluster cannot be reached or asks for another token, or a path means nothing there.
    """
    _check_paths(config, working_dir)
    try:
        client = _client(address)
        command = shlex.join(["python", "-m", "jobs", "run", BASE, *settings_of(config)])
        runtime_env = {"working_dir": str(working_dir)} if working_dir else {}
        job = client.submit_job(entrypoint=command, runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError) as error:  # of which `RefusedError` is one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the job could not be submitted to {address}: {reason}") from None
    echo(f"Submitted {job}. Stop it with: ray job stop --address {address} {job}")
    if not follow:
        return 0
    try:
        asyncio.run(_follow(client, job, echo))
    except KeyboardInterrupt:
        echo(f"{job} goes on. Follow it again with: ray job logs --follow --address {address} {job}")
        return 0
    info = client.get_job_info(job)
    if info.status == "SUCCEEDED":
        return 0
    echo(f"{job}: {info.status}")
    return info.driver_exit_code or 1


def settings_of(config: RunConfig) -> list[str]:
    """What differs from the defaults, as `section.key=value`, with values in JSON, which is YAML too."""
    defaults = RunConfig().to_dict()
    defaults["flashu"]["preset"] = preset_for(config.model.path)
    return [
        f"{section}.{name}={json.dumps(value, ensure_ascii=False)}"
        for section, values in config.to_dict().items()
        for name, value in values.items()
        if value != defaults[section][name]
    ]


def _client(address: str) -> Any:
    """A client of the cluster's jobs, with this user's token if the cluster asks for one, and only then.

    Raises `RefusedError` where it asks for one that is not here, and what Ray raises where it cannot be reached.
    """
    from ray import exceptions
    from ray.job_submission import JobSubmissionClient

    refused = getattr(exceptions, "AuthenticationError", ())  # which older Rays do not know
    try:
        return JobSubmissionClient(address)
    except refused:
        token = needed_token()
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token.value}"})
    except refused:
        raise token.refused() from None


def _check_paths(config: RunConfig, working_dir: Path | None) -> None:
    def is_relative(path: Any) -> bool:
        return bool(path) and "://" not in path and not Path(path).is_absolute()

    check_no_credentials(config)
    model = config.model
    for path in (model.path, model.vae, model.tokenizer, config.flashu.scores, config.quality.clip):
        if is_relative(path) and Path(path).exists():
            raise InputError(f"{path} is a relative path; on a cluster give an absolute path, s3://… or a hub id")
    if is_relative(config.output.path):
        raise InputError(f"output.path {config.output.path} is relative; on a cluster give an absolute path or s3://…")
    manifest = config.manifest.path
    if is_relative(manifest) and manifest != "demo" and not (working_dir and (working_dir / manifest).exists()):
        raise InputError(f"manifest.path {manifest} is relative; on a cluster give an absolute path or s3://…")


async def _follow(client: Any, job: str, echo: Callable[[str], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how Ray calls aiohttp
        async for text in client.tail_job_logs(job):
            echo(text.rstrip("\n"))
