"""A run's images as DPG-Bench's own script takes them: for each item one PNG, named after it, of a grid of its images.

The script cuts four squares of its `--resolution` from a 2×2 grid, row by row.
"""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from cluster.storage import Storage
from flashu.errors import InputError
from jobs.formats import FORMATS
from jobs.run_folder import METADATA, metadata_key, require_run, shards_with
from manifests.dpg import IMAGES

SIDE = 2  # grid cells


def export_grids(storage: Storage, destination: Path) -> tuple[int, int]:
    """Write the grids of all prompts into a folder. Returns how many, and the pixels of one image's side.

    Raises `InputError` for prompts that have not four images of one square size, or ids that cannot be file names.
    """
    run = require_run(storage)
    payload = FORMATS[run["config"]["output"]["format"]]
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{destination} cannot be made: {error.strerror}") from None
    written, resolution = 0, None
    for shard in sorted(shards_with(storage, METADATA)):
        with storage.open(metadata_key(shard)) as file:
            rows = pq.read_table(file, columns=["prompt_id", "image_index", "file_name"]).to_pylist()
        places: dict[str, dict[int, int]] = defaultdict(dict)
        for place, row in enumerate(rows):
            places[row["prompt_id"]][row["image_index"]] = place
        data = dict(payload.read(storage, shard, {place: row["file_name"] for place, row in enumerate(rows)}))
        for prompt_id, of_prompt in places.items():
            _check_name(prompt_id)
            if sorted(of_prompt) != list(range(IMAGES)):
                raise InputError(
                    f"prompt {prompt_id!r} has {len(of_prompt)} images; DPG-Bench takes {IMAGES} "
                    "(sampling.num_images=4, or flashu manifest dpg)"
                )
            pictures = [Image.open(io.BytesIO(data[of_prompt[index]])).convert("RGB") for index in range(IMAGES)]
            resolution = resolution or pictures[0].width
            if any(picture.size != (resolution, resolution) for picture in pictures):
                raise InputError(f"images of prompt {prompt_id!r} are not all {resolution}x{resolution} pixels")
            grid = Image.new("RGB", (SIDE * resolution, SIDE * resolution))
            for index, picture in enumerate(pictures):
                grid.paste(picture, (index % SIDE * resolution, index // SIDE * resolution))
            grid.save(destination / f"{prompt_id}.png")
            written += 1
    if not written:
        raise InputError(f"{storage.url} has no images yet")
    return written, resolution


def _check_name(prompt_id: str) -> None:
    """Text from a manifest becomes a file name here, so it must be no more than a name."""
    if not prompt_id or prompt_id.startswith(".") or Path(prompt_id).name != prompt_id or "\\" in prompt_id:
        raise InputError(f"prompt id {prompt_id[:80]!r} cannot be the name of a file")
    if "." in prompt_id or len(prompt_id.encode()) > 200 or not prompt_id.isprintable():
        raise InputError(
            f"prompt id {prompt_id[:80]!r} cannot name a grid: the official script takes what stands before the first "
            "dot, and file names have a limit"
        )
