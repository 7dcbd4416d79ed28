"""One pass of the LLM over an image and a question: the layout and mask in which Show-o2 reads them.

    [bos] system user [boi] [time(1)] [image × N] [eoi] question assistant

Text is causal. The released mask gives full attention to the N + 1 positions after the time token, so that the time
token stays causal and eoi is inside; its published scores come from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flashu.models.geometry import PATCH_SIZE, PIXELS_PER_TOKEN
from flashu.models.layers import Rotary, rotary_frequencies, rotary_table
from flashu.models.showo2 import Showo2Qwen2_5
from flashu.models.tokenizer import EncodedQuestion
from flashu.models.wan_vae import WanImageVAE


@torch.no_grad()
def picture_latents(vae: WanImageVAE, picture: Image.Image, grid: tuple[int, int]) -> Tensor:
    """A picture of any size and mode to clean latents (1, channels, height, width) for a token grid.

    Resized until it covers the grid's pixels and cropped at the centre, as the release does; the posterior's mean.
    """
    height, width = (side * PIXELS_PER_TOKEN for side in grid)
    fitted = ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return vae.encode(pixels.to(vae.device))[0]


@dataclass
class QuestionRows:
    """What the LLM takes for images and a question about each."""

    embeds: Tensor  # (images, positions, hidden); shorter questions are padded, and nothing sees the padding
    rotary: Rotary
    mask: Tensor  # (1, 1, positions, positions)
    lengths: list[int]  # positions of each row before its padding


def lay_out(model: Showo2Qwen2_5, latents: Tensor, questions: Sequence[EncodedQuestion]) -> QuestionRows:
    """Lay out clean latents (images, channels, height, width) and a question about each.

    What stands before the image must be of one length, as it is for all questions of one tokenizer. Differentiable.
    """
    height, width = latents.shape[-2:]
    positions = model.semantic_positions((height // PATCH_SIZE, width // PATCH_SIZE))
    image = model.embed_images(latents.to(model.device, model.dtype), positions)
    time = model.embed_times(torch.ones(1)).token.expand(len(image), 1, -1)
    longest = max(len(question.after) for question in questions)
    before, after = (
        model.showo.model.embed_tokens(torch.tensor(ids, device=model.device))
        for ids in (
            [question.before for question in questions],
            [[*question.after, *[0] * (longest - len(question.after))] for question in questions],
        )
    )
    embeds = torch.cat((before, time, image, after), dim=1)
    length, first = embeds.shape[1], before.shape[1] + 1
    position = torch.arange(length, device=model.device)
    inside = (position >= first) & (position <= first + image.shape[1])
    mask = (position[None] <= position[:, None]) | (inside[None] & inside[:, None])
    config = model.config.llm
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, model.device)
    return QuestionRows(
        embeds,
        rotary_table(frequencies, position[None], model.dtype),
        mask[None, None],
        [length - longest + len(question.after) for question in questions],
    )


def prefill(model: Showo2Qwen2_5, rows: QuestionRows) -> Tensor:
    """The LLM's normed output over the rows, (images, positions, hidden). Differentiable."""
    return model.showo.model(rows.embeds, rows.rotary, mask=rows.mask)[0]


@torch.no_grad()
def next_token_logits(model: Showo2Qwen2_5, latents: Tensor, questions: Sequence[EncodedQuestion]) -> Tensor:
    """The logits of each answer's first token, (images, vocabulary), for latents (images, channels, height, width)."""
    rows = lay_out(model, latents, questions)
    hidden = prefill(model, rows)
    last = torch.tensor(rows.lengths, device=hidden.device) - 1
    return model.showo.lm_head(hidden[torch.arange(len(hidden), device=hidden.device), last])
