"""Benchmarks' own prompt files as manifests.

DPG-Bench is a folder with a text file a prompt, whose name is the prompt's id; Show-o2's evaluation ships the same as
one JSON list. Scoring finds an image's prompt by that name, so the names become the ids.

GenEval (Ghosh et al. 2023) is one file, evaluation_metadata.jsonl: in each line a prompt, and what its image must show.
Its evaluator looks for a prompt's images in a folder of the line's number, counted from 0, so the numbers become the
ids; and there it looks for the line itself, so that goes with the images, in a column of its own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from manifests.build import BuildReport, build_from
from manifests.errors import ManifestError, named
from manifests.files import FileSet, find, plain_errors
from manifests.schema import MAX_IMAGES
from manifests.sources import Batch, Record, batches_of, json_lines, read_sources
from manifests.writing import Destination

DPG_PROMPTS, GENEVAL_PROMPTS = 1065, 553  # of the official benchmarks
IMAGES = 4  # of each prompt, in the official evaluation of both
GENEVAL_COLUMN = "geneval"  # the carried column: the prompt's line of the file, as JSON in ASCII


def build_dpg(
    source: str, destination: str, *, num_images: int = IMAGES, force: bool = False, **place: str | None
) -> BuildReport:
    """Build a manifest from the folder of text files, or from the JSON list. `place` is as for `open_filesystem`."""
    if num_images < 1:
        raise ManifestError(f"the number of images must be at least 1, not {num_images}")
    target = Destination.of(destination, [source], force=force, **place)
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
        with plain_errors(label), found.filesystem.open_input_stream(found.root + name) as file:
            try:
                text = file.read().decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                raise ManifestError(f"{label}: not valid UTF-8") from None
        if not text:
            raise ManifestError(f"{label}: the prompt is empty")
        return name, text

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read, found.names))


def build_geneval(
    source: str, destination: str, *, num_images: int = IMAGES, force: bool = False, **place: str | None
) -> BuildReport:
    """Build a manifest from evaluation_metadata.jsonl, or a file like it. `place` is as for `open_filesystem`."""
    if not 1 <= num_images <= MAX_IMAGES:
        raise ManifestError(f"the number of images must be between 1 and {MAX_IMAGES:,}, not {num_images}")
    target = Destination.of(destination, [source], force=force, **place)
    found = find(source, (".jsonl",), **place)
    if len(found.names) > 1:
        raise ManifestError(f"{source} holds {named(found.names)}; give one file: its lines are counted")
    label = found.label + found.names[0]

    def rows() -> Iterator[Record]:
        with plain_errors(label), found.filesystem.open_input_stream(found.root + found.names[0]) as stream:
            for number, line in json_lines(io.BufferedReader(stream, 1 << 20), label):
                check_line(line, f"{label}:{number}")
                row = {"prompt_id": f"{number - 1:05d}", "prompt": line["prompt"], "num_images": num_images}
                yield number, row | {GENEVAL_COLUMN: json.dumps(line)}

    return build_from(lambda: batches_of(rows(), label, "line"), target, source)


def check_line(line: object, where: str) -> None:
    """Raises `ManifestError` for a line that the evaluator would stumble over, when all images are made."""
    if not isinstance(line, dict):
        raise ManifestError(f"{where}: must be an object, not {type(line).__name__}")
    missing = [name for name in ("tag", "include", "prompt") if line.get(name) is None]
    if missing:
        raise ManifestError(
            f"{where}: no {missing[0]}; there are {named(list(line))}. "
            "GenEval's evaluation_metadata.jsonl has tag, include and prompt"
        )
    if not isinstance(line["tag"], str):
        raise ManifestError(f"{where}: tag must be text, not {type(line['tag']).__name__}")
    for name in ("include", "exclude"):
        clauses = line.get(name, [])
        if not isinstance(clauses, list) or not all(_is_clause(clause) for clause in clauses):
            raise ManifestError(f"{where}: {name} must be a list of objects, each with a class and a count")


def _is_clause(clause: object) -> bool:
    return isinstance(clause, dict) and isinstance(clause.get("class"), str) and isinstance(clause.get("count"), int)
