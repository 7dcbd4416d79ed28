"""A run's images as what comes after it takes them: those of a shard, by prompt, whichever format they are in; and
pictures to image files: png, jpeg or webp, the same bytes for the same pixels.
"""

from __future__ import annotations

import io
import tarfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.storage import NotFound, Storage
from flashu.errors import InputError
from jobs.dataset.formats import FORMATS
from jobs.dataset.keys import metadata_key

SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True)
class StoredImage:
    """An image of a prompt, as it is in the run's files."""

    prompt_id: str
    index: int  # of the prompt's images
    file_name: str
    sha256: str | None  # as the metadata has it
    data: bytes | None  # None where the run's files lack it

    def open(self) -> Image.Image:
        """The picture, in RGB. Raises `InputError` where there is none."""
        if self.data is None:
            raise InputError(f"image {self.index} of prompt {self.prompt_id!r} is not in the run's files")
        try:
            with Image.open(io.BytesIO(self.data)) as picture:
                return picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise InputError(f"image {self.index} of prompt {self.prompt_id!r} cannot be read as an image") from None


def images_by_prompt(
    storage: Storage, run: Mapping[str, Any], shard: int, prompts: Collection[str] | None = None
) -> dict[str, list[StoredImage]]:
    """The images of a committed shard, by prompt id and in the order of their numbers; of some prompts, if given.

    `run` is what run.json holds.
    """
    with storage.open(metadata_key(shard)) as file:
        records = pq.read_table(file, columns=["prompt_id", "image_index", "file_name", "sha256"]).to_pylist()
    wanted = {row: record for row, record in enumerate(records) if prompts is None or record["prompt_id"] in prompts}
    payload = FORMATS[run["config"]["output"]["format"]]
    data: dict[int, bytes] = {}
    with suppress(NotFound, pa.ArrowException, tarfile.TarError, OSError):  # files moved away, or cut short
        data.update(payload.read(storage, shard, {row: record["file_name"] for row, record in wanted.items()}))
    images: dict[str, list[StoredImage]] = defaultdict(list)
    for row, record in wanted.items():
        image = StoredImage(
            record["prompt_id"], record["image_index"], record["file_name"], record["sha256"], data.get(row)
        )
        images[image.prompt_id].append(image)
    return {prompt_id: sorted(of_prompt, key=lambda image: image.index) for prompt_id, of_prompt in images.items()}


@dataclass(frozen=True)
class ImageEncoder:
    """image_format: png, jpeg or webp. quality: 1 to 100, of jpeg and webp; webp at 100 is lossless.

    Raises `InputError` for others.
    """

    image_format: str = "png"
    quality: int = 95

    def __post_init__(self):
        if self.image_format not in SUFFIXES:
            raise InputError(f"output.image_format is {self.image_format!r}; choose one of: {', '.join(SUFFIXES)}")
        if not 1 <= self.quality <= 100:
            raise InputError(f"output.quality is {self.quality}; it goes from 1 to 100")

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.image_format]

    def encode(self, picture: Image.Image) -> bytes:
        options: dict[str, object] = {}
        if self.image_format != "png":
            options["quality"] = self.quality
        if self.image_format == "webp" and self.quality == 100:
            options["lossless"] = True
        if self.image_format == "jpeg" and self.quality >= 90:
            options["subsampling"] = 0  # full colour resolution, as the quality asked for suggests
        buffer = io.BytesIO()
        Image.frombytes(picture.mode, picture.size, picture.tobytes()).save(  # without the picture's .info
            buffer, self.image_format, **options
        )
        return buffer.getvalue()
