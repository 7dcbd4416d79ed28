"""The commands about runs: `flashu run`, `submit`, `status`, `report` and `filter`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from flashu.errors import InputError
from jobs.cli import options
from jobs.cli.options import open_run
from jobs.settings.config import read_config


def run(config: options.ConfigArgument, overrides: options.OverridesArgument = None) -> None:
    """Make the images of a manifest, on this machine or the Ray cluster around it.

    Run the same command again to go on after a stop. Exits with 0 only if every prompt has its images.
    """
    settings = read_config(config, overrides or ())
    from jobs.settings.inputs import check_at_once

    check_at_once(settings)
    from jobs.driver.run import run_job

    sys.exit(run_job(settings))


def submit(
    config: options.ConfigArgument,
    overrides: options.OverridesArgument = None,
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
    settings = read_config(config, overrides or ())
    if not address:
        raise InputError("give the cluster's dashboard with --address http://head:8265, or set RAY_ADDRESS")
    from jobs.driver.submit import submit_run

    sys.exit(submit_run(settings, address, working_dir, follow, typer.echo))


def status(
    run: options.RunArgument,
    endpoint_url: options.EndpointOption = None,
    region: options.RegionOption = None,
    path_style: options.PathStyleOption = False,
) -> None:
    """Print where a run stands."""
    from jobs.driver.status import describe_run

    typer.echo(describe_run(open_run(run, endpoint_url, region, path_style)))


def report(
    run: options.RunArgument,
    endpoint_url: options.EndpointOption = None,
    region: options.RegionOption = None,
    path_style: options.PathStyleOption = False,
) -> None:
    """Write a run's summary, report and dataset card anew from what it has committed, also while it is going."""
    from jobs.driver.status import rebuild_report

    storage = open_run(run, endpoint_url, region, path_style)
    rebuild_report(storage)
    typer.echo(f"{storage.url}/report.html")


def filter_(
    run: options.RunArgument,
    destination: Annotated[str, typer.Argument(help="The folder of the copy, local or s3://…", metavar="DST")],
    where: Annotated[
        str | None,
        typer.Option(help="Keep images for which this is true: 'quality.sharpness > 100 and not quality.broken'."),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(help="Keep images with at least this VQA score, from 0 to 1 (of runs with quality.vqa=true)."),
    ] = None,
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Of images that look alike, in the whole run, keep the first.")
    ] = False,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Take a run's shards that are there, if some are not yet.")
    ] = False,
    endpoint_url: options.EndpointOption = None,
    region: options.RegionOption = None,
    path_style: options.PathStyleOption = False,
) -> None:
    """Copy the images of a run that are worth keeping, as a run folder of its own.

    --where is a condition on the columns of the run's metadata, those of the manifest among them, with comparisons,
    and, or, not, in [..], + - * /, numbers, 'texts', true, false and null. quality.NAME is the column quality_NAME, and
    column["any name"] one whose name is no plain word. A comparison with null is null, and a condition that comes out
    null drops the image; == null and != null ask for it.

    --dedup compares perceptual hashes, exactly, with those kept before (4 bits of 64 may differ): 50 MB and half a
    minute for a million varied images kept, longer for images of few kinds. Flat images (quality.broken) all look
    alike, and stay: --where drops them.

    Run the same command again to go on after a stop. Exits with 1 if images that were to be kept could not be read, or
    the report could not be written.
    """
    from tqdm import tqdm

    from jobs.filtering.choice import Filter
    from jobs.filtering.job import filter_run

    asked = Filter(where, min_score, dedup)
    source, copy = (open_run(url, endpoint_url, region, path_style) for url in (run, destination))
    sys.exit(filter_run(source, copy, asked, allow_incomplete, tqdm.write))
