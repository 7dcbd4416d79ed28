"""Images and questions as a caller has them, to answers: pictures to latents, texts to tokens, in batches and back.

How the network reads and answers them is in `flashu.answering`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flashu import answering, arguments
from flashu.errors import InputError
from flashu.models import geometry
from flashu.models.geometry import PIXELS_PER_TOKEN
from flashu.models.tokenizer import EncodedQuestion, PromptTokenizer
from flashu.models.wan_vae import WanImageVAE

if TYPE_CHECKING:
    from flashu.pipeline import TextToImagePipeline

FITS = ("crop", "letterbox")
YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")


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
        shaped = [of[0] if alone else of for of, alone in zip(answers, self.single_question, strict=True)]
        return shaped[0] if self.single_picture else shaped

    def count(self) -> int:
        return sum(map(len, self.questions))


def answer(
    pipe: TextToImagePipeline,
    asked: Asked,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seeds: int | Sequence[int] | None,
    size: int | tuple[int, int] | None,
    fit: str,
    batch_size: int,
) -> list[list[str]]:
    """See `TextToImagePipeline.answer`."""
    max_new_tokens = arguments.whole("max_new_tokens", max_new_tokens, least=1)
    temperature = arguments.finite("temperature", temperature, zero=True)
    top_k = None if top_k is None else arguments.whole("top_k", top_k, least=1)
    if not 0 < arguments.finite("top_p", top_p, zero=False) <= 1:
        raise InputError(f"top_p is {top_p}; it is a share of probability, above 0 and at most 1")
    left = iter(arguments.seeds(seeds, asked.count(), "questions"))
    seeds_of = [[next(left) for _ in of_image] for of_image in asked.questions]

    def answers(images: answering.ReadImages, questions: list[list[EncodedQuestion]], batch: slice) -> Iterator:
        choose = answering.greedy
        if temperature > 0:
            choose = answering.Sampler(seeds_of[batch], temperature, top_k, top_p)
        stop = pipe.tokenizer.ids.eos
        for tokens in answering.generate(pipe.model, images, questions, max_new_tokens, stop, choose):
            yield [pipe.tokenizer.decode(one) for one in tokens]

    return _in_batches(pipe, asked, answers, size, fit, batch_size)


def yes_probability(
    pipe: TextToImagePipeline, asked: Asked, *, size: int | tuple[int, int] | None, fit: str, batch_size: int
) -> list[list[float]]:
    """See `TextToImagePipeline.yes_probability`."""
    yes, no = (_single_tokens(pipe.tokenizer, words) for words in (YES, NO))

    def answers(images: answering.ReadImages, questions: list[list[EncodedQuestion]], batch: slice) -> Iterator:
        for logits in answering.first_logits(pipe.model, images, questions):
            likely = logits.float()
            margin = likely[:, yes].logsumexp(dim=-1) - likely[:, no].logsumexp(dim=-1)
            yield margin.sigmoid().tolist()

    return _in_batches(pipe, asked, answers, size, fit, batch_size)


def _in_batches(
    pipe: TextToImagePipeline,
    asked: Asked,
    answers: Callable[[answering.ReadImages, list[list[EncodedQuestion]], slice], Iterator[list]],
    size: int | tuple[int, int] | None,
    fit: str,
    batch_size: int,
) -> list[list]:
    """Read so many images at once, and have all questions about them answered."""
    arguments.whole("batch_size", batch_size, least=1)
    if fit not in FITS:
        raise InputError(f"fit is {fit!r}; there are: {', '.join(FITS)}")
    grid = geometry.parse_size(size, pipe.model.config.native_grid)
    encoded = [[pipe.tokenizer.encode_question(text) for text in texts] for texts in asked.questions]
    found: list[list] = []
    for start in range(0, len(encoded), batch_size):
        batch = slice(start, start + batch_size)
        latents = [picture_latents(pipe.vae, picture, grid, fit) for picture in asked.pictures[batch]]
        images = answering.read_images(pipe.model, torch.cat(latents), encoded[start][0])
        found += answers(images, encoded[batch], batch)
    return found


def _single_tokens(tokenizer: PromptTokenizer, words: Sequence[str]) -> list[int]:
    """Those of the words that are one token. Raises `InputError` when none is."""
    encoded = [tokenizer.tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    single = sorted({ids[0] for ids in encoded if len(ids) == 1})
    if not single:
        raise InputError(f"the model's tokenizer has no single token for {words[0]!r}")
    return single


def open_picture(image: Image.Image | str | Path) -> Image.Image:
    """A picture, or a file of one. Raises `InputError` for a file that cannot be read as an image."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, Path)):
        raise InputError(f"images holds {image!r}; give PIL images, or paths of image files")
    try:
        with Image.open(image) as opened:
            opened.load()
            return opened
    except FileNotFoundError:
        raise InputError(f"{image}: there is no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{image} cannot be read as an image: {error}") from None


def as_rgb(picture: Image.Image) -> Image.Image:
    """Upright, in RGB: transparent parts on white, 16-bit grey scaled, not clipped."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float32)
        scale = 255 if picture.mode == "F" and values.max(initial=0) <= 1 else 1 / 257 if values.max() > 255 else 1
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


@torch.no_grad()
def picture_latents(vae: WanImageVAE, picture: Image.Image, grid: tuple[int, int], fit: str = "crop") -> Tensor:
    """A picture of any size and mode to clean latents (1, channels, height, width) for a token grid.

    "crop" resizes it until it covers the grid's pixels and cuts off what is over, evenly, as the release does;
    "letterbox" shows all of it, on grey. The posterior's mean.
    """
    height, width = (side * PIXELS_PER_TOKEN for side in grid)
    if fit == "letterbox":
        fitted = ImageOps.pad(as_rgb(picture), (width, height), Image.Resampling.BICUBIC, color=(128, 128, 128))
    else:
        fitted = ImageOps.fit(as_rgb(picture), (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return vae.encode(pixels.to(vae.device))[0]
