"""The files of this folder's templates, HTML in one file among them, and small copies of a run's images for it."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from cluster.storage import Storage
from jobs.dataset.formats import FORMATS
from jobs.dataset.reading import read_each
from jobs.report.wording import FILTERS

SIDE = 256
THREADS = 8  # each of which holds pictures

_log = logging.getLogger(__name__)


def page(template: str, **values: Any) -> str:
    """A template filled in. In HTML, values are escaped: prompts, ids and errors are other people's text."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    """One for all pages: compiling a template takes longer than filling it in."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment


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
