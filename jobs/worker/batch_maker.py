"""Batches of images as a run wants them: begun on the device, looked at by what scores them, and waited for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from flashu.devices import is_out_of_memory
from flashu.errors import OutOfMemoryError
from flashu.pending import PendingPictures
from flashu.pipeline import TextToImagePipeline
from jobs.metrics.clip import ClipScorer
from jobs.metrics.vqa import VqaScorer
from jobs.settings.config import SamplingSection
from jobs.worker import warm_up
from jobs.worker.batches import Defaults

Scorer = ClipScorer | VqaScorer


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
