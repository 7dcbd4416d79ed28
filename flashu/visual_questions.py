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
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from flashu import answering, arguments
from flashu.config import MAX_NEW_TOKENS
from flashu.devices import is_out_of_memory
from flashu.errors import InputError, OutOfMemoryError
from flashu.models import geometry
from flashu.models.geometry import PIXELS_PER_TOKEN
from flashu.models.tokenizer import EncodedQuestion, PromptTokenizer
from flashu.models.wan_vae import WanImageVAE

if TYPE_CHECKING:
    from flashu.pipeline import TextToImagePipeline

FITS = ("crop", "letterbox")
LONGEST = 128  # times the size asked for: a longer picture is not resized whole
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


def answer(
    pipe: TextToImagePipeline,
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

    def answers(images: answering.ReadImages, questions: Questions, places: Places) -> Iterator[list[str]]:
        choose = answering.greedy
        if seeds_of:
            drawn = [[seeds_of[image][place] for place in of_image] for image, of_image in places]
            choose = answering.Sampler(drawn, decoding.temperature, decoding.top_k, decoding.top_p)
        stop = pipe.tokenizer.ids.eos
        for tokens in answering.generate(pipe.model, images, questions, decoding.max_new_tokens, stop, choose):
            yield [pipe.tokenizer.decode(one) for one in tokens]

    return _in_batches(pipe, asked, answers, view, batch_size)


def yes_probability(pipe: TextToImagePipeline, asked: Asked, view: View, batch_size: int) -> list[list[float]]:
    """See `TextToImagePipeline.yes_probability`."""
    yes, no = (_single_tokens(pipe.tokenizer, words) for words in (YES, NO))

    def answers(images: answering.ReadImages, questions: Questions, places: Places) -> Iterator[list[float]]:
        for logits in answering.first_logits(pipe.model, images, questions):
            margin = logits[:, yes].float().logsumexp(dim=-1) - logits[:, no].float().logsumexp(dim=-1)
            yield margin.sigmoid().tolist()

    return _in_batches(pipe, asked, answers, view, batch_size)


def _in_batches(
    pipe: TextToImagePipeline,
    asked: Asked,
    answers: Callable[[answering.ReadImages, Questions, Places], Iterator[list]],
    view: View,
    batch_size: int,
) -> list[list]:
    """Read so many images at once, and have the questions about them answered, some at a time."""
    arguments.whole("batch_size", batch_size, least=1)
    grid = geometry.parse_size(view.size, pipe.model.config.native_grid)
    encoded = _encode(pipe, asked, grid)
    found: list[list] = [[] for _ in encoded]
    for start in range(0, len(encoded), batch_size):
        batch = range(start, min(start + batch_size, len(encoded)))
        full = False
        try:
            latents = [picture_latents(pipe.vae, asked.pictures[image], grid, view.fit) for image in batch]
            images = answering.read_images(pipe.model, torch.cat(latents), encoded[start][0])
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
                f"out of memory on {pipe.model.device} with {len(batch)} images at once; "
                + (f"try batch_size={len(batch) // 2}" if len(batch) > 1 else "try a smaller size, or fewer tokens")
            )
    return found


def _encode(pipe: TextToImagePipeline, asked: Asked, grid: tuple[int, int]) -> Questions:
    """The questions as tokens. Raises `InputError` for one that is longer than a row has room for."""
    encoded = [[pipe.tokenizer.encode_question(text) for text in texts] for texts in asked.questions]
    limit = pipe.model.config.max_text_tokens(grid[0] * grid[1])
    for texts, of_image in zip(asked.questions, encoded, strict=True):
        for text, question in zip(texts, of_image, strict=True):
            if len(question.after) > limit:
                raise InputError(
                    f"a question of {len(question.after)} tokens, with what frames it, is longer than the {limit} that "
                    f"fit beside an image: {text[:60]!r}"
                )
    return encoded


def _single_tokens(tokenizer: PromptTokenizer, words: Sequence[str]) -> list[int]:
    """Those of the words that are one token. Raises `InputError` when none is."""
    encoded = [tokenizer.tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    single = sorted({ids[0] for ids in encoded if len(ids) == 1})
    if not single:
        raise InputError(f"the model's tokenizer has no single token for {words[0]!r}")
    return single


def open_picture(image: Image.Image | str | Path) -> Image.Image:
    """A picture in RGB, upright, of a PIL image or a file. Raises `InputError` for what cannot be read as an image."""
    if not isinstance(image, (str, Path, Image.Image)):
        raise InputError(f"images holds {image!r}; give PIL images, or paths of image files")
    name = "an image" if isinstance(image, Image.Image) else image
    try:
        if isinstance(image, Image.Image):
            picture = _as_rgb(image)
        else:
            with Image.open(image) as opened:
                picture = _as_rgb(opened)
    except FileNotFoundError:
        raise InputError(f"{image}: there is no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} cannot be read as an image: {error}") from None
    if not picture.width * picture.height:
        raise InputError(f"{name} is {picture.width}x{picture.height} pixels")
    return picture


def _as_rgb(picture: Image.Image) -> Image.Image:
    """Transparent parts are white; 16-bit grey is scaled, not clipped."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return _grey(picture, 1 / 257)
    if picture.mode == "I":  # 16 bits in a wider type, or 8
        return _grey(picture, 1 / 257 if np.asarray(picture).max(initial=0) > 255 else 1)
    if picture.mode == "F":
        return _grey(picture, 255 if np.asarray(picture).max(initial=0) <= 1 else 1)
    if picture.mode == "LAB":
        raise ValueError("LAB pixels; convert them to RGB first")
    if picture.has_transparency_data or picture.mode == "La":
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA").convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _grey(picture: Image.Image, scale: float) -> Image.Image:
    values = np.nan_to_num(np.asarray(picture, dtype=np.float32)) * scale
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")


@torch.no_grad()
def picture_latents(vae: WanImageVAE, picture: Image.Image, grid: tuple[int, int], fit: str = "crop") -> Tensor:
    """An RGB picture of any size to clean latents (1, channels, height, width) for a token grid.

    "crop" has it `cover` them, as the release does; "letterbox" shows all of it, on grey. The posterior's mean.
    """
    height, width = (side * PIXELS_PER_TOKEN for side in grid)
    if fit == "letterbox":
        scale = min(width / picture.width, height / picture.height)
        inner = tuple(max(round(side * scale), 1) for side in picture.size)
        fitted = Image.new("RGB", (width, height), (128, 128, 128))
        fitted.paste(
            picture.resize(inner, Image.Resampling.BICUBIC), ((width - inner[0]) // 2, (height - inner[1]) // 2)
        )
    else:
        fitted = cover(picture, width, height)
    pixels = rearrange(torch.from_numpy(np.array(fitted)), "height width channels -> channels height width")[None]
    pixels = pixels.float() / 127.5 - 1
    return vae.encode(pixels.to(vae.device))[0]


def cover(picture: Image.Image, width: int, height: int) -> Image.Image:
    """A picture resized until it covers so many pixels, and cut to them; see `covering`."""
    left, top, *inner = covering(picture.size, (width, height))
    if max(inner) <= LONGEST * max(width, height):
        return picture.resize(inner, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    # A strip, of which the whole would fill the memory; its cut edges are resized without what lies beyond them.
    scales = picture.width / inner[0], picture.height / inner[1]
    box = (left * scales[0], top * scales[1], (left + width) * scales[0], (top + height) * scales[1])
    return picture.resize((width, height), Image.Resampling.BICUBIC, box)


def covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """How pictures of `size` (width, height) come to cover `target`: left and top of what is kept of them, once they
    are resized to a width and a height. In whole pixels, for a square those of torchvision's `Resize` and `CenterCrop`,
    with which the release prepares pictures: the longer side is rounded down, half a pixel of a margin to even.
    """
    (width, height), (wanted_width, wanted_height) = size, target
    if width * wanted_height <= height * wanted_width:
        inner = wanted_width, max(int(wanted_width * height / width), wanted_height)
    else:
        inner = max(int(wanted_height * width / height), wanted_width), wanted_height
    return round((inner[0] - wanted_width) / 2), round((inner[1] - wanted_height) / 2), *inner
