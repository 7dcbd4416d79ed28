"""The commands about FlashU itself: `flashu plan`, `flashu calibrate`, `flashu analyze …`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashu.errors import InputError

if TYPE_CHECKING:
    from flashu.acceleration.plan import Plan
    from flashu.pipeline import TextToImagePipeline

analyze = typer.Typer(
    no_args_is_help=True, help="Measure which neurons, layers and head outputs matter. Draws figures."
)

ModelOption = Annotated[str, typer.Option("--model", help="Checkpoint: a folder, a hub id, or 'embedded'.")]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cpu, …", show_default="CUDA if there is one")]
PromptsOption = Annotated[
    Path | None, typer.Option(help="A text file, a prompt a line.", show_default="built-in prompts")
]
FolderOption = Annotated[Path, typer.Option("--output", "-o", help="The folder for numbers and figures.")]


def plan(
    preset: Annotated[str, typer.Option(help="FlashU settings: paper-1.5b, fast, quality, off.")] = "paper-1.5b",
    model: Annotated[str, typer.Option("--model", help="A model's size by name.")] = "show-o2-1.5b",
    steps: Annotated[int | None, typer.Option(help="Inference steps.", show_default="the preset's")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale where the preset has no schedule.")] = 7.5,
    prefix: Annotated[int, typer.Option(help="Tokens of the prompt, with bos and boi.")] = 62,
) -> None:
    """Print what FlashU does at every step of a run, and what each step costs.

    Costs are counted over the sampler, with no weights: TFLOP of one image, a multiply-add being two.
    """
    from flashu.acceleration.plan import make_plan
    from flashu.config import flashu_preset
    from flashu.flops import count_image, count_release
    from flashu.models.geometry import preset as model_preset

    settings = flashu_preset(preset)
    config, vae = model_preset(model)
    grid = config.native_grid
    steps = steps or settings.total_steps
    planned = make_plan(settings, steps, guidance)
    cost = count_image(config, vae, planned, settings, grid, prefix)
    typer.echo(f"{model} with {preset}: {settings.describe()}\n")
    typer.echo(format_plan(planned, cost.rows))
    vae_cost = cost.parts["VAE decode"]
    stock = count_image(config, vae, make_plan(None, 50, guidance), None, grid, prefix).total
    for label, flop in (
        ("this plan, with its VAE", cost.total),
        ("stock model, 50 steps", stock),
        ("the release with these settings", sum(count_release(config, settings, steps, grid)) + vae_cost),
        ("the release's stock model, 50 steps", sum(count_release(config, None, 50, grid)) + vae_cost),
    ):
        typer.echo(f"{label:<37}{flop / 1e12:>9.1f} TFLOP{flop / cost.total:>8.2f}x")
    typer.echo("The release's rows leave its 3-D VAE out (2.6 times the folded one, which stands in for it).")


def format_plan(planned: Plan, costs: list[int]) -> str:
    """A plan as a table, a line a step."""
    lines = [f"{'step':>4}  {'LLM':<7} {'layers':<13} {'head':<8} {'guidance':>8} {'TFLOP':>8}"]
    for row, flop in zip(planned.rows, costs, strict=True):
        layers = "all, measured" if row.measure else "skips" if row.skip else "-" if row.llm == "-" else "all"
        lines.append(
            f"{row.step:>4}  {row.llm.value:<7} {layers:<13} {row.head.value:<8} {row.guidance:>8g} {flop / 1e12:>8.3f}"
        )
    return "\n".join(lines) + "\n"


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    model: ModelOption = "embedded",
    prompts: PromptsOption = None,
    method: Annotated[
        str, typer.Option(help="trajectories: real denoising runs; tokens: one pass over token rows, as the release.")
    ] = "trajectories",
    steps: Annotated[int, typer.Option(help="Inference steps of each trajectory.")] = 8,
    device: DeviceOption = None,
) -> None:
    """Measure which FFN neurons and KV groups matter, for every worker of a cluster to prune alike."""
    from tqdm import tqdm

    from flashu.calibration import PROMPTS
    from flashu.calibration import calibrate as measure

    texts = _read_prompts(prompts) or PROMPTS
    _make_folder(output.parent)
    pipe = _load(model, device)
    with tqdm(total=len(texts), unit="prompt", disable=None, leave=False) as bar:
        scores = measure(
            pipe.model, texts, tokenizer=pipe.tokenizer, method=method, num_inference_steps=steps, on_prompt=bar.update
        )
    scores.save(output)
    typer.echo(f"{output}: scores of {len(scores.ffn)} layers from {len(texts)} prompts ({method})")


@analyze.command()
def obd(
    output: FolderOption = Path("analysis"),
    model: ModelOption = "embedded",
    task: Annotated[str, typer.Option(help="generation or understanding.")] = "generation",
    prompts: PromptsOption = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help='For understanding: JSON lines {"image": FILE, "question": TEXT}.',
            show_default="the model's own pictures of the prompts",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Inference steps of each run.")] = 8,
    device: DeviceOption = None,
) -> None:
    """Importance of every FFN neuron and KV group: what a layer's output would lose without it."""
    from tqdm import tqdm

    from flashu.analysis import figures
    from flashu.analysis import obd as analysis
    from flashu.calibration import PROMPTS

    if task not in analysis.TASKS:
        raise InputError(f"--task {task}: there are {', '.join(analysis.TASKS)}")
    texts = _read_prompts(prompts) or PROMPTS
    _make_folder(output)
    pipe = _load(model, device)
    items = _question_pairs(pipe, pairs, texts, steps) if task == "understanding" else texts
    with tqdm(total=len(items), unit="item", disable=None, leave=False) as bar:
        if task == "understanding":
            scores = analysis.understanding_of(pipe.model, items, on_item=bar.update)
        else:
            scores = analysis.generation(
                pipe.model, pipe.tokenizer, items, num_inference_steps=steps, on_item=bar.update
            )
    scores.save(output / f"obd-{task}.json")
    figures.draw_obd(scores, output / f"obd-{task}.png")
    typer.echo(f"{output}: obd-{task}.json, obd-{task}.png")


@analyze.command()
def compare(
    generation: Annotated[Path, typer.Argument(help="obd-generation.json")],
    understanding: Annotated[Path, typer.Argument(help="obd-understanding.json")],
    output: FolderOption = Path("analysis"),
) -> None:
    """Per layer, which important neurons serve generation, understanding, or both (the paper's Figure 1)."""
    from flashu.analysis import compare as analysis
    from flashu.analysis import figures
    from flashu.analysis.obd import ObdScores

    shares = analysis.compare(ObdScores.load(generation), ObdScores.load(understanding))
    _make_folder(output)
    analysis.save(shares, output / "compare.json")
    figures.draw_comparison(shares, output / "compare.png")
    shared = sum(layer.shared for layer in shares) / len(shares)
    typer.echo(f"{output}: compare.json, compare.png. On average {shared:.0f}% of a layer's neurons serve both tasks.")


@analyze.command()
def activations(
    output: FolderOption = Path("analysis"),
    model: ModelOption = "embedded",
    prompts: PromptsOption = None,
    steps: Annotated[int, typer.Option(help="Inference steps of each run.")] = 35,
    ratio: Annotated[float, typer.Option(help="r_LS: the share of layers that skipping would leave out.")] = 0.2,
    device: DeviceOption = None,
) -> None:
    """How layers and head outputs change within a step and from step to step."""
    from tqdm import tqdm

    from flashu.analysis import activations as analysis
    from flashu.analysis import figures
    from flashu.calibration import PROMPTS

    texts = _read_prompts(prompts) or PROMPTS
    _make_folder(output)
    pipe = _load(model, device)
    with tqdm(total=len(texts), unit="prompt", disable=None, leave=False) as bar:
        found = analysis.analyze(
            pipe.model, pipe.tokenizer, texts, num_inference_steps=steps, skip_ratio=ratio, on_item=bar.update
        )
    found.save(output / "activations.json")
    figures.draw_layers(found, output / "layers.png")
    figures.draw_similarities(found, output / "similarities.png")
    figures.draw_head_drift(found, output / "head-drift.png")
    typer.echo(f"{output}: activations.json, layers.png, similarities.png, head-drift.png")


def _load(model: str, device: str | None) -> TextToImagePipeline:
    from flashu.pipeline import TextToImagePipeline

    return TextToImagePipeline.from_pretrained(model, device=device)


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    prompts = [line.strip() for line in _read(file).splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{file} holds no prompts")
    return prompts


def _question_pairs(pipe: TextToImagePipeline, file: Path | None, prompts: list[str], steps: int) -> list[tuple]:
    """Latents and encoded questions, from a file or of the model's own pictures."""
    from PIL import Image, UnidentifiedImageError

    from flashu.understanding import picture_latents

    if file is None:
        pictures = pipe(prompts, seeds=0, num_inference_steps=steps)
        asked = [(picture, "What is in the image?") for picture in pictures]
    else:
        asked = []
        for number, line in enumerate(_read(file).splitlines(), start=1):
            try:
                pair = json.loads(line)
                asked.append((Image.open(file.parent / pair["image"]), str(pair["question"])))
            except (ValueError, KeyError, TypeError, OSError, UnidentifiedImageError) as error:
                raise InputError(
                    f'{file}, line {number}: needs {{"image": FILE, "question": TEXT}} with a readable image: {error}'
                ) from None
    grid = pipe.model.config.native_grid
    return [(picture_latents(pipe.vae, picture, grid), pipe.tokenizer.encode_question(text)) for picture, text in asked]


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from None
