"""What a worker does with a committed shard of a run: has its images' questions answered, and writes the answers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cluster.storage import NotFound, S3Options, StorageError, open_storage
from cluster.work import Lease, Place, SetupError, ShardWork, Times, WorkerBrokenError, describe
from flashu.devices import is_device_error, is_out_of_memory
from flashu.errors import InputError, OutOfMemoryError
from jobs.config import ModelSection
from jobs.dpg.questions import Item, Question
from jobs.dpg.vqa import open_vqa, verdict
from jobs.formats import FORMATS
from jobs.run_folder import metadata_key, shard_name

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


@dataclass
class AskedImage:
    """An image of a shard, and what is asked about it."""

    prompt_id: str
    index: int
    data: bytes | None  # None where the run's files lack it

    @property
    def place(self) -> dict[str, Any]:
        return {"prompt_id": self.prompt_id, "image_index": self.index}

    def open(self) -> Image.Image:
        if self.data is None:
            raise FileNotFoundError("the run's files lack this image")
        with Image.open(io.BytesIO(self.data)) as picture:
            picture.load()
            return picture


@dataclass
class _Asked:
    """A question about an image of a shard, to be answered."""

    number: int  # the image's in its shard
    image: AskedImage
    picture: Image.Image
    question: Question


class AnsweringWork(ShardWork):
    """`items` by prompt id; answers go to `folder` of the run at `url`, whose images are in `payload` format."""

    def __init__(
        self,
        url: str,
        s3: S3Options,
        payload: str,
        model: ModelSection,
        vqa: str,
        items: Mapping[str, Item],
        folder: str,
    ):
        self.url, self.s3, self.payload, self.model = url, s3, payload, model
        self.vqa_name, self.items, self.folder = vqa, items, folder

    def setup(self, place: Place) -> str:
        self.storage = open_storage(self.url, self.s3)
        try:
            device = None if place.gpus else "cpu"  # Ray hides no GPU from workers that asked for none
            self.vqa = open_vqa(self.vqa_name, self.model, self.storage, self.s3, device)
        except (InputError, StorageError) as error:
            raise SetupError(f"{error} (on node {place.node})") from None
        except Exception as error:
            if not _is_full(error):
                raise
            raise SetupError(describe(error)) from None
        self.at_once = self.vqa.at_once
        return self.vqa.identity

    def read(self, lease: Lease) -> list[AskedImage]:
        with self.storage.open(metadata_key(lease.shard)) as file:
            rows = pq.read_table(file, columns=["prompt_id", "image_index", "file_name"]).to_pylist()
        names = {place: row["file_name"] for place, row in enumerate(rows) if row["prompt_id"] in self.items}
        data: dict[int, bytes] = {}
        with suppress(NotFound):  # as where a run's images were moved away: each is then told as not answered
            data.update(FORMATS[self.payload].read(self.storage, lease.shard, names))
        return [AskedImage(rows[place]["prompt_id"], rows[place]["image_index"], data.get(place)) for place in names]

    def process(
        self, lease: Lease, inputs: list[AskedImage], running: Callable[[Sequence[int]], None]
    ) -> list[dict[str, Any]]:
        answers = [_unanswered(inputs[number], error) for number, error in lease.given_up.items()]
        numbers = [number for number in range(len(inputs)) if number not in lease.given_up]
        together = [number for number in numbers if number not in lease.alone]
        for group in (*([number] for number in numbers if number in lease.alone), together):
            waiting: list[_Asked] = []
            for number in group:
                try:
                    picture = inputs[number].open()
                except Exception as error:  # whatever a damaged file can raise in a decoder
                    answers.append(_unanswered(inputs[number], describe(error)))
                    continue
                questions = self.items[inputs[number].prompt_id].questions
                waiting += [_Asked(number, inputs[number], picture, question) for question in questions]
                while len(waiting) >= self.at_once:
                    answers += self._answer_some(waiting, running)
            while waiting:
                answers += self._answer_some(waiting, running)
        return answers

    def _answer_some(self, waiting: list[_Asked], running: Callable[[Sequence[int]], None]) -> list[dict[str, Any]]:
        """The answers to the first of those that wait. None, with fewer to be tried, where memory ran out."""
        batch = waiting[: self.at_once]
        running(sorted({asked.number for asked in batch}))
        error = None
        try:
            said = self.vqa.answer([asked.picture for asked in batch], [asked.question.text for asked in batch])
        except Exception as raised:
            if is_device_error(raised):
                raise WorkerBrokenError(describe(raised)) from None
            if not _is_full(raised):
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
            asked.image.place | {"question_id": asked.question.id, "answer": answer, "yes": verdict(answer) is True}
            for asked, answer in zip(batch, said, strict=True)
        ]

    def encode(self, results: list[dict[str, Any]]) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(results, schema=ANSWER), buffer, compression="zstd")
        return buffer.getvalue()

    def write(self, lease: Lease, encoded: bytes, times: Times) -> dict:
        self.storage.put(answers_key(self.folder, lease.shard), encoded)
        return {"shard": lease.shard}


def _unanswered(image: AskedImage, error: str) -> dict[str, Any]:
    return image.place | {"error": error}


def _is_full(error: Exception) -> bool:
    """Whether memory ran out, in our own network or in another's."""
    return isinstance(error, OutOfMemoryError) or is_out_of_memory(error)


def answers_key(folder: str, shard: int) -> str:
    return f"{folder}shard-{shard_name(shard)}.parquet"
