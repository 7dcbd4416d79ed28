"""The commands about DPG-Bench (`flashu dpg CONFIG`, which does all of it, `flashu dpg score`, `flashu dpg export`) and
about GenEval (`flashu geneval export`), and what commands about benchmarks print."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flashu.errors import InputError
from jobs.cli.options import EndpointOption, OverridesArgument, PathStyleOption, RegionOption, RunArgument, open_run
from jobs.scoring import published
from jobs.settings.config import check_no_credentials, flat, read_config

DEMO_PROMPTS = 5
SHOWN = 10  # of what is missing

FolderArgument = Annotated[Path, typer.Argument(help="The folder to write.", metavar="DIR")]


class _WithDefault(TyperGroup):
    """A group of commands, of which `compare` is meant where none is named."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["compare", *args]
        return super().parse_args(ctx, args)


dpg = typer.Typer(
    cls=_WithDefault,
    no_args_is_help=True,
    help="""DPG-Bench. `flashu dpg CONFIG`, short for `flashu dpg compare CONFIG`, makes and scores both arms.

    Try it, with no download and no GPU:

        flashu dpg --demo
    """,
)
geneval = typer.Typer(no_args_is_help=True, help="Hand runs to GenEval's own evaluator.")


@dpg.command()
def compare(
    config: Annotated[
        str | None, typer.Argument(help="A YAML file, or a built-in config such as show-o2-1.5b.", metavar="CONFIG")
    ] = None,
    overrides: OverridesArgument = None,
    demo: Annotated[
        bool,
        typer.Option("--demo", help=f"{DEMO_PROMPTS} prompts only; without a question file, the built-in model's."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the settings, and where a built-in config has them from, no more.")
    ] = False,
) -> None:
    """Run the benchmark with and without FlashU, and compare scores and costs.

    CONFIG is a run's, with three settings more: questions=FILE (required; the prompts are the file's own unless
    manifest.path is set), vqa=self, who answers, and arms=baseline,flashu, or one of them. Each arm becomes an ordinary
    run below output.path. Run the same command again to go on after a stop.
    """
    overrides = overrides or []
    if config is not None and "=" in config and not Path(config).is_file():  # settings alone
        config, overrides = None, [config, *overrides]
    elif config is None and not demo:
        raise InputError("give a config, or settings such as questions=dpg_bench.csv, or --demo")
    from jobs.scoring.arms import check_arms, describe_arms, resolved
    from jobs.scoring.benchmark import BenchmarkConfig, a_demo_of, run_benchmark

    settings = read_config(config, overrides, BenchmarkConfig)
    settings = a_demo_of(settings, DEMO_PROMPTS) if demo else settings
    released = published.released_settings_of(config)

    def announce() -> None:
        if released:
            print_settings(released, resolved(settings), describe_arms(settings))
        elif dry_run:
            every = [f"{name}: {value}" for name, value in flat(resolved(settings))]
            typer.echo("\n".join([*every, "", describe_arms(settings)]))

    if dry_run:
        check_arms(settings)
        announce()
        return
    code, _ = run_benchmark(settings, announce)
    sys.exit(code)


@dpg.command()
def score(
    run: RunArgument,
    questions: Annotated[str, typer.Option(help="The question file, in the format of dpg_bench.csv; local or s3://.")],
    overrides: OverridesArgument = None,
    vqa: Annotated[
        str,
        typer.Option(
            help="Who answers: self, the model that made the images; hf:ID_OR_PATH, a VQA or chat model of "
            "transformers (hub id, folder or s3:// folder); or mplug, DPG-Bench's official judge."
        ),
    ] = "self",
) -> None:
    """Have the questions about a run's images answered, on this machine or the cluster around it, and print the scores.

    Settings on top are those of a run's cluster and storage, as in cluster.workers=2. Run the same command again to go
    on after a stop. Scores and answers are written into the run's folder.
    """
    config = read_config(None, overrides or ())
    check_no_credentials(config)
    from jobs.scoring.rules import format_scores
    from jobs.scoring.score import score_run

    scored, code = score_run(run, questions, vqa, config, typer.echo)
    typer.echo(f"\n{format_scores(scored)}")
    sys.exit(code)


@dpg.command("export")
def export_grids(
    run: RunArgument,
    destination: FolderArgument,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    path_style: PathStyleOption = False,
) -> None:
    """Write a run's images as the 2x2 grids that DPG-Bench's own script reads."""
    from jobs.scoring import dpg_grids

    written, side = dpg_grids.export_grids(open_run(run, endpoint_url, region, path_style), destination)
    typer.echo(f"{destination}: {written} grids. Score them with the official script and --resolution {side}")


@geneval.command("export")
def export_images(
    run: RunArgument,
    destination: FolderArgument,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    path_style: PathStyleOption = False,
) -> None:
    """Write a run's images as GenEval's own evaluator reads them. Exits with 1 if some are missing."""
    from jobs.scoring import geneval as folders
    from manifests.importers import IMAGES

    done = folders.export_images(open_run(run, endpoint_url, region, path_style), destination)
    typer.echo(f"{destination}: {done.images:,} images of {done.prompts:,} prompts")
    if done.images:
        typer.echo(f"Score them with GenEval's own script: python evaluation/evaluate_images.py {destination}")
    if done.each != IMAGES:
        typer.echo(f"The official benchmark has {IMAGES} images of each prompt, this run {done.each}.")
    print_missing(done.missing)
    sys.exit(1 if done.missing else 0)


def print_settings(released: list[published.ReleasedSetting], settings: Mapping[str, Any], arms: str) -> None:
    """The settings that a release sets, where it does, and what each arm does, where there are arms."""
    typer.echo("\n".join(published.table(released, settings)))
    typer.echo(f"\n{arms}\n" if arms else "")


def print_missing(missing: list[str]) -> None:
    """The first of what an export left out."""
    for what in missing[:SHOWN]:
        typer.echo(f"Missing: {what}", err=True)
    if len(missing) > SHOWN:
        typer.echo(f"Missing: {len(missing) - SHOWN:,} more", err=True)
