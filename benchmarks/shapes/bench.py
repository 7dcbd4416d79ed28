"""shapes-bench: prompts that the model has not been trained on, each with the statements that its picture must meet.

Laid out as DPG-Bench is, so that one scorer serves both: a row a question in a CSV file, and an image's score the share
of its questions that are answered yes, where a question counts only if those it depends on were.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .captions import caption, describe, held_out
from .propositions import Description, Proposition
from .scenes import random_scene

SEED = 2026
PER_SORT = 100
SORTS = ("single", "pair", "several")  # one thing; two; three, or two alike beside another

COLUMNS = (
    "item_id",
    "text",
    "keywords",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
    "question_natural_language",
)


@dataclass(frozen=True)
class Item:
    """One prompt, its propositions, and for each the places (from 0) of those that it depends on."""

    id: str
    sort: str
    text: str
    propositions: tuple[Proposition, ...]
    parents: tuple[tuple[int, ...], ...]

    def score(self, answers: Sequence[bool]) -> float:
        """Of one picture, in [0, 1]; `answers` are in the order of the propositions."""
        counted: list[bool] = []
        for answer, parents in zip(answers, self.parents, strict=True):
            counted.append(answer and all(counted[parent] for parent in parents))
        return sum(counted) / len(counted)


def items() -> list[Item]:
    """The whole benchmark, always the same: `PER_SORT` prompts of each of the `SORTS`."""
    rng = random.Random(SEED)
    found: dict[str, list[Item]] = {sort: [] for sort in SORTS}
    texts: set[str] = set()
    while any(len(known) < PER_SORT for known in found.values()):
        scene = random_scene(rng)
        description = describe(scene, rng)
        text = caption(description, rng)
        sort = SORTS[len(scene.things) - 1]
        if not held_out(description) or text in texts or len(found[sort]) == PER_SORT:
            continue
        texts.add(text)
        found[sort].append(_item(f"{sort}-{len(found[sort]):03d}", sort, text, description))
    return [item for sort in SORTS for item in found[sort]]


def _item(name: str, sort: str, text: str, description: Description) -> Item:
    propositions, parents = zip(*description.propositions(), strict=True)
    return Item(name, sort, text, propositions, parents)


def to_csv(benchmark: Sequence[Item]) -> str:
    """The benchmark as the text of a file like DPG-Bench's `dpg_bench.csv`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in benchmark:
        for number, (proposition, parents) in enumerate(zip(item.propositions, item.parents, strict=True), start=1):
            dependency = ",".join(str(parent + 1) for parent in parents) or "0"
            where = (item.id, item.text, item.sort, number, dependency)
            writer.writerow((*where, *proposition.categories, proposition.tuple, proposition.question))
    return text.getvalue()
