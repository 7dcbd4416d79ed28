"""What a worker does with a committed shard of a run: has its images' questions answered, and writes the answers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.storage import NotFound, S3Options, StorageError, open_storage
from cluster.work import Lease, Place, SetupError, ShardWork, Times, WorkerBrokenError, describe
from flashu.devices import is_device_error, is_out_of_memory
from flashu.errors import InputError, OutOfMemoryError
from jobs.config import ModelSection
from jobs.dpg.questions import Item
from jobs.dpg.vqa import open_vqa
from jobs.formats import FORMATS
from jobs.run_folder import metadata_key, shard_name

AT_ONCE = 16  # images
ANSWER = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("image_index", pa.int32(), nullable=False),
        ("question_id", pa.int64()),  # null where the image could not be asked about
        ("yes", pa.bool_()),
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
        except (InputError, StorageError, OutOfMemoryError) as error:
            raise SetupError(str(error)) from None
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
        answers: list[dict[str, Any]] = []
        numbers = [number for number in range(len(inputs)) if number not in lease.given_up]
        for number in lease.given_up:
            answers.append(_unanswered(inputs[number], lease.given_up[number]))
        together = [number for number in numbers if number not in lease.alone]
        batches = [[number] for number in numbers if number in lease.alone]
        batches += [together[start : start + AT_ONCE] for start in range(0, len(together), AT_ONCE)]
        for batch in batches:
            running(batch)
            answers += self._ask([inputs[number] for number in batch])
        return answers

    def _ask(self, images: list[AskedImage]) -> list[dict[str, Any]]:
        opened: list[tuple[AskedImage, Image.Image]] = []
        answers: list[dict[str, Any]] = []
        for image in images:
            try:
                opened.append((image, image.open()))
            except Exception as error:  # whatever a damaged file can raise in a decoder
                answers.append(_unanswered(image, describe(error)))
        if not opened:
            return answers
        asked = [self.items[image.prompt_id].questions for image, _ in opened]
        texts = [[question.text for question in questions] for questions in asked]
        try:
            said = self.vqa.yes([picture for _, picture in opened], texts)
        except Exception as error:
            if is_device_error(error) or isinstance(error, OutOfMemoryError) or is_out_of_memory(error):
                raise WorkerBrokenError(describe(error)) from None
            raise
        for (image, _), questions, of_image in zip(opened, asked, said, strict=True):
            for question, yes in zip(questions, of_image, strict=True):
                answers.append(image.place | {"question_id": question.id, "yes": yes, "error": None})
        return answers

    def encode(self, results: list[dict[str, Any]]) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(results, schema=ANSWER), buffer, compression="zstd")
        return buffer.getvalue()

    def write(self, lease: Lease, encoded: bytes, times: Times) -> dict:
        self.storage.put(answers_key(self.folder, lease.shard), encoded)
        return {"shard": lease.shard}


def _unanswered(image: AskedImage, error: str) -> dict[str, Any]:
    return image.place | {"question_id": None, "yes": None, "error": error}


def answers_key(folder: str, shard: int) -> str:
    return f"{folder}shard-{shard_name(shard)}.parquet"
