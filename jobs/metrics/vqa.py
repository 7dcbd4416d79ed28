"""VQA scores: the model's own probability that a picture shows its prompt."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from PIL import Image

from flashu.errors import InputError
from flashu.pipeline import TextToImagePipeline

QUESTION = "Does the image show: {}?"


class VqaScorer:
    """By the model that made the pictures: its probability of yes, asked whether a picture shows its prompt (as
    VQAScore, Lin et al. 2024, asks other models). None is a judge of itself.

    A model that FlashU accelerates answers by its `und_*` settings, which a run leaves off: unaccelerated. Raises
    `InputError` for a model that cannot be asked.
    """

    def __init__(self, pipe: TextToImagePipeline):
        self.pipe = pipe
        height, width = pipe.model.config.native_grid
        self.room = pipe.model.config.max_text_tokens(height * width)
        try:
            self.score([Image.new("RGB", (16, 16))], [""])
        except InputError as error:
            raise InputError(f"quality.vqa: {error}") from None

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The probability for each picture and its prompt, 0 to 1. All of the picture is shown; a prompt that is too
        long for a question is cut."""
        questions = [self.question(prompt) for prompt in prompts]
        return self.pipe.yes_probability(list(pictures), questions, fit="letterbox", batch_size=len(pictures))

    def question(self, prompt: str) -> str:
        """About the prompt, or as much from its beginning as fits beside an image."""
        if self._tokens(prompt) > self.room:
            ends = range(len(prompt))
            prompt = prompt[: bisect_left(ends, self.room + 1, key=lambda end: self._tokens(prompt[:end])) - 1]
        return QUESTION.format(prompt)

    def _tokens(self, prompt: str) -> int:
        return len(self.pipe.tokenizer.encode_question(QUESTION.format(prompt)).after)
