"""The commands about DPG-Bench: `flashu dpg score` and `flashu dpg export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.run_cli import EndpointOption, OverridesArgument, PathStyleOption, RegionOption, RunArgument, open_run

app = typer.Typer(no_args_is_help=True, help="Score runs by DPG-Bench's rules, or hand them to its own script.")


@app.command()
def score(
    run: RunArgument,
    questions: Annotated[str, typer.Option(help="The question file, in the format of dpg_bench.csv; local or s3://.")],
    overrides: OverridesArgument = None,
    vqa: Annotated[str, typer.Option(help="Who answers: self, the model that made the images.")] = "self",
) -> None:
    """Have the questions about a run's images answered, on this machine or the cluster around it, and print the scores.

    Settings on top are those of a run's cluster and storage, as in cluster.workers=2. Run the same command again to go
    on after a stop. Scores and answers are written into the run's folder.
    """
    from jobs.config import check_no_credentials, read_config

    config = read_config(None, overrides or ())
    check_no_credentials(config)
    from jobs.dpg.score import format_scores, score_run

    scored, code = score_run(run, questions, vqa, config, typer.echo)
    typer.echo(f"\n{format_scores(scored)}")
    for image in scored.unanswered[:10]:
        typer.echo(f"Not answered: {image['prompt_id']!r}, image {image['image_index']}: {image['error']}", err=True)
    sys.exit(code)


@app.command()
def export(
    run: RunArgument,
    destination: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DIR")],
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    path_style: PathStyleOption = False,
) -> None:
    """Write a run's images as the 2x2 grids that DPG-Bench's own script reads."""
    from jobs.dpg.export import export_grids

    written, side = export_grids(open_run(run, endpoint_url, region, path_style), destination)
    typer.echo(f"{destination}: {written} grids. Score them with the official script and --resolution {side}")
