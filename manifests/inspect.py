"""Looking into a manifest: what is in it, what is wrong with it and in which row, and its first rows.

Reads every row once, in memory that does not grow with their number. Nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from manifests.errors import quoted, shortened
from manifests.plan import Manifest
from manifests.schema import TYPES, row_problem
from manifests.unique import DuplicateFinder

MOST_PROBLEMS = 20
LENGTHS = (0, 25, 50, 100, 200, 400, 800, 1600, 3200)  # where the length histogram's bars begin, in characters


@dataclass(frozen=True)
class Check:
    """What was found in all rows."""

    lengths: list[int]  # prompts for each bar of LENGTHS
    longest: int
    images: int | None  # if every row says how many
    problems: list[tuple[str, str]]  # the first: (where, what)
    problem_count: int


def check(manifest: Manifest, on_rows: Callable[[int], None] = lambda rows: None) -> Check:
    """Read every row. A problem is what would keep a job from starting, or from making a row's images."""
    lengths = np.zeros(len(LENGTHS), np.int64)
    longest = count = 0
    images: int | None = 0
    problems: list[tuple[str, str]] = []
    known = [name for name in manifest.schema.names if name in TYPES]
    with DuplicateFinder() as finder:
        for start, table in manifest.batches(known):
            characters = pc.utf8_length(table.column("prompt").drop_null()).to_numpy()
            lengths += np.bincount(np.searchsorted(LENGTHS, characters, side="right") - 1, minlength=len(LENGTHS))
            longest = max(longest, int(characters.max(initial=0)))
            if images is not None:
                counts = table.column("num_images") if "num_images" in known else None
                images = None if counts is None or counts.null_count else images + (pc.sum(counts).as_py() or 0)
            for index, row in enumerate(table.to_pylist()):
                if problem := row_problem(row):
                    count += 1
                    if len(problems) < MOST_PROBLEMS:
                        problems.append((manifest.where(start + index), problem))
            # Rows without an id are told already; a name that no other row can have keeps the numbering.
            ids = table.column("prompt_id").to_pylist()
            finder.add(name or f"\0{start + index}" for index, name in enumerate(ids))
            on_rows(len(table))
        found = finder.duplicates()
    for earlier, row in found.examples[: MOST_PROBLEMS - len(problems)]:
        name = quoted(manifest.row(row)["prompt_id"])
        problems.append((manifest.where(row), f"prompt_id {name} is that of {manifest.where(earlier)} too"))
    return Check(lengths.tolist(), longest, images, problems, count + found.count)


def printable(value: object, length: int = 100) -> str:
    """A value on one line of a terminal, which it cannot control; shortened."""
    if value is None:
        return ""
    text = shortened(str(value), length)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
