"""Small copies of a run's images, read out of its payload files, for a page that holds them itself."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from PIL import Image

from cluster.storage import Storage
from jobs.dataset.formats import FORMATS
from jobs.dataset.reading import read_each

SIDE = 256
THREADS = 8  # each of which holds pictures

_log = logging.getLogger(__name__)


def thumbnails(storage: Storage, payload: str, images: Iterable[Mapping[str, Any]]) -> dict[tuple[int, int], str]:
    """`data:` URLs by (shard, row). An image that cannot be read is left out: a report outlives its payload."""
    wanted = {(image["shard"], image["row"]): image["file_name"] for image in images}
    shards = groupby(sorted(wanted.items()), key=lambda item: item[0][0])
    by_shard = [(shard, {place[1]: name for place, name in items}) for shard, items in shards]
    found = read_each(lambda item: _of_shard(storage, payload, *item), by_shard, THREADS)
    return {place: url for part in found for place, url in part.items()}


def _of_shard(storage: Storage, payload: str, shard: int, names: dict[int, str]) -> dict[tuple[int, int], str]:
    made = {}
    try:
        for row, data in FORMATS[payload].read(storage, shard, names):
            made[shard, row] = _data_url(data)
    except Exception as error:  # whatever a file that others may have changed can raise in three decoders
        _log.debug("no thumbnails of shard %d: %s", shard, error)
    return made


def _data_url(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        image.thumbnail((SIDE, SIDE))
        small = io.BytesIO()
        image.convert("RGB").save(small, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(small.getvalue()).decode()}"
