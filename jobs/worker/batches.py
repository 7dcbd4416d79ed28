"""A shard's rows to batches of images: what to make of each row, and what is made together.

The batches of a shard follow from its rows and the batch size alone, so that every attempt makes the same ones: images
of one prompt in two different batches are alike to rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jobs.dataset.records import image_seed


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
