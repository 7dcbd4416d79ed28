"""Train the small Show-o2 that ships with the package, from nothing, on the shapes world.

    python benchmarks/train_shapes.py vae       # pictures to latents and back
    python benchmarks/train_shapes.py model     # caption → latent, latent + question → answer
    python benchmarks/train_shapes.py export    # what came of it, as a checkpoint folder

The parts write into --out, and go on from what they find there. A GPU is used where there is one. One seed gives one
model on one kind of machine, and number of processes.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from shapes.captions import DESCRIBE, plain_caption, question, training_caption
from shapes.render import render
from shapes.scenes import Scene, random_scene
from shapes.training import STATE, Training, check_processes, in_processes, processes, rank
from shapes.vocabulary import build_tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashu.devices import resolve_device
from flashu.models import Showo2Qwen2_5, WanImageVAE
from flashu.models.geometry import PIXELS_PER_TOKEN
from flashu.models.prefix import Prefix
from flashu.models.presets import PRESETS, VAE_PRESETS
from flashu.models.times import Times
from flashu.question_rows import lay_out, prefill
from flashu.tokenizer import USER, EncodedQuestion, PromptTokenizer

CONFIG = PRESETS["embedded"]
SIDE = CONFIG.image_latent_height * PIXELS_PER_TOKEN

BATCH = 32  # scenes of a step, of either part

VAE_STEPS, VAE_LR = 1500, 1.5e-3
LATENT_NOISE = 0.3  # on latents, against each channel's spread, so that a picture survives a model's small errors
LATENT_NOISE_AT_FIRST = 0.02  # in the first half, in which it learns to draw at all
SCALE_WEIGHT = 1e-4  # on latents' squares: something has to hold their scale
FOREGROUND = 2  # by so much more do errors count where there is a shape

STEPS, LR = 8000, 2e-3
NOISES = 4  # of each picture a step: its caption's keys and values are made once for all of them
DROPPED = 0.1  # share of captions left out, for classifier-free guidance
TIME_SHIFT = 3.0  # as in sampling: logit-normal training times lean towards the noise, where the scene is decided
ASKED = 3 / 8  # of a step's pictures are asked about
TURNS = 4  # questions about a picture, one after the other
ANSWER_WEIGHT = 0.25
SHARES = (1, 2, 4)  # numbers of processes that every batch can be cut into


@dataclass
class Batch:
    """This process's share of a step: what can be made of it without the network."""

    seed: int  # of the noise
    pixels: np.ndarray  # (scenes, side, side, 3), uint8
    captions: Sequence[Sequence[int]] = ()  # their tokens, from bos to boi
    conversations: Sequence[tuple[EncodedQuestion, list[int]]] = ()  # about the first pictures


def vae_batch(seed: int, scenes: int, number: int, step: int) -> Batch:
    """The share of process `number`, so many `scenes`; things may be anywhere."""
    rng = random.Random(f"vae {seed} {step} {number}")
    noise = rng.getrandbits(63)
    return Batch(noise, pixels_of([random_scene(rng, lattice=None) for _ in range(scenes)]))


def model_batch(tokenizer: PromptTokenizer, seed: int, scenes: int, number: int, step: int) -> Batch:
    """The share of process `number`, so many `scenes`, some of them with questions."""
    rng = random.Random(f"model {seed} {step} {number}")
    noise = rng.getrandbits(63)
    drawn = [random_scene(rng) for _ in range(scenes)]
    captions = ["" if rng.random() < DROPPED else training_caption(scene, rng) for scene in drawn]
    return Batch(
        noise,
        pixels_of(drawn),
        [tokenizer.encode_prompt(caption, CONFIG.max_prompt_tokens).prefix for caption in captions],
        [conversation(tokenizer, scene, rng) for scene in drawn[: round(ASKED * scenes)]],
    )


def pixels_of(scenes: Sequence[Scene]) -> np.ndarray:
    return np.stack([np.asarray(render(scene, SIDE)) for scene in scenes])


def pictures_of(pixels: np.ndarray, options: argparse.Namespace) -> Tensor:
    """(scenes, 3, side, side) in [-1, 1]."""
    pictures = torch.from_numpy(pixels).to(options.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pictures.contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------------------------- VAE


def new_vae(options: argparse.Namespace) -> WanImageVAE:
    torch.manual_seed(options.seed)
    vae = WanImageVAE(VAE_PRESETS["embedded"]).to(options.device)
    return vae.to(memory_format=torch.contiguous_format)  # the optimiser takes weights as matrices, which are views


def train_vae(options: argparse.Namespace) -> None:
    vae, steps = new_vae(options), options.steps or VAE_STEPS
    training = Training(vae, steps, options.lr or VAE_LR, options.out / "vae")

    def losses(batch: Batch) -> dict[str, Tensor]:
        torch.manual_seed(batch.seed)
        pictures = pictures_of(batch.pixels, options)
        mean = vae.encode(pictures)[0]
        spread = mean.float().std(dim=(0, 2, 3), keepdim=True)
        risen = min(max(2 * training.step / steps - 1, 0) * 1.5, 1)  # from the middle on, until five sixths
        noise = LATENT_NOISE_AT_FIRST + risen * (LATENT_NOISE - LATENT_NOISE_AT_FIRST)
        latents = mean + noise * spread * torch.randn_like(mean)
        error = vae.decoder(vae.conv2(latents.bfloat16())).float() - pictures
        shapes = (pictures != pictures[:, :, :1, :1]).any(dim=1, keepdim=True)
        error = error * (1 + FOREGROUND * shapes)
        scale = SCALE_WEIGHT * mean.float().square().mean()
        return {"l1": error.abs().mean(), "l2": error.square().mean(), "scale": scale}

    training.run(partial(vae_batch, options.seed, options.batch_size // processes(), rank()), losses, options.loaders)


@torch.no_grad()
def trained_vae(options: argparse.Namespace) -> WanImageVAE:
    """The averaged VAE, with the mean and standard deviation of its latents' channels, measured on fresh scenes.

    Its posterior's variance is the noise that it was trained under, for all pictures the same.
    """
    vae = new_vae(options).requires_grad_(False)
    vae.load_state_dict(torch.load(options.out / "vae" / STATE, weights_only=True)["average"])
    rng = random.Random(f"statistics {options.seed}")
    pictures = pictures_of(pixels_of([random_scene(rng) for _ in range(options.statistics)]), options)
    latents = torch.cat([vae.encode(batch)[0] for batch in pictures.split(BATCH)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = vae.geometry.z_dim
    vae.conv1.weight[channels:] = 0
    vae.conv1.bias[channels:] = 2 * (LATENT_NOISE * std).log()
    vae.geometry = replace(vae.geometry, latent_mean=tuple(mean.tolist()), latent_std=tuple(std.tolist()))
    return vae.eval()


# ------------------------------------------------------------------------------------------------------------ model


def new_model(options: argparse.Namespace) -> Showo2Qwen2_5:
    """Untrained: matrices N(0, 0.02²), and modulations, gates and velocity at zero, so that blocks start as nothing."""
    torch.manual_seed(options.seed)
    model = Showo2Qwen2_5(CONFIG)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("diffusion_head_b.linear"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter[0].numel() ** -0.5 / 2)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model.to(options.device)


def times_of_images(model: Showo2Qwen2_5, t: Tensor) -> Times:
    """What the network takes for images that are each at a time of their own, `t` (images,)."""
    times = model.embed_times(t)
    blocks, final = times.blocks.permute(1, 2, 0, 3), times.final.transpose(0, 1)
    return Times(times.token[:, None], blocks[:, :, :, None], final[:, :, None])


def repeated(prefix: Prefix, times: int) -> Prefix:
    """A prefix with each of its rows `times` over."""
    rows = torch.arange(prefix.rows, device=prefix.llm[0].key.device).repeat_interleave(times)
    return replace(
        prefix,
        rows=len(rows),
        llm=[layer.select(rows) for layer in prefix.llm],
        head=[block.select(rows) for block in prefix.head],
        llm_rotary=prefix.llm_rotary.select(rows),
        head_rotary=prefix.head_rotary.select(rows),
        mask=None if prefix.mask is None else prefix.mask[rows],
    )


def flow_loss(model: Showo2Qwen2_5, latents: Tensor, captions: Sequence[Sequence[int]]) -> Tensor:
    """Flow matching: the squared error of the velocity from noise (time 0) to latent (time 1)."""
    prefix = repeated(model.encode_prefix(captions, CONFIG.native_grid), NOISES)
    clean = latents.repeat_interleave(NOISES, dim=0)
    noise = torch.randn_like(clean)
    t = torch.randn(len(clean), device=clean.device).sigmoid()
    t = t / (TIME_SHIFT - (TIME_SHIFT - 1) * t)
    share = t[:, None, None, None]
    velocity = model.velocity((1 - share) * noise + share * clean, times_of_images(model, t), prefix)
    return (velocity.float() - (clean - noise)).square().mean()


def conversation(tokenizer: PromptTokenizer, scene: Scene, rng: random.Random) -> tuple[EncodedQuestion, list[int]]:
    """Questions about a scene with their answers, and which of the tokens after the picture belong to answers."""

    def tokens(text: str) -> list[int]:
        return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids

    turns = [question(scene, rng) for _ in range(TURNS)]
    if rng.random() < 0.4:
        turns.append((DESCRIBE, plain_caption(scene)))
    after: list[int] = []
    answers: list[int] = []
    for number, (asked, answer) in enumerate(turns):
        encoded = tokenizer.encode_question(asked)
        after += encoded.after if number == 0 else [*tokens(USER), *encoded.after[1:]]
        said = [*tokens(answer), tokenizer.ids.eos]
        answers += range(len(after), len(after) + len(said))
        after += said
    return EncodedQuestion(encoded.before, after), answers


def answer_loss(
    model: Showo2Qwen2_5, latents: Tensor, conversations: Sequence[tuple[EncodedQuestion, list[int]]]
) -> Tensor:
    """Next-token prediction: the cross-entropy of answers to questions about clean latents."""
    asked, answers = zip(*conversations, strict=True)
    hidden = prefill(model, lay_out(model, latents, asked))
    longest = max(len(row.after) for row in asked)
    rows = torch.tensor([row for row, places in enumerate(answers) for _ in places], device=hidden.device)
    places = torch.tensor([place for row in answers for place in row], device=hidden.device)
    said = torch.tensor([row.after[place] for row, places in zip(asked, answers, strict=True) for place in places])
    logits = model.showo.lm_head(hidden[rows, hidden.shape[1] - longest + places - 1])
    return F.cross_entropy(logits.float(), said.to(logits.device))


def train_model(options: argparse.Namespace, tokenizer: PromptTokenizer) -> None:
    vae, model = trained_vae(options), new_model(options)
    # The fused attention kernels are slow to differentiate in bfloat16 on a CPU, and rows are short.
    fused = [SDPBackend.EFFICIENT_ATTENTION] if options.device.type == "cuda" else []

    def losses(batch: Batch) -> dict[str, Tensor]:
        torch.manual_seed(batch.seed)
        with torch.no_grad():
            latents = vae.encode(pictures_of(batch.pixels, options))[0]
        with sdpa_kernel([*fused, SDPBackend.MATH]):
            flow = flow_loss(model, latents, batch.captions)
            answers = answer_loss(model, latents[: len(batch.conversations)], batch.conversations)
        return {"flow": flow, "answer": ANSWER_WEIGHT * answers}

    batches = partial(model_batch, tokenizer, options.seed, options.batch_size // processes(), rank())
    Training(model, options.steps or STEPS, options.lr or LR, options.out / "model").run(
        batches, losses, options.loaders
    )


def export(options: argparse.Namespace) -> None:
    """The averaged weights as a checkpoint folder."""
    model = new_model(options)
    model.load_state_dict(torch.load(options.out / "model" / STATE, weights_only=True)["average"])
    model.save_pretrained(options.to)
    trained_vae(options).save_pretrained(options.to / "vae")
    build_tokenizer(CONFIG.llm_vocab_size, options.seed).save_pretrained(options.to / "tokenizer")
    print(f"written to {options.to}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vae", "model", "export"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help=f"at its highest (default: {VAE_LR} of the VAE, {LR} of the model)")
    parser.add_argument("--batch-size", type=int, default=BATCH, help="scenes of a step (default %(default)s)")
    parser.add_argument(
        "--statistics", type=int, default=512, help="pictures that latents are measured on (default %(default)s)"
    )
    parser.add_argument("--device", default=None)
    parser.add_argument(
        "--processes", type=int, choices=SHARES, help="that share a batch (default: two on a CPU, one on a GPU)"
    )
    parser.add_argument(
        "--loaders", type=int, help="processes that draw batches (default: on a GPU all cores but two, on a CPU none)"
    )
    parser.add_argument("--out", type=Path, default=Path("shapes-training"))
    parser.add_argument("--to", type=Path, default=Path("flashu/embedded"), help="where `export` writes")
    options = parser.parse_args(arguments)
    options.device = resolve_device(options.device)
    if options.part == "export":
        export(options)
        return
    if options.loaders is None:
        options.loaders = 0 if options.device.type == "cpu" else max((os.cpu_count() or 1) - 2, 0)
    count = options.processes or (2 if options.device.type == "cpu" and (os.cpu_count() or 1) > 1 else 1)
    if options.batch_size < count or options.batch_size % count:
        parser.error(f"--batch-size is {options.batch_size}; it must be a multiple of the {count} processes")
    try:
        check_processes(options.out / options.part, count)
    except ValueError as error:
        parser.error(str(error))
    if options.part == "vae":
        in_processes(count, train_vae, options)
    else:  # the tokenizer is built once for all processes
        in_processes(count, train_model, options, build_tokenizer(CONFIG.llm_vocab_size, options.seed))


if __name__ == "__main__":
    main()
