"""A shard's rows to batches of images: what to make of each row, and what is made together; and batches begun on the
device, looked at by what scores them, and waited for.

The batches of a shard follow from its rows and the batch size alone, so that every attempt makes the same ones: images
of one prompt in two different batches are alike to rounding only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from flashu.devices import is_out_of_memory
from flashu.errors import OutOfMemoryError
from flashu.pending import PendingPictures
from flashu.pipeline import TextToImagePipeline
from jobs.dataset.records import image_seed
from jobs.metrics.clip import ClipScorer
from jobs.metrics.vqa import VqaScorer
from jobs.settings.config import SamplingSection
from jobs.worker import warm_up

Scorer = ClipScorer | VqaScorer


@dataclass(frozen=True)
class ImageRequest:
    """One image to make."""

    item: int  # its row's number in the manifest
    row: Mapping[str, Any]
    index: int  # of the row's images
    seed: int
    prompt: str
    negative_prompt: str
    guidance_scale: float
    tokens: int  # of the longer of prompt and negative prompt

    @property
    def order(self) -> tuple[int, int]:
        return self.item, self.index


@dataclass(frozen=True)
class Defaults:
    """What a row that says nothing gets."""

    seed: int
    num_images: int
    guidance_scale: float
    negative_prompt: str


def requests_of(
    item: int, row: Mapping[str, Any], defaults: Defaults, count_tokens: Callable[[str], int]
) -> list[ImageRequest]:
    """The images that a row asks for."""
    negative = _or(row.get("negative_prompt"), defaults.negative_prompt)
    guidance = float(_or(row.get("guidance_scale"), defaults.guidance_scale))
    tokens = max(count_tokens(row["prompt"]), count_tokens(negative))
    return [
        ImageRequest(
            item, row, index, image_seed(defaults.seed, row["prompt_id"], index, row.get("seed")),
            row["prompt"], negative, guidance, tokens,
        )
        for index in range(_or(row.get("num_images"), defaults.num_images))
    ]  # fmt: skip


def batches_of(
    requests: Sequence[ImageRequest], alone: Collection[int], batch_size: int
) -> Iterator[list[ImageRequest]]:
    """Batches of at most `batch_size`, of one guidance scale each, prompts of similar length together.

    The items in `alone` come last, each by itself: one of them may take the worker down.
    """

    def kind(request: ImageRequest) -> tuple[bool, int, float]:
        return request.item in alone, request.item if request.item in alone else -1, request.guidance_scale

    ordered = sorted(requests, key=lambda request: (kind(request), request.tokens, request.order))
    for _, alike in groupby(ordered, key=kind):
        group = list(alike)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


@dataclass
class BatchMaker:
    """`size` is in pixels, a side or (height, width), None for the model's own; `scorers` go by the names of
    `pixels.SCORES`."""

    pipe: TextToImagePipeline
    sampling: SamplingSection
    size: int | tuple[int, int] | None
    defaults: Defaults
    scorers: Mapping[str, Scorer]

    def submit(
        self, prompts: list[str], negative_prompts: list[str], seeds: list[int], guidance_scale: float
    ) -> PendingPictures:
        """Begin a batch. Raises `OutOfMemoryError`, and `InputError` for what cannot be made."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of prompts that were cut: each image's record tells
            return self.pipe.submit(
                prompts,
                seeds=seeds,
                negative_prompts=negative_prompts,
                num_inference_steps=self.sampling.num_inference_steps,
                guidance_scale=guidance_scale,
                time_shift=self.sampling.time_shift,
                size=self.size,
            )

    def scores(self, pending: PendingPictures, prompts: list[str]) -> list[dict[str, float]]:
        """The columns of each image that the scorers make, which wait for the pictures."""
        pictures = pending.pictures() if self.scorers else []
        scores = {name: scorer.score(pictures, prompts) for name, scorer in self.scorers.items()}
        return [{f"quality_{name}": of[index] for name, of in scores.items()} for index in range(len(prompts))]

    def make(self, prompts: list[str], negative_prompts: list[str], seeds: list[int], guidance_scale: float) -> None:
        """Make a batch to no end but that it was made. Raises `OutOfMemoryError`, whoever ran out of it."""
        with _one_kind_of_memory_error():
            pending = self.submit(prompts, negative_prompts, seeds, guidance_scale)
            self.scores(pending, prompts)
            pending.wait()

    def make_two(self, images: int) -> None:
        """Likewise two batches of the longest prompts, the second begun before the first one's pictures are waited
        for, unless they are scored."""
        prompts, negative_prompts = [warm_up.LONGEST] * images, [self.defaults.negative_prompt] * images
        begun = []
        with _one_kind_of_memory_error():
            for _ in range(2):
                begun.append(self.submit(prompts, negative_prompts, list(range(images)), self.defaults.guidance_scale))
                self.scores(begun[-1], prompts)
            for pending in begun:
                pending.wait()


@contextmanager
def _one_kind_of_memory_error() -> Iterator[None]:
    """Scorers and the device raise others than the pipeline does."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and not isinstance(error, OutOfMemoryError):
            raise OutOfMemoryError(str(error)) from None
        raise
