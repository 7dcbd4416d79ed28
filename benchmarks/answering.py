"""Measure what answering questions about images takes, and what FlashU saves and costs there.

    python benchmarks/answering.py speed --preset embedded mid --json result.json
    python benchmarks/answering.py flashu --json result.json
    python benchmarks/answering.py flop --preset show-o2-1.5b

`speed` answers many questions about one image, in two ways that take turns: as the release does, a question at a time,
with the whole row run again for every token; and with the image read once, the questions side by side, and a cache.
Weights are random but for `embedded`, and answers end at no token, so that both ways do the same work. `flashu` asks
the built-in model yes-or-no questions about rendered scenes, under each technique. `flop` counts answers of any
geometry; where layers are left out it takes the last ones, which with token pruning are cheaper than others.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from generate import MODELS
from hardware import describe
from quality_measures import QUESTIONS, answers_right
from random_weights import random_model
from shapes.captions import yes_no
from shapes.render import render
from shapes.scenes import random_scene
from torch import Tensor

from flashu import conversation
from flashu.acceleration.applied import Acceleration, remove_flashu_patch
from flashu.calibration import calibrate_understanding
from flashu.config import FLASHU_PRESETS, FlashUConfig
from flashu.devices import resolve_device, resolve_dtype
from flashu.flops import FRAME_TOKENS, count_answer
from flashu.models import Showo2Qwen2_5
from flashu.models.geometry import PATCH_SIZE, PIXELS_PER_TOKEN
from flashu.patch import apply_flashu_patch
from flashu.pictures import picture_latents
from flashu.pipeline import TextToImagePipeline
from flashu.question_rows import embed_image, embed_tokens, rotary_at, row_mask
from flashu.tokenizer import EncodedQuestion

NEVER = -1  # no answer ends
QUESTION_TOKENS = 20  # with what frames it

OFF = FLASHU_PRESETS["off"]
SETTINGS: dict[str, FlashUConfig | None] = {
    "off": None,
    **{f"FFN pruning {share:g}": replace(OFF, und_r_p=share) for share in (0.2, 0.4, 0.6)},
    **{f"layer skipping {share:g}": replace(OFF, und_r_LS=share) for share in (0.1, 0.2)},
    **{
        f"token pruning {share:g} after layer {layer}": replace(OFF, und_r_tok=share, und_tok_layer=layer)
        for share, layer in ((0.25, 2), (0.5, 2), (0.5, 5))
    },
    "all": replace(OFF, und_r_p=0.2, und_r_LS=0.1, und_r_tok=0.25, und_tok_layer=5),
}


@torch.no_grad()
def recomputed(model: Showo2Qwen2_5, latents: Tensor, question: EncodedQuestion, count: int) -> list[int]:
    """A greedy answer as the release makes it: embedded once, and every position run again for each token."""
    image = embed_image(model, latents, question)
    before, end, tokens = len(question.before), image.shape[1], list(question.after)
    for _ in range(count):
        embeds = torch.cat((image, embed_tokens(model, [tokens])), dim=1)
        length = embeds.shape[1]
        rotary = rotary_at(model, torch.arange(length, device=model.device)[None])
        hidden, _ = model.showo.model(embeds, rotary, mask=row_mask(length, before, end, model.device))
        tokens.append(int(model.showo.lm_head(hidden[:, -1]).argmax()))
    return tokens[len(question.after) :]


def cached(model: Showo2Qwen2_5, latents: Tensor, questions: Sequence[EncodedQuestion], count: int) -> list[list[int]]:
    images = conversation.read_images(model, latents, questions[0])
    return conversation.generate(model, images, [questions], count, NEVER, conversation.greedy)[0]


def speed(options: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(options.device)
    rows = []
    for name in options.preset:
        if name == "embedded":
            model = Showo2Qwen2_5.from_pretrained(name, device=device, dtype=resolve_dtype(None, device))
        else:
            model = random_model(Showo2Qwen2_5, MODELS[name], 0, resolve_dtype(None, device), device)
        config, rng = model.config, random.Random(0)
        height, width = (side * PATCH_SIZE for side in config.native_grid)
        latents = torch.randn(1, config.image_latent_dim, height, width, generator=torch.Generator().manual_seed(0))

        def ids(count: int, rng: random.Random = rng) -> list[int]:
            return [rng.randrange(256) for _ in range(count)]

        frame = ids(FRAME_TOKENS)
        questions = [EncodedQuestion(frame, [0, *ids(QUESTION_TOKENS)]) for _ in range(options.questions)]
        cached(model, latents, questions[:2], 2)  # warm-up
        recomputed(model, latents, questions[0], 1)
        seconds: dict[str, list[float]] = {"recomputed": [], "cached": []}
        for _ in range(options.repeats):
            start = time.perf_counter()
            again = [recomputed(model, latents, question, options.tokens) for question in questions]
            middle = time.perf_counter()
            ours = cached(model, latents, questions, options.tokens)
            seconds["recomputed"].append(middle - start)
            seconds["cached"].append(time.perf_counter() - middle)
        row = {way: statistics.median(times) for way, times in seconds.items()}
        same = sum(one == other for one, other in zip(again, ours, strict=True))
        rows.append({"preset": name, **row, "speed_up": row["recomputed"] / row["cached"], "same_answers": same})
        print(
            f"{name:<14}{row['recomputed']:9.3f} s recomputed{row['cached']:9.3f} s cached"
            f"{rows[-1]['speed_up']:8.1f}x   {same} of {options.questions} answers equal",
            flush=True,
        )
    return {**describe(device), "questions": options.questions, "answer_tokens": options.tokens, "runs": rows}


def flashu(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy on yes-or-no questions about renders, and the operations of an answer, under each technique."""
    pipe = TextToImagePipeline.from_pretrained(options.model, device=options.device, dtype="float32")
    config = pipe.model.config
    side = config.image_latent_height * PIXELS_PER_TOKEN
    rng, pairs = random.Random("calibration for understanding"), []
    for scene in (random_scene(rng) for _ in range(options.calibration)):
        asked = pipe.tokenizer.encode_question(yes_no(scene, rng)[0].question)
        pairs.append((picture_latents(pipe.vae, render(scene, side), config.native_grid), asked))
    scores = calibrate_understanding(pipe.model, pairs)
    asked = pairs[0][1]
    rows = []
    for name, settings in SETTINGS.items():
        acceleration = None
        if settings:
            apply_flashu_patch(pipe.model, settings, understanding_scores=scores)
            acceleration = pipe.model.acceleration
        start = time.perf_counter()
        right = answers_right(pipe, options.renders, side, 50)
        took = time.perf_counter() - start
        lengths = {"question_tokens": len(asked.after) - 1, "answer_tokens": 1, "frame_tokens": len(asked.before)}
        flop = sum(count_answer(config, acceleration, config.native_grid, **lengths).values())
        remove_flashu_patch(pipe.model)
        rows.append({"setting": name, "right": round(right, 2), "gflop_per_answer": flop / 1e9, "seconds": took})
        print(f"{name:<34}{right:7.1f}% right{flop / 1e9:9.4f} GFLOP{rows[0]['gflop_per_answer'] * 1e9 / flop:7.2f}x")
    questions = options.renders * QUESTIONS
    return {**describe(pipe.model.device), "model": options.model, "questions": questions, "settings": rows}


def flop(options: argparse.Namespace) -> dict[str, Any]:
    """Operations of questions about one image, with and without FlashU."""
    rows = []
    for name in options.preset:
        config = MODELS[name]
        for setting, settings in SETTINGS.items():
            acceleration = settings and Acceleration.of(settings, config.llm)
            lengths = {"question_tokens": QUESTION_TOKENS, "answer_tokens": options.tokens}
            parts = count_answer(config, acceleration, config.native_grid, questions=options.questions, **lengths)
            rows.append({"preset": name, "setting": setting, **{part: n / 1e12 for part, n in parts.items()}})
            total = sum(parts.values())
            print(f"{name:<14}{setting:<34}{total / 1e12:9.3f} TFLOP")
    return {"questions": options.questions, "answer_tokens": options.tokens, "runs": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "flashu", "flop"))
    parser.add_argument("--preset", nargs="+", choices=MODELS, default=["embedded", "mid"])
    parser.add_argument("--model", default="embedded", help="for flashu: one that knows the shapes world")
    parser.add_argument("--questions", type=int, default=20, help="about one image")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--renders", type=int, default=400, help="for flashu: scenes that are asked about")
    parser.add_argument("--calibration", type=int, default=64, help="for flashu: pairs that are calibrated on")
    parser.add_argument("--device", help="default: CUDA if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    options = parser.parse_args()
    result = {"speed": speed, "flashu": flashu, "flop": flop}[options.what](options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
