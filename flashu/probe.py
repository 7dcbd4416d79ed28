"""Unaccelerated runs of single prompts, for calibration and analysis to watch. Knows nothing of what they measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flashu import sampler
from flashu.acceleration.plan import Plan, make_plan
from flashu.errors import InputError
from flashu.models import geometry
from flashu.models.prefix import Prefix
from flashu.models.showo2 import Showo2
from flashu.tokenizer import EncodedQuestion, PromptTokenizer

PROMPTS = (
    "a red circle",
    "two small blue squares to the left of a large green triangle",
    "a photograph of a lighthouse on a rocky coast at dusk, waves breaking below",
    "an oil painting of an old man reading a newspaper in a busy café",
    "a white cat asleep on a stack of books, seen from above",
    "a city street in the rain at night, neon signs reflected in the puddles",
    "a wooden bowl of oranges next to a glass of water on a checkered tablecloth",
    "a mountain valley in autumn with a river, highly detailed",
)
QUESTION = "What is in the image?"
Pair = tuple[Tensor, EncodedQuestion]  # clean latents (1, channels, height, width), and what is asked about them
NUM_INFERENCE_STEPS = 8


def require_unpatched(model: Showo2) -> None:
    """Raises `InputError` when FlashU is on: what is measured would be of part of the model."""
    if model.acceleration is not None:
        raise InputError("this measures the unpatched model; call remove_flashu_patch(model) first")


def stock_plan(model: Showo2, num_inference_steps: int, guidance_scale: float | None = None) -> Plan:
    """Unaccelerated steps, guided as asked or as the checkpoint is."""
    guidance = model.config.guidance_scale if guidance_scale is None else guidance_scale
    return make_plan(None, num_inference_steps, guidance)


def own_pairs(
    model: Showo2,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str] = PROMPTS,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
) -> Iterator[Pair]:
    """The model's own images of some prompts, each asked what is in it."""
    plan = stock_plan(model, num_inference_steps)
    for seed, prompt in enumerate(prompts):
        text = prompt_tokens(model, prompt, tokenizer, model.config.native_grid, plan)
        with torch.no_grad():
            prefix = model.encode_prefix(text.prefixes, text.grid)
        yield denoise(model, prefix, seed, plan), tokenizer.encode_question(QUESTION)


def prompt_tokens(
    model: Showo2, prompt: str, tokenizer: PromptTokenizer, grid: tuple[int, int], plan: Plan
) -> sampler.PromptTokens:
    """The text of one image: its prompt, and where the plan is guided an empty one."""
    limit = model.config.max_text_tokens(grid[0] * grid[1])
    texts = [tokenizer.encode_prompt(text, limit) for text in ([prompt, ""] if plan.guided else [prompt])]
    return sampler.PromptTokens([text.prefix for text in texts], [text.suffix for text in texts], grid)


def denoise(
    model: Showo2, prefix: Prefix, seed: int, plan: Plan, on_step: Callable[[int, Tensor], object] | None = None
) -> Tensor:
    """One image's latents from a prefix that is made already. `on_step`: see `sampler.trajectory`'s `on_head`."""
    height, width = (side * geometry.PATCH_SIZE for side in prefix.grid)
    noise = sampler.initial_noise([seed], model.config.image_latent_dim, height, width)
    points = sampler.time_grid(plan.num_inference_steps)
    *_, latents = sampler.trajectory(model, noise, prefix, points, plan, on_head=on_step)
    return latents
