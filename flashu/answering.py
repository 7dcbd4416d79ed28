"""Images and questions as a caller has them, to answers: texts to tokens, in batches and back.

How pictures become latents is in `flashu.pictures`, how the network reads and answers in `flashu.conversation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flashu import arguments, conversation
from flashu.config import MAX_NEW_TOKENS
from flashu.devices import is_out_of_memory
from flashu.errors import InputError, OutOfMemoryError
from flashu.models import geometry
from flashu.models.showo2 import Showo2
from flashu.models.wan_vae import WanVae
from flashu.pictures import open_picture, picture_latents
from flashu.tokenizer import EncodedQuestion, PromptTokenizer

FITS = ("crop", "letterbox")
QUESTIONS_AT_ONCE = 32  # about each image; they stand in one row, in which every position is compared with every other
YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")


Questions = list[list[EncodedQuestion]]  # some for each image
Places = list[tuple[int, range]]  # images, and which of the questions about each


@dataclass
class Asked:
    """Pictures, the questions about each, and the shape in which the caller expects the answers."""

    pictures: list[Image.Image]
    questions: list[list[str]]
    single_picture: bool
    single_question: list[bool]  # for each picture, whether its question came alone, not in a list

    @classmethod
    def of(cls, images: Any, questions: Any) -> Asked:
        """Raises `InputError` for what is no image, no question, or not one of each."""
        single = isinstance(images, (str, Path, Image.Image))
        opened = [open_picture(image) for image in ([images] if single else arguments.as_list("images", images))]
        if isinstance(questions, str):
            asked: list[Any] = [questions] * len(opened)
        else:
            asked = [questions] if single else arguments.as_list("questions", questions)
        if len(asked) != len(opened):
            raise InputError(f"{len(asked)} questions for {len(opened)} images; give one for each, or a list for each")
        alone = [isinstance(of_image, str) for of_image in asked]
        texts = [arguments.texts("questions", of_image) for of_image in asked]
        if not all(texts) or not all(text.strip() for of_image in texts for text in of_image):
            raise InputError("a question is empty; each image needs one at least, and each has to ask something")
        return cls(opened, texts, single, alone)

    def shaped(self, answers: Sequence[list[Any]]) -> Any:
        """Answers, a list for each picture, in the caller's shape."""
        pairs = zip(answers, self.single_question, strict=True)
        shaped = [of_picture[0] if alone else of_picture for of_picture, alone in pairs]
        return shaped[0] if self.single_picture else shaped

    def count(self) -> int:
        return sum(map(len, self.questions))


@dataclass(frozen=True)
class Decoding:
    """How an answer is made, token by token. Raises `InputError` for what cannot be.

    temperature 0 takes the likeliest token each time; above, tokens are drawn, from the `top_k` likeliest and from the
    likeliest that have `top_p` of the probability.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        arguments.whole("max_new_tokens", self.max_new_tokens, least=1)
        arguments.finite("temperature", self.temperature, zero=True)
        if self.top_k is not None:
            arguments.whole("top_k", self.top_k, least=1)
        if arguments.finite("top_p", self.top_p, zero=False) > 1:
            raise InputError(f"top_p is {self.top_p}; it is a share of probability, above 0 and at most 1")


@dataclass(frozen=True)
class View:
    """What of an image is shown: `size` as in generation, and "crop" or "letterbox"."""

    size: int | tuple[int, int] | None = None
    fit: str = "crop"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise InputError(f"fit is {self.fit!r}; there are: {', '.join(FITS)}")


@dataclass(frozen=True)
class ImageAnswerer:
    """Answers, by the network that makes pictures too."""

    model: Showo2
    vae: WanVae
    tokenizer: PromptTokenizer

    def answer(
        self,
        asked: Asked,
        decoding: Decoding,
        seeds: int | Sequence[int] | None,
        view: View,
        batch_size: int,
    ) -> list[list[str]]:
        """See `TextToImagePipeline.answer`."""
        seeds_of = None
        if decoding.temperature > 0:
            left = iter(arguments.seeds(seeds, asked.count(), "questions"))
            seeds_of = [[next(left) for _ in of_image] for of_image in asked.questions]

        def answers(images: conversation.ReadImages, questions: Questions, places: Places) -> Iterator[list[str]]:
            choose = conversation.greedy
            if seeds_of:
                drawn = [[seeds_of[image][place] for place in of_image] for image, of_image in places]
                choose = conversation.Sampler(drawn, decoding.temperature, decoding.top_k, decoding.top_p)
            stop = self.tokenizer.ids.eos
            for tokens in conversation.generate(self.model, images, questions, decoding.max_new_tokens, stop, choose):
                yield [self.tokenizer.decode(one) for one in tokens]

        return self._in_batches(asked, answers, view, batch_size)

    def yes_probability(self, asked: Asked, view: View, batch_size: int) -> list[list[float]]:
        """See `TextToImagePipeline.yes_probability`."""
        yes, no = (_single_tokens(self.tokenizer, words) for words in (YES, NO))

        def answers(images: conversation.ReadImages, questions: Questions, places: Places) -> Iterator[list[float]]:
            for logits in conversation.first_logits(self.model, images, questions):
                margin = logits[:, yes].float().logsumexp(dim=-1) - logits[:, no].float().logsumexp(dim=-1)
                yield margin.sigmoid().tolist()

        return self._in_batches(asked, answers, view, batch_size)

    def _in_batches(
        self,
        asked: Asked,
        answers: Callable[[conversation.ReadImages, Questions, Places], Iterator[list[Any]]],
        view: View,
        batch_size: int,
    ) -> list[list[Any]]:
        """Read so many images at once, and have the questions about them answered, some at a time."""
        arguments.whole("batch_size", batch_size, least=1)
        grid = geometry.token_grid(view.size, self.model.config.native_grid)
        encoded = self._encode(asked, grid)
        found: list[list[Any]] = [[] for _ in encoded]
        for start in range(0, len(encoded), batch_size):
            batch = range(start, min(start + batch_size, len(encoded)))
            full = False
            try:
                latents = [picture_latents(self.vae, asked.pictures[image], grid, view.fit) for image in batch]
                images = conversation.read_images(self.model, torch.cat(latents), encoded[start][0])
                for first in range(0, max(len(encoded[image]) for image in batch), QUESTIONS_AT_ONCE):
                    places = [(image, range(len(encoded[image]))[first : first + QUESTIONS_AT_ONCE]) for image in batch]
                    questions = [[encoded[image][place] for place in of_image] for image, of_image in places]
                    for image, said in zip(batch, answers(images, questions, places), strict=True):
                        found[image] += said
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                full = True
            if full:  # outside the handler, whose traceback would hold on to the batch's tensors
                raise OutOfMemoryError(
                    f"out of memory on {self.model.device} with {len(batch)} images at once; "
                    + (f"try batch_size={len(batch) // 2}" if len(batch) > 1 else "try a smaller size, or fewer tokens")
                )
        return found

    def _encode(self, asked: Asked, grid: tuple[int, int]) -> Questions:
        """The questions as tokens. Raises `InputError` for one that is longer than a row has room for."""
        encoded = [[self.tokenizer.encode_question(text) for text in texts] for texts in asked.questions]
        limit = self.model.config.max_text_tokens(grid[0] * grid[1])
        for texts, of_image in zip(asked.questions, encoded, strict=True):
            for text, question in zip(texts, of_image, strict=True):
                if len(question.after) > limit:
                    raise InputError(
                        f"a question of {len(question.after)} tokens, with what frames it, is longer than the {limit} "
                        f"that fit beside an image: {text[:60]!r}"
                    )
        return encoded


def _single_tokens(tokenizer: PromptTokenizer, words: Sequence[str]) -> list[int]:
    """Those of the words that are one token. Raises `InputError` when none is."""
    encoded = [tokenizer.tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    single = sorted({ids[0] for ids in encoded if len(ids) == 1})
    if not single:
        raise InputError(f"the model's tokenizer has no single token for {words[0]!r}")
    return single
