"""The commands about pictures and the model that makes them: `flashu generate`, `ask` and `convert`."""

from __future__ import annotations

import json
import mimetypes
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashu.config import BATCH_SIZE, FLASHU_PRESETS, GUIDANCE_SCALE, MAX_NEW_TOKENS, NUM_INFERENCE_STEPS, flashu_preset
from flashu.errors import InputError
from jobs.cli import options
from jobs.settings.config import parse_size

if TYPE_CHECKING:
    from PIL import Image

    from flashu.acceleration.wanda import WandaScores
    from flashu.config import FlashUConfig
    from flashu.pipeline import TextToImagePipeline

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

PromptsArgument = Annotated[list[str], typer.Argument(help="One or more prompts, each in quotes.", metavar="PROMPT…")]
PicturesOption = Annotated[
    str, typer.Option("--output", "-o", help="An image file (one prompt), or a folder for numbered ones.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the first image; each next one gets the next number.")]
StepsOption = Annotated[
    int | None,
    typer.Option(help="Inference steps: points of the time grid.", show_default=f"{NUM_INFERENCE_STEPS}, or FlashU's"),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale; 0 or 1 for none. FlashU's schedule ends there.",
        show_default=f"the model's own; {GUIDANCE_SCALE} for released ones",
    ),
]
NegativeOption = Annotated[str, typer.Option(help="What the images should not show.")]
FlashUOption = Annotated[
    str | None, typer.Option(help=f"Accelerate with FlashU settings: {', '.join(FLASHU_PRESETS)}.")
]
ScoresOption = Annotated[
    Path | None, typer.Option(help="Calibrated scores for --flashu.", show_default="measured first")
]
BatchSizeOption = Annotated[int, typer.Option(help="Images made at once.")]
CompileOption = Annotated[
    str, typer.Option("--compile", help="off, auto (on CUDA), max or graphs: worth its minute for many images.")
]


def generate(
    prompts: PromptsArgument,
    output: PicturesOption = "images",
    model: options.ModelOption = "embedded",
    vae: options.VaeOption = None,
    tokenizer: options.TokenizerOption = None,
    variant: options.VariantOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    negative: NegativeOption = "",
    size: options.SizeOption = None,
    flashu: FlashUOption = None,
    scores: ScoresOption = None,
    batch_size: BatchSizeOption = BATCH_SIZE,
    compile_mode: CompileOption = "off",
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
) -> None:
    """Make images from prompts.

    PNG files carry prompt, seed and settings as text, in the chunk "flashu".
    """
    pixels = parse_size("--size", size)
    files = _output_files(output, len(prompts))
    from flashu.patch import apply_flashu_patch
    from flashu.pipeline import TextToImagePipeline

    settings, measured, steps = _checked(
        prompts, negative, seed, flashu, scores, steps, guidance, batch_size, compile_mode
    )
    pipe = TextToImagePipeline.from_pretrained(
        model, vae=vae, tokenizer=tokenizer, dtype=dtype, device=device, variant=variant
    )
    if settings:
        apply_flashu_patch(pipe.model, settings, scores=measured, tokenizer=pipe.tokenizer)
    _warn_of_cost(pipe, steps, guidance, pixels)
    pictures = pipe.compile(compile_mode).stream(
        prompts,
        seeds=seed,
        negative_prompts=negative,
        num_inference_steps=steps,
        guidance_scale=guidance,
        size=pixels,
        batch_size=batch_size,
        progress=True,
    )
    start = time.perf_counter()
    for picture, file in zip(pictures, files, strict=True):
        _save(picture, file)
    seconds = time.perf_counter() - start
    shown = str(files[0]) if len(files) == 1 else f"{files[0]} … {files[-1].name}"
    typer.echo(f"{len(files)} image{'s'[: len(files) > 1]} in {seconds:.1f} s: {shown}")


def ask(
    image: Annotated[Path, typer.Argument(help="An image file.", metavar="IMAGE")],
    questions: Annotated[list[str], typer.Argument(help="One or more, each in quotes.", metavar="QUESTION…")],
    yes_no: Annotated[
        bool, typer.Option("--yes-no", help="Answer yes or no, with the probability of yes; fast: nothing is decoded.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.")] = MAX_NEW_TOKENS,
    temperature: Annotated[float, typer.Option(help="0 for the likeliest answer; above, answers are drawn.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many tokens.", show_default="all")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the first answer; each next one gets the next number.")] = 0,
    letterbox: Annotated[
        bool, typer.Option("--letterbox", help="Show all of the image, on grey, instead of cutting its sides off.")
    ] = False,
    model: options.ModelOption = "embedded",
    vae: options.VaeOption = None,
    tokenizer: options.TokenizerOption = None,
    variant: options.VariantOption = None,
    size: options.SizeOption = None,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
) -> None:
    """Answer questions about an image, a line each."""
    pixels = parse_size("--size", size)
    from flashu import arguments
    from flashu.answering import Asked, Decoding
    from flashu.pipeline import TextToImagePipeline

    # Checked before a model is fetched and loaded, which can take long.
    Asked.of(image, questions)
    Decoding(max_new_tokens, temperature, top_k, top_p)
    arguments.seeds(seed, len(questions), "questions")
    pipe = TextToImagePipeline.from_pretrained(
        model, vae=vae, tokenizer=tokenizer, dtype=dtype, device=device, variant=variant
    )
    shown: dict[str, Any] = {"size": pixels, "fit": "letterbox" if letterbox else "crop"}
    if yes_no:
        for probability in pipe.yes_probability(image, questions, **shown):
            typer.echo(f"{'yes' if probability > 0.5 else 'no'} {probability:.3f}")
        return
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seeds": seed}
    for answer in pipe.answer(image, questions, max_new_tokens=max_new_tokens, **drawn, **shown):
        typer.echo(answer)


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint: a folder or a hub id.", metavar="SRC")],
    destination: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.", metavar="DST")],
    dtype: Annotated[str, typer.Option(help="Number format to store: bfloat16 or float32.")] = "bfloat16",
    layout: Annotated[
        str, typer.Option(help="safetensors, or release: what the released code's from_pretrained reads.")
    ] = "safetensors",
    vae: options.VaeOption = None,
    tokenizer: options.TokenizerOption = None,
    variant: options.VariantOption = None,
) -> None:
    """Write model, VAE, tokenizer and config as one folder.

    As safetensors it needs no hub and no pickle, so it can go on a cluster's disk or into a bucket as it is. Weights
    are mapped, and converted shard by shard: it takes the memory of one.
    """
    if destination.exists():
        raise InputError(f"{destination} exists already; name a new folder, or remove it first")
    import torch

    from flashu.checkpoints import weights
    from flashu.checkpoints.files import RELEASED_VAE, vae_beside
    from flashu.devices import FLOAT8, resolve_dtype
    from flashu.pipeline import TextToImagePipeline
    from flashu.pretrained import STORED, Showo2Qwen2_5, WanImageVAE

    if dtype == FLOAT8:
        raise InputError("--dtype float8 is for running a model, and made as it is loaded; store bfloat16")
    resolve_dtype(dtype, torch.device("cpu"), "--dtype")
    if layout not in weights.LAYOUTS:
        raise InputError(f"--layout {layout}: there are {', '.join(weights.LAYOUTS)}")
    model = Showo2Qwen2_5.from_pretrained(source, dtype=STORED, variant=variant)
    decoder = WanImageVAE.from_pretrained(vae or vae_beside(model.source))
    pipe = TextToImagePipeline.from_model(model, vae=decoder, tokenizer=tokenizer)
    pipe.save_pretrained(destination, dtype, layout)
    size = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    typer.echo(f"{destination}: {size / 1e9:.2f} GB. Use it with: flashu generate … --model {destination}")
    if layout == weights.RELEASE:
        for what in model.config.unlike_released():
            typer.echo(f"The released code cannot load this model: {what}")
        if not (destination / RELEASED_VAE).exists():
            typer.echo(
                f"Its scripts want {RELEASED_VAE} too, which this VAE, kept for images alone, cannot be made into"
            )


def _checked(
    prompts: list[str],
    negative: str,
    seed: int,
    flashu: str | None,
    scores: Path | None,
    steps: int | None,
    guidance: float | None,
    batch_size: int,
    compile_mode: str,
) -> tuple[FlashUConfig | None, WandaScores | None, int]:
    """FlashU's settings and scores, and the inference steps.

    Raises `InputError` for what cannot be used, before a model is fetched and loaded, which can take long.
    """
    from flashu import arguments
    from flashu.acceleration.plan import make_plan
    from flashu.acceleration.wanda import WandaScores
    from flashu.models.blocks import check_mode

    settings = flashu_preset(flashu) if flashu else None
    measured = None
    if scores is not None:
        if settings is None:
            raise InputError("--scores is what --flashu prunes by; give --flashu too")
        measured = WandaScores.load(scores)
    steps = steps if steps is not None else settings.total_steps if settings else NUM_INFERENCE_STEPS
    arguments.whole("--steps", steps, least=2)
    arguments.whole("--batch-size", batch_size, least=1)
    check_mode("--compile", compile_mode)
    arguments.texts("prompts", [*prompts, negative])
    arguments.seeds(seed, len(prompts))
    if guidance is not None:
        arguments.finite("--guidance", guidance, zero=True)
        settings = settings and settings.at_guidance(guidance)
    make_plan(settings, steps, guidance or GUIDANCE_SCALE)  # raises where they do not fit
    return settings, measured, steps


def _output_files(output: str, count: int) -> list[Path]:
    """Where the images go. Numbers in a folder go on from those already there. Makes nothing yet."""
    path = Path(output)
    suffix = path.suffix.lower()
    kind, _ = mimetypes.guess_type(path.name)
    is_image = suffix in IMAGE_SUFFIXES or (kind or "").startswith("image/")
    is_file = is_image and not path.is_dir() and not output.endswith(("/", os.sep))
    if is_file and suffix not in IMAGE_SUFFIXES:
        raise InputError(f"-o {output}: cannot write {suffix} files; use {', '.join(IMAGE_SUFFIXES)}, or a folder")
    if is_file and count > 1:
        raise InputError(f"-o {output}: {count} prompts make {count} images; give a folder instead of a file")
    folder = path.parent if is_file else path
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise InputError(f"-o {output}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"-o {output}: no permission to write in {nearest}")
    if is_file:
        return [path]
    taken = [int(file.stem) for file in path.iterdir() if file.stem.isdecimal()] if path.is_dir() else []
    first = max(taken, default=-1) + 1
    return [path / f"{first + index:05d}.png" for index in range(count)]


def _warn_of_cost(
    pipe: TextToImagePipeline, steps: int, guidance: float | None, pixels: int | tuple[int, int] | None
) -> None:
    """Say what an image takes, before it is made, where that is far from the usual."""
    from flashu.acceleration.plan import make_plan
    from flashu.flops import unusual_cost
    from flashu.models.geometry import token_grid

    config, acceleration = pipe.model.config, pipe.model.acceleration
    scale = config.guidance_scale if guidance is None else guidance
    plan_of = acceleration.plan if acceleration else partial(make_plan, None)
    grid = token_grid(pixels, config.native_grid)
    cost = unusual_cost(config, pipe.vae.geometry, lambda number: plan_of(number, scale), steps, grid)
    if cost:
        warnings.warn(str(cost), stacklevel=2)


def _save(picture: Image.Image, file: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    options = {}
    if file.suffix.lower() == ".png":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("flashu", json.dumps(picture.info, ensure_ascii=False))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, **options)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}") from None
