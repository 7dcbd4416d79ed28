"""DPG-Bench's prompts as a manifest.

The benchmark is a folder with a text file a prompt, whose name is the prompt's id; Show-o2's evaluation ships the same
as one JSON list. Scoring finds an image's prompt by that name, so the names become the ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from manifests.build import BuildReport, build_from
from manifests.errors import ManifestError
from manifests.file_errors import plain_errors
from manifests.files import FileSet, find
from manifests.sources import Batch, batches_of, read_sources
from manifests.writing import Destination

PROMPTS = 1065
"""Of the official benchmark."""

IMAGES = 4
"""Of each prompt, in the official evaluation."""


def build_dpg(
    source: str,
    destination: str,
    *,
    num_images: int = IMAGES,
    force: bool = False,
    endpoint_url: str | None = None,
    region: str | None = None,
) -> BuildReport:
    """Build a manifest from the folder of text files, or from the JSON list."""
    place = {"endpoint_url": endpoint_url, "region": region}
    if num_images < 1:
        raise ManifestError(f"the number of images must be at least 1, not {num_images}")
    target = Destination.of(destination, force=force, **place)
    target.refuse_source(source)
    texts = None if source.endswith(".json") else _read_texts(find(source, (".txt",), **place))

    def batches() -> Iterator[Batch]:
        if texts is None:
            read = read_sources([source], {"prompt_id": "prompt_file_name"}, **place)
        else:
            rows = ({"prompt_id": PurePosixPath(name).stem, "prompt": text} for name, text in texts)
            read = batches_of(enumerate(rows, start=1), source, "file")
        for batch in read:
            names = batch.known["prompt_id"]
            batch.known["prompt_id"] = [name.removesuffix(".txt") for name in names]
            batch.known.setdefault("num_images", [num_images] * len(names))
            yield batch

    return build_from(batches, target, source)


def _read_texts(found: FileSet) -> list[tuple[str, str]]:
    """Each file's name and prompt. They are few and small, but in S3 each is a request."""

    def read(name: str) -> tuple[str, str]:
        label = found.label + name
        with plain_errors(label), found.filesystem.open_input_stream(found.path(name)) as file:
            try:
                text = file.read().decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                raise ManifestError(f"{label}: not valid UTF-8") from None
        if not text:
            raise ManifestError(f"{label}: the prompt is empty")
        return name, text

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read, found.names))
