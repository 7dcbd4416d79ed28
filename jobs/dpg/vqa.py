"""Who answers the questions: one class per kind of visual-question-answering model, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from PIL import Image

from cluster.storage import S3Options, Storage
from flashu.errors import InputError
from jobs.config import FlashUSection, ModelSection
from jobs.worker_model import load

SELF = "self"
LIKELY = 0.5  # a probability of yes above this is a yes


class VqaModel(ABC):
    """Answers yes-or-no questions. `identity` tells it from others: what answers, by which weights."""

    identity: str

    @abstractmethod
    def yes(self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[bool]]:
        """Whether each question about each picture is answered yes."""


class SelfVqa(VqaModel):
    """The model that made the pictures, unaccelerated."""

    def __init__(self, model: ModelSection, run: Storage, s3: S3Options, device: str | None):
        loaded = load(model, FlashUSection(), None, run, s3, device)
        self.pipe, self.identity = loaded.pipe, f"{SELF}: {loaded.identity}"

    def yes(self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[bool]]:
        probabilities = self.pipe.yes_probability(list(pictures), list(questions), batch_size=len(pictures))
        return [[likely > LIKELY for likely in of_picture] for of_picture in probabilities]


def check_vqa(name: str) -> None:
    """Raises `InputError` for a name that `open_vqa` does not know."""
    if name != SELF:
        raise InputError(f"there is no VQA model {name!r}; there is: {SELF}, the model that made the pictures")


def open_vqa(name: str, model: ModelSection, run: Storage, s3: S3Options, device: str | None) -> VqaModel:
    """Load the VQA model of that name. `model` is the run's own. Raises `InputError`, `StorageError`."""
    check_vqa(name)
    return SelfVqa(model, run, s3, device)
