"""Where the images of a shard go: one class per output format, each writing all of a shard's images, and reading some.

What is written depends on the images and their records alone, so a shard written twice is the same bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import NotFound, Storage
from jobs.dataset.keys import json_value, shard_name
from jobs.dataset.records import EncodedImage

ROW_GROUP = 16  # images; a reader that wants one image reads so many


class PayloadFormat(ABC):
    """Writes a shard's images below `data/`, replacing what an attempt before left there."""

    pattern: str  # of the files that hold images, for dataset cards

    @abstractmethod
    def write(self, storage: Storage, shard: int, images: Sequence[EncodedImage], schema: pa.Schema) -> None:
        """Write images with the records' columns in `schema`; for no images, leave nothing. Raises `StorageError`."""

    @abstractmethod
    def read(self, storage: Storage, shard: int, names: Mapping[int, str]) -> Iterator[tuple[int, bytes]]:
        """Some of a shard's images, with their rows in its metadata; `names` are their file names by row.

        What is not there, or damaged, is left out, or raises what the storage or a decoder does.
        """


class OneFilePayload(PayloadFormat):
    """`data/shard-00042` with a suffix: all of a shard's images in one file."""

    suffix: str

    @property
    def pattern(self) -> str:
        return f"data/*{self.suffix}"

    def write(self, storage: Storage, shard: int, images: Sequence[EncodedImage], schema: pa.Schema) -> None:
        if images:
            storage.put(self.key(shard), self.file(images, schema))
        else:
            storage.delete(self.key(shard))

    def key(self, shard: int) -> str:
        return f"data/shard-{shard_name(shard)}{self.suffix}"

    @abstractmethod
    def file(self, images: Sequence[EncodedImage], schema: pa.Schema) -> bytes:
        """The file's bytes."""


class ParquetPayload(OneFilePayload):
    """`data/shard-00042.parquet`: the columns, and `image`, which `datasets` reads as an Image."""

    suffix = ".parquet"

    def file(self, images: Sequence[EncodedImage], schema: pa.Schema) -> bytes:
        image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pictures = [{"bytes": image.data, "path": image.record["file_name"]} for image in images]
        table = pa.Table.from_pylist([image.record for image in images], schema=schema)
        table = table.add_column(0, pa.field("image", image_type), pa.array(pictures, type=image_type))
        features = {"info": {"features": {"image": {"_type": "Image"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        buffer = io.BytesIO()
        compression = dict.fromkeys(schema.names, "zstd") | {"image.bytes": "none", "image.path": "zstd"}
        pq.write_table(table, buffer, row_group_size=ROW_GROUP, compression=compression, use_dictionary=schema.names)
        return buffer.getvalue()

    def read(self, storage: Storage, shard: int, names: Mapping[int, str]) -> Iterator[tuple[int, bytes]]:
        with storage.open(self.key(shard)) as file:
            parquet = pq.ParquetFile(file)
            start = 0
            for group in range(parquet.num_row_groups):
                end = start + parquet.metadata.row_group(group).num_rows
                rows = [row for row in names if start <= row < end]
                try:
                    column = parquet.read_row_group(group, columns=["image.bytes"])["image"] if rows else ()
                except (pa.ArrowException, OSError) as error:
                    if getattr(error, "errno", None):  # the disk's error, and no decoder's
                        raise
                else:
                    yield from ((row, column[row - start]["bytes"].as_py()) for row in rows)
                start = end


class WebDatasetPayload(OneFilePayload):
    """`data/shard-00042.tar`: an image, its record as .json and its prompt as .txt, under one name each."""

    suffix = ".tar"

    def file(self, images: Sequence[EncodedImage], schema: pa.Schema) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for image in images:
                stem = image.record["file_name"].rpartition(".")[0]
                record = json_value({name: image.record[name] for name in schema.names})
                _add(tar, image.record["file_name"], image.data)
                _add(tar, f"{stem}.json", json.dumps(record, ensure_ascii=False, allow_nan=False, default=str).encode())
                _add(tar, f"{stem}.txt", image.record["prompt"].encode())
        return buffer.getvalue()

    def read(self, storage: Storage, shard: int, names: Mapping[int, str]) -> Iterator[tuple[int, bytes]]:
        rows = {name: row for row, name in names.items()}
        with storage.open(self.key(shard)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile() and member.name in rows:
                    yield rows.pop(member.name), tar.extractfile(member).read()
                if not rows:
                    return


class FilesPayload(PayloadFormat):
    """`data/00042/ID-0.png`: one file per image; what is known of it stands in the metadata."""

    pattern = "data/**"

    def write(self, storage: Storage, shard: int, images: Sequence[EncodedImage], schema: pa.Schema) -> None:
        folder = f"data/{shard_name(shard)}/"
        files = {folder + image.record["file_name"]: image.data for image in images}
        for key in set(storage.list(folder)) - files.keys():
            storage.delete(key)
        for key, data in files.items():
            storage.put(key, data)

    def read(self, storage: Storage, shard: int, names: Mapping[int, str]) -> Iterator[tuple[int, bytes]]:
        for row, name in names.items():
            with suppress(NotFound):
                yield row, storage.get(f"data/{shard_name(shard)}/{name}")


FORMATS: dict[str, PayloadFormat] = {
    "parquet": ParquetPayload(),
    "webdataset": WebDatasetPayload(),
    "files": FilesPayload(),
}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
