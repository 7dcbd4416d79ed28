"""The command about GenEval: `flashu geneval export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import EndpointOption, PathStyleOption, RegionOption, RunArgument, open_run
from jobs.cli.printing import print_missing

app = typer.Typer(no_args_is_help=True, help="Hand runs to GenEval's own evaluator.")


@app.command()
def export(
    run: RunArgument,
    destination: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DIR")],
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    path_style: PathStyleOption = False,
) -> None:
    """Write a run's images as GenEval's own evaluator reads them. Exits with 1 if some are missing."""
    from jobs.scoring.geneval_folders import export_images
    from manifests.importers import IMAGES

    done = export_images(open_run(run, endpoint_url, region, path_style), destination)
    typer.echo(f"{destination}: {done.images:,} images of {done.prompts:,} prompts")
    if done.images:
        typer.echo(f"Score them with GenEval's own script: python evaluation/evaluate_images.py {destination}")
    if done.each != IMAGES:
        typer.echo(f"The official benchmark has {IMAGES} images of each prompt, this run {done.each}.")
    print_missing(done.missing)
    sys.exit(1 if done.missing else 0)
