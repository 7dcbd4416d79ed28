"""The commands about FlashU itself: `flashu plan`, `flashu calibrate`, `flashu analyze …`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashu.config import FLASHU_PRESETS, GUIDANCE_SCALE, NUM_INFERENCE_STEPS, flashu_preset
from flashu.errors import InputError
from jobs.cli.options import TokenizerOption

if TYPE_CHECKING:
    from PIL import Image

    from flashu.models import PromptTokenizer, Showo2Qwen2_5
    from flashu.probe import Pair

analyze = typer.Typer(
    no_args_is_help=True, help="Measure which neurons, layers and head outputs matter. Draws figures."
)

ModelOption = Annotated[str, typer.Option("--model", help="Checkpoint: a folder, a hub id, or 'embedded'.")]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cpu, …", show_default="CUDA if there is one")]
PromptsOption = Annotated[
    Path | None, typer.Option(help="A text file, a prompt a line.", show_default="built-in prompts")
]
TaskOption = Annotated[str, typer.Option(help="generation or understanding.")]
VaeOption = Annotated[
    str | None, typer.Option(help="For understanding: the VAE.", show_default="beside the model, else the hub")
]
PairsOption = Annotated[
    Path | None,
    typer.Option(
        help='For understanding: JSON lines {"image": FILE, "question": TEXT}.',
        show_default="the model's own pictures of the prompts",
    ),
]
FolderOption = Annotated[Path, typer.Option("--output", "-o", help="The folder for numbers and figures.")]


def plan(
    preset: Annotated[str, typer.Option(help=f"FlashU settings: {', '.join(FLASHU_PRESETS)}.")] = "paper-1.5b",
    model: Annotated[str, typer.Option("--model", help="A model's size by name.")] = "show-o2-1.5b",
    steps: Annotated[int | None, typer.Option(help="Inference steps.", show_default="the preset's")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale; the preset's schedule ends there.",
            show_default=f"the schedule's, or {GUIDANCE_SCALE}",
        ),
    ] = None,
    prefix: Annotated[int, typer.Option(help="Tokens of the prompt, with bos and boi.")] = 62,
) -> None:
    """Print what FlashU does at every step of a run, and what each step costs.

    Costs are counted over the sampler, with no weights: TFLOP of one image, a multiply-add being two.
    """
    from flashu import arguments
    from flashu.acceleration.applied import Acceleration
    from flashu.acceleration.plan import make_plan
    from flashu.flops import count_image, count_release, format_plan
    from flashu.models.presets import preset as model_preset

    settings = flashu_preset(preset)
    config, vae = model_preset(model)
    grid = config.native_grid
    steps = settings.total_steps if steps is None else steps
    if guidance is not None:
        settings = settings.at_guidance(arguments.finite("--guidance", guidance, zero=True))
    guidance = GUIDANCE_SCALE if guidance is None else guidance
    planned = Acceleration.of(settings, config.llm).plan(steps, guidance)
    cost = count_image(config, vae, planned, grid, prefix)
    typer.echo(f"{model} with {preset}: {settings.describe()}\n")
    typer.echo(format_plan(planned, cost.steps))
    vae_cost = cost.parts["VAE decode"]
    stock = count_image(config, vae, make_plan(None, NUM_INFERENCE_STEPS, guidance), grid, prefix).total
    release = sum(count_release(config, settings, steps, grid))
    release_stock = sum(count_release(config, None, NUM_INFERENCE_STEPS, grid))
    for label, flop in (
        ("this plan, with its VAE", cost.total),
        (f"stock model, {NUM_INFERENCE_STEPS} steps", stock),
        ("the release with these settings", release + vae_cost),
        (f"the release's stock model, {NUM_INFERENCE_STEPS} steps", release_stock + vae_cost),
    ):
        typer.echo(f"{label:<37}{flop / 1e12:>9.1f} TFLOP{flop / cost.total:>8.2f}x")
    typer.echo("The release's rows leave its 3-D VAE out (2.6 times the folded one, which stands in for it).")


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    model: ModelOption = "embedded",
    tokenizer: TokenizerOption = None,
    prompts: PromptsOption = None,
    task: TaskOption = "generation",
    method: Annotated[
        str,
        typer.Option(
            help="For generation. trajectories: real denoising runs; tokens: one pass over token rows, as the release."
        ),
    ] = "trajectories",
    vae: VaeOption = None,
    pairs: PairsOption = None,
    steps: Annotated[int, typer.Option(help="Inference steps of each trajectory, or of the model's own pictures.")] = 8,
    device: DeviceOption = None,
) -> None:
    """Measure which FFN neurons, KV groups and layers matter to a task.

    By scores of generation, every worker of a cluster prunes alike; those of understanding are for
    `apply_flashu_patch(…, understanding_scores=…)`.
    """
    from tqdm import tqdm

    from flashu import calibration

    _check_task(task, pairs)
    texts = _read_prompts(prompts)
    _make_folder(output.parent)
    if output.is_dir():
        raise InputError(f"-o {output} is a folder; name a file")
    asked = _read_pairs(pairs) if pairs else None
    network, tokens = _load(model, tokenizer, device)
    items = _question_pairs(network, tokens, vae, asked, texts, steps) if task == "understanding" else texts
    with tqdm(total=len(items), unit="item", disable=None, leave=False) as bar:
        if task == "understanding":
            scores = calibration.calibrate_understanding(network, items, on_pair=bar.update)
        else:
            options = {"method": method, "num_inference_steps": steps, "on_prompt": bar.update}
            scores = calibration.calibrate(network, items, tokenizer=tokens, **options)
    with _writing(output):
        scores.save(output)
    source = "questions" if task == "understanding" else "prompts"
    typer.echo(f"{output}: scores of {len(scores.ffn)} layers for {task}, from {len(items)} {source} ({scores.method})")


@analyze.command()
def obd(
    output: FolderOption = Path("analysis"),
    model: ModelOption = "embedded",
    tokenizer: TokenizerOption = None,
    vae: VaeOption = None,
    task: TaskOption = "generation",
    prompts: PromptsOption = None,
    pairs: PairsOption = None,
    steps: Annotated[int, typer.Option(help="Inference steps of each run.")] = 8,
    device: DeviceOption = None,
) -> None:
    """Importance of every FFN neuron and KV group: what a layer's output would lose without it."""
    from tqdm import tqdm

    from flashu.analysis import figures
    from flashu.analysis import obd as analysis

    _check_task(task, pairs)
    texts = _read_prompts(prompts)
    _make_folder(output)
    asked = _read_pairs(pairs) if pairs else None
    network, tokens = _load(model, tokenizer, device)
    items = _question_pairs(network, tokens, vae, asked, texts, steps) if task == "understanding" else texts
    with tqdm(total=len(items), unit="item", disable=None, leave=False) as bar:
        if task == "understanding":
            scores = analysis.understanding_of(network, items, on_item=bar.update)
        else:
            scores = analysis.generation(network, tokens, items, num_inference_steps=steps, on_item=bar.update)
    with _writing(output):
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
    with _writing(output):
        analysis.save(shares, output / "compare.json")
        figures.draw_comparison(shares, output / "compare.png")
    shared = sum(layer.shared for layer in shares) / len(shares)
    typer.echo(f"{output}: compare.json, compare.png. On average {shared:.0f}% of a layer's neurons serve both tasks.")


@analyze.command()
def activations(
    output: FolderOption = Path("analysis"),
    model: ModelOption = "embedded",
    tokenizer: TokenizerOption = None,
    prompts: PromptsOption = None,
    steps: Annotated[int, typer.Option(help="Inference steps of each run.")] = 35,
    ratio: Annotated[float, typer.Option(help="r_LS: the share of layers that skipping would leave out.")] = 0.2,
    device: DeviceOption = None,
) -> None:
    """How layers and head outputs change within a step and from step to step."""
    from tqdm import tqdm

    from flashu.analysis import activations as analysis
    from flashu.analysis import figures

    texts = _read_prompts(prompts)
    _make_folder(output)
    network, tokens = _load(model, tokenizer, device)
    with tqdm(total=len(texts), unit="prompt", disable=None, leave=False) as bar:
        found = analysis.analyze(
            network, tokens, texts, num_inference_steps=steps, skip_ratio=ratio, on_item=bar.update
        )
    with _writing(output):
        found.save(output / "activations.json")
        figures.draw_layers(found, output / "layers.png")
        figures.draw_similarities(found, output / "similarities.png")
        figures.draw_head_drift(found, output / "head-drift.png")
    typer.echo(f"{output}: activations.json, layers.png, similarities.png, head-drift.png")


def _load(model: str, tokenizer: str | None, device: str | None) -> tuple[Showo2Qwen2_5, PromptTokenizer]:
    """In float32, whatever the device: what is measured here are small differences."""
    from flashu.devices import resolve_device
    from flashu.models import PromptTokenizer, Showo2Qwen2_5

    network = Showo2Qwen2_5.from_pretrained(model, dtype="float32", device=resolve_device(device))
    if tokenizer:
        return network, PromptTokenizer.from_pretrained(tokenizer)
    return network, PromptTokenizer.beside(network.source, network.config)


def _check_task(task: str, pairs: Path | None) -> None:
    from flashu.acceleration.wanda import GENERATION, TASKS

    if task not in TASKS:
        raise InputError(f"--task {task}: there are {', '.join(TASKS)}")
    if task == GENERATION and pairs:
        raise InputError("--pairs are for --task understanding; generation is measured on --prompts")


def _read_prompts(file: Path | None) -> Sequence[str]:
    """Those of a file, else the built-in ones."""
    from flashu.probe import PROMPTS

    if file is None:
        return PROMPTS
    prompts = [line.strip() for line in _read(file).split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{file} holds no prompts")
    return prompts


def _read_pairs(file: Path) -> list[tuple[Image.Image, str]]:
    """Pictures and questions from JSON lines."""
    from flashu.pictures import open_picture

    asked = []
    lines = [(number, line) for number, line in enumerate(_read(file).split("\n"), start=1) if line.strip()]
    for number, line in lines:  # split there alone: a text may hold what Python takes for other ends of lines
        try:
            pair = json.loads(line)
            asked.append((open_picture(file.parent / pair["image"]), str(pair["question"])))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(
                f'{file}, line {number}: needs {{"image": FILE, "question": TEXT}} with a readable image: {error}'
            ) from None
    if not asked:
        raise InputError(f"{file} holds no pairs of an image and a question")
    return asked


def _question_pairs(
    model: Showo2Qwen2_5,
    tokenizer: PromptTokenizer,
    vae: str | None,
    asked: list[tuple[Image.Image, str]] | None,
    prompts: Sequence[str],
    steps: int,
) -> list[Pair]:
    """Latents and encoded questions; of the model's own pictures of `prompts`, where none are given."""
    from flashu.pictures import picture_latents
    from flashu.pipeline import TextToImagePipeline
    from flashu.probe import own_pairs

    if asked is None:
        return list(own_pairs(model, tokenizer, prompts, steps))
    pipe, grid = TextToImagePipeline.from_model(model, vae=vae, tokenizer=tokenizer), model.config.native_grid
    return [(picture_latents(pipe.vae, picture, grid), tokenizer.encode_question(text)) for picture, text in asked]


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns what goes wrong while results are written into an error that names where."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target} cannot be written: {error}") from None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{folder} is a file, where a folder is needed") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from None
