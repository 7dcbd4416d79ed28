"""Measuring the importances that pruning and skipping go by, on the work that the model will do.

For generation, `trajectories` watches real denoising runs, so that FFNs see noise, text and image embeddings as they
will when they are pruned; `tokens` is the release's way: one pass over the token rows, with the placeholder's embedding
where the image belongs. For understanding, rows of an image and a question are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from flashu import probe, question_rows, sampler
from flashu.acceleration.plan import Plan
from flashu.acceleration.wanda import UNDERSTANDING, ActivationNorms, WandaScores
from flashu.errors import InputError
from flashu.fingerprint import fingerprint
from flashu.models import geometry
from flashu.models.showo2 import Showo2
from flashu.tokenizer import PromptTokenizer

METHODS = ("trajectories", "tokens")


@torch.no_grad()
def calibrate(
    model: Showo2,
    prompts: Sequence[str] = probe.PROMPTS,
    *,
    tokenizer: PromptTokenizer | None = None,
    method: str = "trajectories",
    num_inference_steps: int = probe.NUM_INFERENCE_STEPS,
    guidance_scale: float | None = None,
    size: int | tuple[int, int] | None = None,
    on_prompt: Callable[[], object] | None = None,
) -> WandaScores:
    """Wanda scores of `model` for generation, over a handful of prompts.

    method: "trajectories" watches real denoising runs, of `num_inference_steps` and `guidance_scale`; "tokens", as the
        release, one pass over the token rows, with the placeholder's embedding where the image belongs.
    on_prompt: is called after each prompt.
    Needs a model that is not patched.
    Raises `InputError` for an unknown method, no prompts, or a patched model.
    """
    if method not in METHODS:
        raise InputError(f"no calibration method {method!r}; there are: {', '.join(METHODS)}")
    if not prompts:
        raise InputError("calibration needs at least one prompt")
    probe.require_unpatched(model)
    tokenizer = tokenizer or PromptTokenizer.beside(model.source, model.config)
    grid = geometry.token_grid(size, model.config.native_grid)
    norms = ActivationNorms(model.showo.model)
    plan = probe.stock_plan(model, num_inference_steps, guidance_scale)
    for seed, prompt in enumerate(prompts):
        text = probe.prompt_tokens(model, prompt, tokenizer, grid, plan)
        if method == "tokens":
            watch_token_row(model, text, tokenizer.ids.image_placeholder, norms)
        else:
            watch_trajectory(model, text, seed, plan, norms)
        if on_prompt:
            on_prompt()
    ffn, attention = norms.scores()
    return WandaScores(ffn, attention, fingerprint(model), method=method)


@torch.no_grad()
def calibrate_understanding(
    model: Showo2,
    pairs: Sequence[probe.Pair] | None = None,
    *,
    tokenizer: PromptTokenizer | None = None,
    on_pair: Callable[[], object] | None = None,
) -> WandaScores:
    """Wanda scores of `model` for understanding, and how much each of its layers does.

    pairs: clean latents (1, channels, height, width), each with a question. Without any, the model's own images of
        built-in prompts, asked what is in them, with `tokenizer` or the one beside the model.
    Needs a model that is not patched. Raises `InputError` for no pairs, or a patched model.
    """
    probe.require_unpatched(model)
    if pairs is None:
        pairs = list(probe.own_pairs(model, tokenizer or PromptTokenizer.beside(model.source, model.config)))
    if not pairs:
        raise InputError("calibration needs at least one pair of an image and a question")
    norms, positions = ActivationNorms(model.showo.model), 0
    similarities = torch.zeros(len(model.showo.model.layers))
    for latents, question in pairs:
        row = question_rows.lay_out(model, latents, [question])
        every = torch.ones(row.embeds.shape[:2], dtype=torch.bool, device=model.device)
        with norms.watching():
            _, _, similarity = model.showo.model.measure(row.embeds, row.rotary, every, mask=row.mask)
        similarities, positions = similarities + similarity[0].cpu(), positions + row.embeds.shape[1]
        if on_pair:
            on_pair()
    ffn, attention = norms.scores()
    importances = 1 - similarities / positions
    return WandaScores(ffn, attention, fingerprint(model), UNDERSTANDING, "whole rows", importances)


def watch_trajectory(model: Showo2, text: sampler.PromptTokens, seed: int, plan: Plan, norms: ActivationNorms) -> None:
    """Show `norms` one unaccelerated denoising run of one image: each step's span, and the text as often."""
    with norms.watching(repeats=len(plan.steps)):
        for row in text.prefixes:  # one by one: no padding
            model.encode_prefix([row], text.grid)
    prefix = model.encode_prefix(text.prefixes, text.grid)
    with norms.watching():
        probe.denoise(model, prefix, seed, plan)


def watch_token_row(model: Showo2, text: sampler.PromptTokens, placeholder: int, norms: ActivationNorms) -> None:
    """Show `norms` the first row of `text` once, whole, as the release calibrates: image tokens are placeholders."""
    tokens = 1 + text.grid[0] * text.grid[1]
    llm = model.showo.model
    with norms.watching():
        prefix = model.encode_prefix(text.prefixes[:1], text.grid, suffixes=text.suffixes[:1])
        span = llm.embed_tokens(torch.full((1, tokens), placeholder, device=model.device))
        model.run_rows(span, prefix)
