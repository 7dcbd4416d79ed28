"""Measuring the importances that pruning goes by, on the work that the model will do.

`trajectories` watches real denoising runs, so that FFNs see noise, text and image embeddings as they will when they
are pruned. `tokens` is the release's way: one pass over the token rows, with the placeholder's embedding where the
image belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from flashu import probe, sampler
from flashu.acceleration.plan import Plan, make_plan
from flashu.acceleration.wanda import ActivationNorms, WandaScores
from flashu.config import GUIDANCE_SCALE
from flashu.errors import InputError
from flashu.fingerprint import fingerprint
from flashu.models import geometry
from flashu.models.showo2 import Showo2Qwen2_5
from flashu.models.tokenizer import PromptTokenizer

METHODS = ("trajectories", "tokens")


@torch.no_grad()
def calibrate(
    model: Showo2Qwen2_5,
    prompts: Sequence[str] = probe.PROMPTS,
    *,
    tokenizer: PromptTokenizer | None = None,
    method: str = "trajectories",
    num_inference_steps: int = probe.NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    size: int | tuple[int, int] | None = None,
    on_prompt: Callable[[], object] | None = None,
) -> WandaScores:
    """Wanda scores of `model` for generation, over a handful of prompts.

    method: "trajectories" or "tokens", see above. `num_inference_steps` and `guidance_scale` are those of the
    trajectories; `on_prompt` is called after each prompt. Needs a model that is not patched.
    Raises `InputError` for an unknown method, no prompts, or a patched model.
    """
    if method not in METHODS:
        raise InputError(f"no calibration method {method!r}; there are: {', '.join(METHODS)}")
    if not prompts:
        raise InputError("calibration needs at least one prompt")
    probe.require_unpatched(model)
    if tokenizer is None:
        from flashu.pipeline import tokenizer_beside

        tokenizer = PromptTokenizer.from_pretrained(tokenizer_beside(model))
    grid = geometry.parse_size(size, model.config.native_grid)
    norms = ActivationNorms(model.showo.model)
    plan = make_plan(None, num_inference_steps, guidance_scale)
    for seed, prompt in enumerate(prompts):
        rows = probe.rows_of(model, prompt, tokenizer, grid, plan)
        if method == "tokens":
            watch_token_row(model, rows, tokenizer.ids.image_placeholder, norms)
        else:
            watch_trajectory(model, rows, seed, plan, norms)
        if on_prompt:
            on_prompt()
    ffn, attention = norms.scores()
    return WandaScores(ffn, attention, fingerprint(model), method=method)


def watch_trajectory(model: Showo2Qwen2_5, rows: sampler.Rows, seed: int, plan: Plan, norms: ActivationNorms) -> None:
    """Show `norms` one unaccelerated denoising run of one image: each step's span, and the text as often."""
    with norms.watching(repeats=len(plan.rows)):
        for row in rows.prefixes:  # one by one: no padding
            model.encode_prefix([row], rows.grid)
    prefix = model.encode_prefix(rows.prefixes, rows.grid)
    with norms.watching():
        probe.denoise(model, prefix, seed, plan)


def watch_token_row(model: Showo2Qwen2_5, rows: sampler.Rows, placeholder: int, norms: ActivationNorms) -> None:
    """Show `norms` the first of `rows` once, whole, as the release calibrates: image tokens are placeholders."""
    tokens = 1 + rows.grid[0] * rows.grid[1]
    llm = model.showo.model
    with norms.watching():
        prefix = model.encode_prefix(rows.prefixes[:1], rows.grid, suffixes=rows.suffixes[:1])
        span = llm.embed_tokens(torch.full((1, tokens), placeholder, device=model.device))
        model.run_rows(span, prefix)
