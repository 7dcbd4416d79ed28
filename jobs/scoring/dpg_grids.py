"""A run's images as DPG-Bench's own script takes them: for each item one PNG, named after it, of a grid of its images.

The script cuts four squares of its `--resolution` from a 2×2 grid, row by row.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from cluster.local_storage import LocalStorage
from cluster.storage import Storage
from flashu.errors import InputError
from jobs.dataset.images import ImageEncoder, images_by_prompt
from jobs.dataset.keys import METADATA, require_run, shards_with
from manifests.importers import IMAGES

SIDE = 2  # grid cells


def export_grids(storage: Storage, destination: Path) -> tuple[int, int]:
    """Write the grids of all prompts into a folder. Returns how many, and the pixels of one image's side.

    Raises `InputError` for prompts that have not four images of one square size, or ids that cannot be file names,
    and `StorageError` where a file cannot be written.
    """
    run = require_run(storage)
    folder, encoder = LocalStorage(destination), ImageEncoder()
    folder.check()
    written, resolution = 0, None
    for shard in sorted(shards_with(storage, METADATA)):
        for prompt_id, images in images_by_prompt(storage, run, shard).items():
            _check_name(prompt_id)
            if [image.index for image in images] != list(range(IMAGES)):
                raise InputError(
                    f"prompt {prompt_id!r} has {len(images)} images; DPG-Bench takes {IMAGES} "
                    "(sampling.num_images=4, or flashu manifest dpg)"
                )
            pictures = [image.open() for image in images]
            resolution = resolution or pictures[0].width
            if any(picture.size != (resolution, resolution) for picture in pictures):
                raise InputError(f"images of prompt {prompt_id!r} are not all {resolution}x{resolution} pixels")
            grid = Image.new("RGB", (SIDE * resolution, SIDE * resolution))
            for index, picture in enumerate(pictures):
                grid.paste(picture, (index % SIDE * resolution, index // SIDE * resolution))
            folder.put(f"{prompt_id}.png", encoder.encode(grid))
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
