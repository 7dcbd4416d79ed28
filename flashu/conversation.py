"""Answers about images, token by token, with each image read once.

An image's part of the row, bos to eoi, sees no question: its keys and values are made once (`read_images`). All
questions about an image stand side by side in one row behind it; each sees the image and itself, at the positions it
would have alone. So neither an image nor its keys and values are ever repeated for a question, and each further token
costs one position a question. Same numbers as whole rows (`flashu.question_rows`), to rounding. A model that FlashU
accelerates reads as its `acceleration.reading` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from flashu.acceleration.reading import WHOLE_READING
from flashu.acceleration.visual_tokens import kept_tokens, most_valued
from flashu.devices import send_numbers
from flashu.models.attention import KeyValue, KeyValueCache
from flashu.models.qwen2 import Subnetwork
from flashu.models.showo2 import Showo2
from flashu.question_rows import embed_image, embed_tokens, rotary_at, row_mask
from flashu.tokenizer import EncodedQuestion

NOBODY = -1  # whose padding is
Chooser = Callable[[Tensor], Tensor]  # logits (images, questions, vocabulary) to tokens (images, questions)


@dataclass
class ReadImages:
    """What questions see of a batch of images: each layer's keys and values from bos to eoi."""

    layers: list[KeyValue | None]  # None where a layer is left out; fewer positions after image tokens are dropped
    length: int  # positions of the row, dropped ones too
    subnetwork: Subnetwork
    split: int  # the number of layers that see every position


@torch.no_grad()
def read_images(model: Showo2, latents: Tensor, question: EncodedQuestion) -> ReadImages:
    """Run clean latents (images, channels, height, width), in the frame that every question of a tokenizer has."""
    image = embed_image(model, latents, question)
    eoi = embed_tokens(model, [question.after[:1]]).expand(len(image), -1, -1)
    embeds = torch.cat((image, eoi), dim=1)
    length, before, count = embeds.shape[1], len(question.before), len(model.showo.model.layers)
    positions = torch.arange(length, device=model.device)[None]
    reading = model.acceleration.reading if model.acceleration else WHOLE_READING
    subnetwork = reading.subnetwork(count, model.device)
    split = reading.whole_layers(count)

    def run(embeds: Tensor, positions: Tensor, layers: range) -> tuple[Tensor, list[KeyValue | None]]:
        mask = row_mask(embeds.shape[1], before, embeds.shape[1] - 1, model.device)
        return model.showo.model(embeds, rotary_at(model, positions), mask=mask, subnetwork=subnetwork, layers=layers)

    embeds, layers = run(embeds, positions, range(split))
    if split < count:
        first = before + 1  # after the time token
        values = cast("KeyValue", layers[-1]).value[:, :, first:-1]  # of one that runs
        kept = first + most_valued(values, kept_tokens(values.shape[2], reading.drop_share))
        frame = [part.expand(len(kept), -1) for part in (positions[:, :first], positions[:, -1:])]
        positions = torch.cat((frame[0], kept, frame[1]), dim=1)
        embeds = embeds.gather(1, positions[..., None].expand(-1, -1, embeds.shape[2]))  # as positions count from 0
        layers += run(embeds, positions, range(split, count))[1]
    return ReadImages(layers, length, subnetwork, split)


class Conversation:
    """Questions about a batch of images, and as much of their answers as has been run.

    Shorter questions are padded, and images with fewer of them too; nothing sees the padding.
    """

    def __init__(
        self,
        model: Showo2,
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
        (lengths,) = send_numbers(device, [[len(text) for text in of_image] for of_image in texts])
        padded = [[token for text in of_image for token in (*text, *[0] * (longest - len(text)))] for of_image in texts]

        slots = torch.arange(self.count * longest, device=device)
        question, offset = slots // longest, slots % longest
        room = self.count * (longest + max_new_tokens)
        self.images = images
        self.caches = [layer and KeyValueCache(layer, room) for layer in images.layers]
        causal = _of_same_question(question[None], question[None]).tril()
        hidden = self._run(embed_tokens(model, padded), (images.length + offset)[None], causal)
        hidden = rearrange(
            hidden, "images (questions positions) hidden -> images questions positions hidden", questions=self.count
        )
        last = (lengths - 1)[:, :, None, None].expand(-1, -1, 1, hidden.shape[-1])
        self.logits = model.showo.lm_head(hidden.gather(2, last)[:, :, 0])
        self.positions = images.length + lengths  # of the next token of each answer
        self._numbers = torch.arange(self.count, device=device).expand(len(texts), -1)
        self._owners = torch.where(offset < lengths[:, question], question, NOBODY)  # of positions past the image

    def advance(self, tokens: Tensor) -> None:
        """Add a token to each answer, (images, questions); `logits` are then those of the next one."""
        self._owners = torch.cat((self._owners, self._numbers), dim=1)
        seen = _of_same_question(self._numbers, self._owners)
        hidden = self._run(self.model.showo.model.embed_tokens(tokens), self.positions, seen)
        self.logits = self.model.showo.lm_head(hidden)
        self.positions = self.positions + 1

    def _run(self, embeds: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """The normed output of positions that see their image and, past it, what `seen` (rows, positions, …) says."""
        rotary, split = rotary_at(self.model, positions), self.images.split
        for layers in (range(split), range(split, len(self.caches))):
            past = next((self.images.layers[layer] for layer in layers if self.images.layers[layer]), None)
            mask = None
            if past is not None:  # some of them run
                mask = torch.cat((seen.new_ones(*seen.shape[:2], past.key.shape[2]), seen), dim=2)[:, None]
            subnetwork = self.images.subnetwork
            embeds, _ = self.model.showo.model(embeds, rotary, self.caches, mask, subnetwork=subnetwork, layers=layers)
        return embeds


def _of_same_question(positions: Tensor, seen: Tensor) -> Tensor:
    """Which positions see which, (images, positions, seen), by the question that each belongs to (images, …)."""
    return positions[:, :, None] == seen[:, None]


@torch.no_grad()
def first_logits(model: Showo2, images: ReadImages, questions: Sequence[Sequence[EncodedQuestion]]) -> list[Tensor]:
    """The logits of each answer's first token, (questions, vocabulary) for each image: one pass, no decoding."""
    logits = Conversation(model, images, questions).logits
    return [of_image[: len(asked)] for of_image, asked in zip(logits, questions, strict=True)]


@torch.no_grad()
def generate(
    model: Showo2,
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
    the answers beside it.

    What is kept is what transformers' logits warpers keep, to rounding, but for ties at the `top_k`-th place, which are
    common in bfloat16: they keep all of them.
    """

    def __init__(self, seeds: Sequence[Sequence[int]], temperature: float, top_k: int | None, top_p: float):
        """`seeds` has one for each question of each image; `temperature` is above 0. `top_k` keeps the likeliest so
        many tokens, `top_p` the likeliest that together have that share of the probability; None and 1 keep all."""
        self.generators = [[torch.Generator().manual_seed(seed) for seed in of_image] for of_image in seeds]
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def __call__(self, logits: Tensor) -> Tensor:
        ordered, tokens = logits.float().sort(dim=-1, descending=True, stable=True)
        probabilities = ((ordered - ordered[..., :1]) / self.temperature).softmax(dim=-1)
        kept = torch.ones_like(probabilities, dtype=torch.bool)
        if self.top_p < 1:
            kept = probabilities.cumsum(dim=-1) - probabilities < self.top_p
        if self.top_k is not None:
            kept[..., self.top_k :] = False
        sums = (probabilities * kept).cumsum(dim=-1)
        drawn = torch.zeros(logits.shape[:2])
        for image, generators in enumerate(self.generators):
            for question, generator in enumerate(generators):
                drawn[image, question] = torch.rand((), generator=generator)
        threshold = drawn.to(sums.device)[..., None] * sums[..., -1:]
        place = (sums <= threshold).sum(dim=-1, keepdim=True).clamp(max=kept.sum(dim=-1, keepdim=True) - 1)
        return tokens.gather(-1, place)[..., 0]
