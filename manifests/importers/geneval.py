"""GenEval's prompts as a manifest.

The benchmark (Ghosh et al. 2023) is one file, evaluation_metadata.jsonl: in each line a prompt, and what its image must
show. Its evaluator looks for a prompt's images in a folder of the line's number, counted from 0, so the numbers become
the ids; and there it looks for the line itself, so that goes with the images, in a column of its own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

from manifests.build import BuildReport, build_from
from manifests.errors import ManifestError, named
from manifests.file_errors import plain_errors
from manifests.files import find
from manifests.schema import MAX_IMAGES
from manifests.sources import Record, batches_of, json_lines
from manifests.writing import Destination

PROMPTS = 553
"""Of the official file."""

IMAGES = 4
"""Of each prompt, in the official evaluation."""

COLUMN = "geneval"
"""The carried column: the prompt's line of the file, as JSON in ASCII."""


def build_geneval(
    source: str,
    destination: str,
    *,
    num_images: int = IMAGES,
    force: bool = False,
    endpoint_url: str | None = None,
    region: str | None = None,
) -> BuildReport:
    """Build a manifest from evaluation_metadata.jsonl, or a file like it."""
    place = {"endpoint_url": endpoint_url, "region": region}
    if not 1 <= num_images <= MAX_IMAGES:
        raise ManifestError(f"the number of images must be between 1 and {MAX_IMAGES:,}, not {num_images}")
    target = Destination.of(destination, force=force, **place)
    target.refuse_source(source)
    found = find(source, (".jsonl",), **place)
    if len(found.names) > 1:
        raise ManifestError(f"{source} holds {named(found.names)}; give one file: its lines are counted")
    label = found.label + found.names[0]

    def rows() -> Iterator[Record]:
        with plain_errors(label), found.filesystem.open_input_stream(found.path(found.names[0])) as stream:
            for number, line in json_lines(io.BufferedReader(stream, 1 << 20), label):
                check_line(line, f"{label}:{number}")
                row = {"prompt_id": f"{number - 1:05d}", "prompt": line["prompt"], "num_images": num_images}
                yield number, row | {COLUMN: json.dumps(line)}

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
