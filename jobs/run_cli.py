"""The commands about runs: `flashu run`, `submit`, `status` and `report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashu.errors import InputError

if TYPE_CHECKING:
    from cluster.storage import Storage

ConfigArgument = Annotated[
    str, typer.Argument(help="A YAML file, or a built-in config such as demo.", metavar="CONFIG")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Settings on top, as in sampling.seed=1.", metavar="[KEY=VALUE]…")
]
RunArgument = Annotated[str, typer.Argument(help="A run's folder, local or s3://…", metavar="RUN")]
EndpointOption = Annotated[str | None, typer.Option(help="Of an S3 server that is not Amazon's.")]
RegionOption = Annotated[str | None, typer.Option(help="S3 region.")]
PathStyleOption = Annotated[bool, typer.Option("--path-style", help="Address buckets as http://host/bucket.")]


def run(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Make the images of a manifest, on this machine or the Ray cluster around it.

    Run the same command again to go on after a stop. Exits with 0 only if every prompt has its images.
    """
    from jobs.config import read_config

    settings = read_config(config, overrides or ())
    from jobs.generate import run_job

    sys.exit(run_job(settings))


def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster's dashboard, as in http://head:8265.", envvar="RAY_ADDRESS")
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(help="A checkout to upload and run; needed only where the nodes have no flashu installed."),
    ] = None,
    follow: Annotated[bool, typer.Option(help="Follow the log, and exit as the job does.")] = True,
) -> None:
    """Start a run as a job on a Ray cluster."""
    from jobs.config import read_config

    settings = read_config(config, overrides or ())
    if not address:
        raise InputError("give the cluster's dashboard with --address http://head:8265, or set RAY_ADDRESS")
    from jobs.submit import submit_run

    sys.exit(submit_run(settings, address, working_dir, follow, typer.echo))


def status(
    run: RunArgument,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    path_style: PathStyleOption = False,
) -> None:
    """Print where a run stands."""
    from jobs.status import describe_run

    typer.echo(describe_run(open_run(run, endpoint_url, region, path_style)))


def report(
    run: RunArgument,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    path_style: PathStyleOption = False,
) -> None:
    """Write a run's summary, report and dataset card anew from what it has committed, also while it is going."""
    from jobs.status import rebuild_report

    storage = open_run(run, endpoint_url, region, path_style)
    rebuild_report(storage)
    typer.echo(f"{storage.url}/report.html")


def open_run(run: str, endpoint_url: str | None, region: str | None, path_style: bool) -> Storage:
    """The storage that a run's folder is in."""
    from cluster.storage import S3Options, open_storage

    return open_storage(run, S3Options(endpoint_url, region, path_style))
