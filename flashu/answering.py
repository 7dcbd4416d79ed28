"""Answers about images, token by token, with each image read once.

An image's part of the row, bos to eoi, sees no question: its keys and values are made once (`read_images`). All
questions about an image stand side by side in one row behind it; each sees the image and itself, at the positions it
would have alone. So neither an image nor its keys and values are ever repeated for a question, and each further token
costs one position a question. Same numbers as whole rows (`flashu.understanding`), to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashu.models.layers import KeyValue, KeyValueCache
from flashu.models.showo2 import Showo2Qwen2_5
from flashu.models.tokenizer import EncodedQuestion
from flashu.understanding import embed_image, embed_tokens, rotary_at, row_mask

Chooser = Callable[[Tensor], Tensor]  # logits (images, questions, vocabulary) to tokens (images, questions)


@dataclass
class ReadImages:
    """What questions see of a batch of images: each layer's keys and values from bos to eoi."""

    layers: list[KeyValue]
    length: int  # positions


@torch.no_grad()
def read_images(model: Showo2Qwen2_5, latents: Tensor, question: EncodedQuestion) -> ReadImages:
    """Run clean latents (images, channels, height, width), in the frame that every question of a tokenizer has."""
    image = embed_image(model, latents, question)
    eoi = embed_tokens(model, [question.after[:1]]).expand(len(image), -1, -1)
    embeds = torch.cat((image, eoi), dim=1)
    length = embeds.shape[1]
    rotary = rotary_at(model, torch.arange(length, device=model.device)[None])
    mask = row_mask(length, len(question.before), length - 1, model.device)
    _, layers = model.showo.model(embeds, rotary, mask=mask)
    return ReadImages(layers, length)


class Conversation:
    """Questions about a batch of images, and as much of their answers as has been run.

    Shorter questions are padded, and images with fewer of them too; nothing sees the padding.
    """

    def __init__(
        self,
        model: Showo2Qwen2_5,
        images: ReadImages,
        questions: Sequence[Sequence[EncodedQuestion]],
        max_new_tokens: int = 0,
    ):
        """Run `questions`, some for each image. `logits` (images, questions, vocabulary) are then those of the first
        token of each answer, and `advance` can be called `max_new_tokens` times."""
        self.model, device = model, model.device
        texts = [[question.after[1:] for question in of_image] for of_image in questions]  # eoi is with the image
        self.count = max(map(len, texts))
        longest = max(len(text) for of_image in texts for text in of_image)
        texts = [[*of_image, *[[0]] * (self.count - len(of_image))] for of_image in texts]
        lengths = torch.tensor([[len(text) for text in of_image] for of_image in texts], device=device)
        padded = [[token for text in of_image for token in (*text, *[0] * (longest - len(text)))] for of_image in texts]

        slots = torch.arange(self.count * longest, device=device)
        question, offset = slots // longest, slots % longest
        own = (question[:, None] == question) & (offset[:, None] >= offset)
        room = self.count * (longest + max_new_tokens)
        self.caches = [KeyValueCache(layer, room) for layer in images.layers]
        hidden = self._run(
            embed_tokens(model, padded),
            (images.length + offset)[None],
            torch.cat((own.new_ones(len(own), images.length), own), dim=1)[None],
        ).unflatten(1, (self.count, longest))
        last = (lengths - 1)[:, :, None, None].expand(-1, -1, 1, hidden.shape[-1])
        self.logits = model.showo.lm_head(hidden.gather(2, last)[:, :, 0])
        self.positions = images.length + lengths  # of the next token of each answer
        numbers = torch.arange(self.count, device=device)
        mine = (question == numbers[:, None]) & (offset < lengths[:, :, None])
        self.seen = torch.cat((mine.new_ones(len(texts), self.count, images.length), mine), dim=2)
        self._eye = torch.eye(self.count, dtype=torch.bool, device=device).expand(len(texts), -1, -1)

    def advance(self, tokens: Tensor) -> None:
        """Add a token to each answer, (images, questions); `logits` are then those of the next one."""
        self.seen = torch.cat((self.seen, self._eye), dim=2)
        hidden = self._run(self.model.showo.model.embed_tokens(tokens), self.positions, self.seen)
        self.logits = self.model.showo.lm_head(hidden)
        self.positions = self.positions + 1

    def _run(self, embeds: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        rotary = rotary_at(self.model, positions)
        return self.model.showo.model(embeds, rotary, self.caches, seen[:, None])[0]


@torch.no_grad()
def first_logits(
    model: Showo2Qwen2_5, images: ReadImages, questions: Sequence[Sequence[EncodedQuestion]]
) -> list[Tensor]:
    """The logits of each answer's first token, (questions, vocabulary) for each image: one pass, no decoding."""
    logits = Conversation(model, images, questions).logits
    return [of_image[: len(asked)] for of_image, asked in zip(logits, questions, strict=True)]


@torch.no_grad()
def generate(
    model: Showo2Qwen2_5,
    images: ReadImages,
    questions: Sequence[Sequence[EncodedQuestion]],
    max_new_tokens: int,
    stop: int,
    choose: Chooser,
) -> list[list[list[int]]]:
    """The tokens of each image's answers, up to the token `stop`, which is left out, or to `max_new_tokens`."""
    conversation = Conversation(model, images, questions, max_new_tokens - 1)
    missing = [[place >= len(asked) for place in range(conversation.count)] for asked in questions]
    done = torch.tensor(missing, device=model.device)
    said: list[Tensor] = []
    while True:
        tokens = choose(conversation.logits)
        said.append(tokens)
        done = done | (tokens == stop)
        if len(said) == max_new_tokens or bool(done.all()):
            break
        conversation.advance(tokens)
    answers = torch.stack(said, dim=2).tolist()
    return [
        [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in of_image[: len(asked)]]
        for of_image, asked in zip(answers, questions, strict=True)
    ]


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


class Sampler:
    """Draws tokens by their probabilities, each answer from a CPU generator of its own, so that it does not depend on
    the answers beside it."""

    def __init__(self, seeds: Sequence[Sequence[int]], temperature: float, top_k: int | None, top_p: float):
        """`seeds` has one for each question of each image. `top_k` keeps the likeliest so many tokens, `top_p` the
        likeliest that together have that share of the probability; None and 1 keep all."""
        self.generators = [[torch.Generator().manual_seed(seed) for seed in of_image] for of_image in seeds]
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def __call__(self, logits: Tensor) -> Tensor:
        ordered, tokens = (logits.float() / self.temperature).sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = before < self.top_p
        if self.top_k is not None:
            kept[..., self.top_k :] = False
        sums = (probabilities * kept).cumsum(dim=-1)
        drawn = torch.zeros(logits.shape[:2])
        for image, generators in enumerate(self.generators):
            for place, generator in enumerate(generators):
                drawn[image, place] = torch.rand((), generator=generator)
        threshold = drawn.to(sums.device)[..., None] * sums[..., -1:]
        place = (sums <= threshold).sum(dim=-1, keepdim=True).clamp(max=kept.sum(dim=-1, keepdim=True) - 1)
        return tokens.gather(-1, place)[..., 0]
