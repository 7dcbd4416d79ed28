"""What a worker does with a committed shard of a run: has its images' questions answered, and writes the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from cluster.open_storage import open_storage
from cluster.storage import S3Options, StorageError
from cluster.tracebacks import describe
from cluster.work import Lease, Place, SetupError, ShardWork, Times, WorkerBrokenError
from flashu.devices import is_device_error, is_out_of_memory
from flashu.errors import InputError
from jobs.dataset.images import StoredImage, images_by_prompt
from jobs.dataset.keys import shard_name
from jobs.dataset.records import parquet_file
from jobs.scoring.judges import verdict
from jobs.scoring.open_judge import open_judge
from jobs.scoring.questions import Item, Question
from jobs.settings.config import ModelSection

IMAGES_KEY, UNANSWERED_KEY = b"flashu.images", b"flashu.unanswered"  # in a file's key-value metadata
ANSWER = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("image_index", pa.int32(), nullable=False),
        ("question_id", pa.int64()),  # null where the image could not be asked about
        ("answer", pa.string()),  # in the model's words
        ("yes", pa.bool_()),  # false for an answer that is neither yes nor no, too
        ("error", pa.string()),
    ]
)

Running = Callable[[Sequence[int]], None]  # as `ShardWork.process` gets it
_ShardAnswers = tuple[list[dict[str, Any]], str]  # a shard's answers, a row each, and the `images_digest` of its images


@dataclass
class _ImageQuestion:
    """A question about an image of a shard, to be answered."""

    number: int  # the image's in its shard
    image: StoredImage
    picture: Image.Image
    question: Question


class AnsweringWork(ShardWork):
    """`items` by prompt id; answers go to `folder` of the run at `url`. `run` is what its run.json holds."""

    def __init__(
        self,
        url: str,
        s3: S3Options,
        run: Mapping[str, Any],
        model: ModelSection,
        judge_name: str,
        items: Mapping[str, Item],
        folder: str,
    ):
        self.url, self.s3, self.run, self.model = url, s3, run, model
        self.judge_name, self.items, self.folder = judge_name, items, folder

    def setup(self, place: Place) -> str:
        self.storage = open_storage(self.url, self.s3)
        try:
            device = None if place.gpus else "cpu"  # Ray hides no GPU from workers that asked for none
            self.judge = open_judge(self.judge_name, self.model, self.storage, self.s3, device)
        except (InputError, StorageError) as error:
            raise SetupError(f"{error} (on node {place.node})") from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise SetupError(describe(error)) from None
        self.at_once = self.judge.at_once
        return self.judge.identity

    def read(self, lease: Lease) -> list[StoredImage]:
        images = images_by_prompt(self.storage, self.run, lease.shard, self.items)
        return [image for of_prompt in images.values() for image in of_prompt]

    def process(self, lease: Lease, inputs: list[StoredImage], running: Running) -> _ShardAnswers:
        answers = [_unanswered(inputs[number], error) for number, error in lease.given_up.items()]
        numbers = [number for number in range(len(inputs)) if number not in lease.given_up]
        together = [number for number in numbers if number not in lease.alone]
        for group in (*([number] for number in numbers if number in lease.alone), together):
            waiting: list[_ImageQuestion] = []
            for number in group:
                try:
                    picture = inputs[number].open()
                except InputError as error:
                    answers.append(_unanswered(inputs[number], str(error)))
                    continue
                questions = self.items[inputs[number].prompt_id].questions
                waiting += [_ImageQuestion(number, inputs[number], picture, question) for question in questions]
                while len(waiting) >= self.at_once:
                    answers += self._answer_some(waiting, running)
            while waiting:
                answers += self._answer_some(waiting, running)
        return answers, images_digest((image.prompt_id, image.index, image.sha256) for image in inputs)

    def _answer_some(self, waiting: list[_ImageQuestion], running: Running) -> list[dict[str, Any]]:
        """The answers to the first of those that wait. None, with fewer to be tried, where memory ran out."""
        batch = waiting[: self.at_once]
        running(sorted({asked.number for asked in batch}))
        error = None
        try:
            said = self.judge.answer([asked.picture for asked in batch], [asked.question.text for asked in batch])
        except Exception as raised:
            if is_device_error(raised):
                raise WorkerBrokenError(describe(raised)) from raised
            if not is_out_of_memory(raised):
                raise
            error = describe(raised)  # not the exception, whose traceback would hold on to the batch's tensors
        if error:
            if len(batch) == 1:
                raise WorkerBrokenError(error)
            torch.cuda.empty_cache()  # nothing without CUDA
            self.at_once = len(batch) // 2
            return []
        del waiting[: len(batch)]
        return [
            _place(asked.image) | {"question_id": asked.question.id, "answer": answer, "yes": verdict(answer) is True}
            for asked, answer in zip(batch, said, strict=True)
        ]

    def encode(self, results: _ShardAnswers) -> bytes:
        answers, images = results
        unanswered = sum("error" in answer for answer in answers)
        return parquet_file(answers, ANSWER, {IMAGES_KEY: images, UNANSWERED_KEY: str(unanswered)})

    def write(self, lease: Lease, encoded: bytes, times: Times) -> dict:
        self.storage.put(answers_key(self.folder, lease.shard), encoded)
        return {"shard": lease.shard}


def _place(image: StoredImage) -> dict[str, Any]:
    return {"prompt_id": image.prompt_id, "image_index": image.index}


def _unanswered(image: StoredImage, error: str) -> dict[str, Any]:
    return _place(image) | {"error": error}


def images_digest(images: Iterable[tuple[str, int, str | None]]) -> str:
    """Of a shard's images that are asked about, by prompt id, number and sha256: answers are to these images alone."""
    return hashlib.sha256(json.dumps(sorted(images)).encode()).hexdigest()


def answers_key(folder: str, shard: int) -> str:
    return f"{folder}shard-{shard_name(shard)}.parquet"
