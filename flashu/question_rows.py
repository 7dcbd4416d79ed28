"""How Show-o2 reads an image and a question: the layout and mask of a row, run whole.

    [bos] system user [boi] [time(1)] [image × N] [eoi] question assistant

Text is causal. The released mask gives full attention to the N + 1 positions after the time token, so that the time
token stays causal and eoi is inside; its published scores come from it. Nothing up to eoi sees the question: what
answers questions makes that part once an image (`flashu.conversation`); training and calibration run whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashu.devices import send_numbers
from flashu.models.geometry import PATCH_SIZE
from flashu.models.layers import Rotary, rotary_frequencies, rotary_table
from flashu.models.prefix import padded_rows
from flashu.models.showo2 import Showo2
from flashu.tokenizer import EncodedQuestion


@dataclass
class QuestionRows:
    """What the LLM takes for images and a question about each."""

    embeds: Tensor  # (images, positions, hidden); shorter questions are padded, and nothing sees the padding
    rotary: Rotary
    mask: Tensor  # (1, 1, positions, positions)


def lay_out(model: Showo2, latents: Tensor, questions: Sequence[EncodedQuestion]) -> QuestionRows:
    """Lay out clean latents (images, channels, height, width) and a question about each.

    What stands before the image must be the same for all, as it is for questions of one tokenizer. Differentiable.
    """
    image = embed_image(model, latents, questions[0])
    longest = max(len(question.after) for question in questions)
    after = embed_tokens(model, padded_rows((question.after for question in questions), longest))
    embeds = torch.cat((image, after), dim=1)
    length = image.shape[1] + longest
    return QuestionRows(
        embeds,
        rotary_at(model, torch.arange(length, device=model.device)[None]),
        row_mask(length, len(questions[0].before), image.shape[1], model.device),
    )


def prefill(model: Showo2, rows: QuestionRows) -> Tensor:
    """The LLM's normed output over the rows, (images, positions, hidden). Differentiable."""
    return model.showo.model(rows.embeds, rows.rotary, mask=rows.mask)[0]


def embed_image(model: Showo2, latents: Tensor, question: EncodedQuestion) -> Tensor:
    """From bos to the last image token, (images, positions, hidden). Of `question`, what stands before the image."""
    height, width = latents.shape[-2:]
    positions = model.semantic_positions((height // PATCH_SIZE, width // PATCH_SIZE))
    image = model.embed_images(latents.to(model.device, model.dtype), positions)
    time = model.embed_times(torch.ones(1)).token.expand(len(image), 1, -1)
    before = embed_tokens(model, [question.before]).expand(len(image), -1, -1)
    return torch.cat((before, time, image), dim=1)


def embed_tokens(model: Showo2, ids: Sequence[Sequence[int]]) -> Tensor:
    return model.showo.model.embed_tokens(*send_numbers(model.device, ids))


def rotary_at(model: Showo2, positions: Tensor) -> Rotary:
    """The LLM's rotation at `positions` (rows or 1, positions)."""
    config = model.config.llm
    return rotary_table(rotary_frequencies(config.head_dim, config.rope_theta, model.device), positions, model.dtype)


def row_mask(length: int, before: int, image_end: int, device: torch.device) -> Tensor:
    """Which of a row's positions sees which, (1, 1, length, length).

    `before` positions stand before the time token; eoi is at `image_end`, right after the last image token.
    """
    position = torch.arange(length, device=device)
    inside = (position > before) & (position <= image_end)
    return ((position[None] <= position[:, None]) | (inside[None] & inside[:, None]))[None, None]
