"""Small copies of a run's images, read out of its payload files, for a page that holds them itself."""

from __future__ import annotations

import base64
import io
import logging
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from cluster.storage import Storage
from jobs.run_folder import shard_name

SIDE = 256
THREADS = 8

_log = logging.getLogger(__name__)


def thumbnails(storage: Storage, payload: str, images: Iterable[Mapping[str, Any]]) -> dict[tuple[int, int], str]:
    """`data:` URLs by (shard, row). An image that cannot be read is left out: a report outlives its payload."""
    wanted = {(image["shard"], image["row"]): image["file_name"] for image in images}
    shards = groupby(sorted(wanted.items()), key=lambda item: item[0][0])
    by_shard = [(shard, {place[1]: name for place, name in items}) for shard, items in shards]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda item: _of_shard(storage, payload, *item), by_shard)
        return {place: url for part in found for place, url in part.items()}


def _of_shard(storage: Storage, payload: str, shard: int, names: dict[int, str]) -> dict[tuple[int, int], str]:
    made = {}
    try:
        for row, data in _READERS[payload](storage, shard, names):
            made[shard, row] = _data_url(data)
    except Exception as error:  # whatever a file that others may have changed can raise in three decoders
        _log.debug("no thumbnails of shard %d: %s", shard, error)
    return made


def _from_parquet(storage: Storage, shard: int, names: dict[int, str]) -> Iterator[tuple[int, bytes]]:
    with storage.open(f"data/shard-{shard_name(shard)}.parquet") as file:
        parquet = pq.ParquetFile(file)
        start = 0
        for group in range(parquet.num_row_groups):
            end = start + parquet.metadata.row_group(group).num_rows
            rows = [row for row in names if start <= row < end]
            if rows:
                column = parquet.read_row_group(group, columns=["image.bytes"])["image"]
                yield from ((row, column[row - start]["bytes"].as_py()) for row in rows)
            start = end


def _from_tar(storage: Storage, shard: int, names: dict[int, str]) -> Iterator[tuple[int, bytes]]:
    rows = {name: row for row, name in names.items()}
    with (
        storage.open(f"data/shard-{shard_name(shard)}.tar") as file,
        tarfile.open(fileobj=file, mode="r:") as tar,
    ):
        for member in tar:
            if member.isfile() and member.name in rows:
                yield rows[member.name], tar.extractfile(member).read()


def _from_files(storage: Storage, shard: int, names: dict[int, str]) -> Iterator[tuple[int, bytes]]:
    for row, name in names.items():
        yield row, storage.get(f"data/{shard_name(shard)}/{name}")


_READERS = {"parquet": _from_parquet, "webdataset": _from_tar, "files": _from_files}


def _data_url(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        image.thumbnail((SIDE, SIDE))
        small = io.BytesIO()
        image.convert("RGB").save(small, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(small.getvalue()).decode()}"
