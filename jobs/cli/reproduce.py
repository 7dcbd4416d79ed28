"""`flashu reproduce`: what the papers ran, by one command each, with the published figures beside what comes out."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from flashu.checkpoints.files import EMBEDDED
from flashu.errors import InputError
from jobs.cli.benchmarks import print_missing, print_settings
from jobs.cli.options import OverridesArgument
from jobs.scoring import published
from jobs.scoring.published import DPG, GENEVAL, MODELS, UNDERSTANDING
from jobs.settings.config import BASELINE, FLASHU, read_config

app = typer.Typer(
    no_args_is_help=True,
    help="""What the papers ran, with the released settings, and the published figures beside what comes out.

    Try it, with no download and no GPU:

        flashu reproduce dpg
    """,
)

ModelOption = Annotated[
    str, typer.Option("--model", help="Checkpoint: a folder, a hub id such as showlab/show-o2-1.5B, or 'embedded'.")
]
LikeOption = Annotated[
    str | None,
    typer.Option(help=f"Which released model it is of: {', '.join(MODELS)}.", show_default="as its name says"),
]
OutputOption = Annotated[str, typer.Option("--output", "-o", help="The folder to write, local or s3://…")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the settings and where they are from, no more.")]


@app.command()
def dpg(
    overrides: OverridesArgument = None,
    model: ModelOption = EMBEDDED,
    like: LikeOption = None,
    questions: Annotated[
        str, typer.Option(help="The question file, dpg_bench.csv.", show_default="five prompts of the built-in model's")
    ] = "",
    output: OutputOption = "reproduce-dpg",
    dry_run: DryRunOption = False,
) -> None:
    """DPG-Bench, unaccelerated and with FlashU: `flashu dpg` with the released settings.

    Settings on top are those of `flashu dpg`, as in vqa=mplug, the papers' judge. Run the same command again to go on
    after a stop.
    """
    from jobs.scoring.benchmark import BenchmarkConfig, a_demo_of, run_benchmark

    options = {"output.path": ("-o", output), "questions": ("--questions", questions)}
    config, beside_published = _begin(DPG, BenchmarkConfig, model, like, options, overrides, dry_run)
    if model == EMBEDDED and not config.questions:
        config = a_demo_of(config, 5)
    code, comparison = run_benchmark(config, beside_published.print_settings)
    if comparison:
        beside_published.print_figures(_measured(comparison["arms"]))
    sys.exit(code)


@app.command()
def geneval(
    overrides: OverridesArgument = None,
    model: ModelOption = EMBEDDED,
    like: LikeOption = None,
    prompts: Annotated[
        str, typer.Option(help="evaluation_metadata.jsonl, or Show-o2's rewritten prompts in its format.")
    ] = "",
    output: OutputOption = "reproduce-geneval",
    dry_run: DryRunOption = False,
) -> None:
    """GenEval's images, unaccelerated and with FlashU, as folders for its own evaluator; and its scores, once it ran.

    Settings on top are those of `flashu run`. Run the same command again to go on after a stop, and when the evaluator
    has written its results where the command says.
    """
    from jobs.scoring.geneval import EVALUATE, GenevalConfig, run_geneval

    options = {"output.path": ("-o", output), "prompts": ("--prompts", prompts)}
    config, beside_published = _begin(GENEVAL, GenevalConfig, model, like, options, overrides, dry_run)
    code, arms = run_geneval(config, beside_published.print_settings)
    if not arms:
        sys.exit(code)
    measured: dict[str, dict[str, str]] = {name: {} for name in arms}
    for name, arm in arms.items():
        print_missing(arm.missing)
        if arm.scores:
            measured[name]["score"] = f"{arm.scores['overall']:.2f}"
            typer.echo(f"\n{name}: " + ", ".join(f"{tag} {score:.2f}" for tag, score in arm.scores.items()))
        elif arm.samples:
            typer.echo(f"\nScore {name} with GenEval's own script, then run this command again:")
            typer.echo(f"    {EVALUATE.format(samples=arm.samples.absolute(), results=arm.results.absolute())}")
        else:
            typer.echo(f"\nHand {name} to GenEval's script: flashu geneval export {output.rstrip('/')}/{name} DIR")
    _add_speed_up(measured, {name: arm.summary["throughput"] for name, arm in arms.items()}, "worker_seconds_per_image")
    beside_published.print_figures(measured)
    sys.exit(code)


@app.command()
def understanding(
    overrides: OverridesArgument = None,
    model: ModelOption = EMBEDDED,
    like: LikeOption = None,
    questions: Annotated[
        str,
        typer.Option(
            help='JSON lines {"image": FILE, "question": TEXT, "answer": TEXT}, the answer where it is known.',
            show_default="about the built-in model's own pictures",
        ),
    ] = "",
    output: OutputOption = "reproduce-understanding",
    dry_run: DryRunOption = False,
) -> None:
    """Questions about images, answered unaccelerated and with FlashU, on this machine.

    Settings on top are those of the config, as in answering.max_new_tokens=128, model.dtype=bfloat16 or
    flashu.und_r_p=0.4.
    """
    from jobs.scoring.understanding import RESULT, UnderstandingConfig, run_understanding

    options = {"output": ("-o", output), "questions": ("--questions", questions)}
    config, beside_published = _begin(UNDERSTANDING, UnderstandingConfig, model, like, options, overrides, dry_run)
    result = run_understanding(config, beside_published.print_settings)
    first, second = (result["arms"][arm] for arm in (BASELINE, FLASHU))
    for arm, figures in result["arms"].items():
        right = "" if figures["right"] is None else f", {100 * figures['right']:.1f}% right"
        typer.echo(
            f"{arm}: {figures['seconds_per_answer']:.3f} s and {figures['tflop_per_answer']:.3g} TFLOP an answer of "
            f"{figures['tokens_per_answer']:.1f} tokens{right} ({figures['settings']})"
        )
    same = sum(row[BASELINE] == row[FLASHU] for row in result["answers"])
    typer.echo(f"{same:,} of {len(result['answers']):,} answers are the same; {output}/{RESULT}")
    ratio = first["seconds_per_answer"] / second["seconds_per_answer"]
    beside_published.print_figures({FLASHU: {"speed_up": f"{ratio:.2f}x"}})


def _begin(
    benchmark: str,
    kind: type,
    model: str,
    like: str | None,
    options: dict[str, tuple[str, str]],
    overrides: list[str] | None,
    dry_run: bool,
) -> tuple[Any, _SideBySide]:
    """The config of a benchmark, and what prints it. `options` are settings by their option here, with its value.

    A dry run ends here, after what can be told without running anything.

    Raises `InputError` for settings on top that have an option, as more than the config goes by those.
    """
    options = {"model.path": ("--model", model)} | options
    for name in (override.partition("=")[0].strip() for override in overrides or ()):
        if name in options:
            raise InputError(f"give {name} as {options[name][0]}")
    released = _released(benchmark, model, like)
    given = [f"{name}={value}" for name, (_, value) in options.items() if value]
    # The built-in model runs by the defaults, as a released one's settings do not suit it.
    file = None if model == EMBEDDED else str(published.config_file(benchmark, released))
    config = read_config(file, [*given, *(overrides or ())], kind)
    beside_published = _SideBySide(benchmark, model, released, config)
    if dry_run:
        beside_published.print_settings()
        beside_published.print_figures()
        raise typer.Exit
    return config, beside_published


def _released(benchmark: str, model: str, like: str | None) -> str:
    """The released model whose settings and figures go with a checkpoint. Raises `InputError`."""
    known = [name for of_benchmark, name in published.FIGURES if of_benchmark == benchmark]
    if like and like not in known:
        raise InputError(f"--like {like}: there are {', '.join(known)}")
    released = like or (known[0] if model == EMBEDDED else published.released_model(model))
    if released not in known:
        raise InputError(f"nothing is published of {released} on {benchmark}; there are {', '.join(known)}")
    return released


class _SideBySide:
    """Prints a benchmark beside what was published of it: its settings before it runs, its figures after."""

    def __init__(self, benchmark: str, model: str, released: str, config: Any):
        from jobs.scoring.arms import ArmsConfig, check_arms, describe_arms, resolved

        self.benchmark, self.model, self.released = benchmark, model, released
        self.released_settings = published.released_settings(published.config_file(benchmark, released))
        has_arms = isinstance(config, ArmsConfig)
        if has_arms:
            check_arms(config)
        self.now = resolved(config) if has_arms else asdict(config)
        self.arms = describe_arms(config) if has_arms else ""

    def print_settings(self) -> None:
        """The settings that there are, and where the release has them."""
        if self.model == EMBEDDED:
            typer.echo(f"The built-in model has settings and figures of its own; those told are of {self.released}.\n")
        typer.echo("Settings, and where the release has them (S is Show-o2's, F FlashU's):\n")
        print_settings(self.released_settings, self.now, self.arms)

    def print_figures(self, measured: dict[str, dict[str, str]] | None = None) -> None:
        """What was published, what came out here if it did, and what was not run as published."""
        if measured is not None:
            here = " of the built-in model" if self.model == EMBEDDED else ""
            typer.echo(f"\nPublished of {self.released}, and what came out here{here}:\n")
            for line in published.beside(published.FIGURES[self.benchmark, self.released], measured):
                typer.echo(line)
            typer.echo("")
        typer.echo("Not as published:\n")
        for line in (*published.other_than(self.released_settings, self.now), *published.UNLIKE[self.benchmark]):
            typer.echo(f"- {line}")


def _measured(arms: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Of `comparison.json`, what stands beside published figures."""
    measured = {name: {"score": f"{arm['score']:.2f}"} for name, arm in arms.items() if arm["score"] is not None}
    _add_speed_up(measured, arms, "seconds_per_image")
    return measured


def _add_speed_up(measured: dict[str, dict[str, str]], arms: dict[str, Any], wall: str) -> None:
    """By the time that GPUs took, where it was measured, else by the workers'."""
    if len(arms) < 2:
        return
    first, second = arms.values()
    for key in ("gpu_seconds_per_image", wall):
        if first.get(key) and second.get(key):
            measured.setdefault(list(arms)[1], {})["speed_up"] = f"{first[key] / second[key]:.2f}x"
            return
