"""The question file of DPG-Bench (`dpg_bench.csv`), read and checked: items, their questions, what depends on what.

A row a question, with the columns in `COLUMNS` among others. `dependency` lists the proposition_id of questions of the
same item, comma-separated, 0 for none. `tuple` begins with the question's category: "attribute - color (car, red)" is
of level 1 "attribute" and of level 2 "attribute - color". (The official script drops the file's first data row. Here it
counts.)
"""

from __future__ import annotations

import csv
import graphlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashu.errors import InputError

DEMO_QUESTIONS = Path(__file__).parent / "demo.csv"  # about the prompts that the built-in model draws
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Question:
    id: int  # within its item
    text: str
    parents: tuple[int, ...]  # ids
    category: str  # level 2; level 1 is what stands before " - "

    @property
    def level_1(self) -> str:
        return self.category.split(" - ")[0]


@dataclass(frozen=True)
class Item:
    """One prompt and its questions, each after those that it depends on."""

    id: str
    prompt: str
    questions: tuple[Question, ...]


def read_questions(text: str, name: str) -> dict[str, Item]:
    """The items of a question file's text, by id, in its order.

    `name` is the file's, for errors. Raises `InputError` naming the line: columns that are missing, ids that are no
    numbers or come twice, an empty question, parents that the item does not have, questions that depend on themselves.
    """
    found: dict[str, list[tuple[int, str, Question]]] = {}
    for line, row in _rows(text, name):
        where = f"{name}, line {line}"
        item = row["item_id"].strip()
        if not item:
            raise InputError(f"{where}: item_id is empty")
        if not row["question_natural_language"].strip():
            raise InputError(f"{where}: question_natural_language is empty")
        question = Question(
            id=_whole(row["proposition_id"], "proposition_id", where),
            text=row["question_natural_language"].strip(),
            parents=tuple(
                number
                for part in row["dependency"].split(",")
                if part.strip() and (number := _whole(part, "dependency", where))
            ),
            category=row["tuple"].split("(")[0].strip().removesuffix(" -"),  # as in "global - (a photo)"
        )
        found.setdefault(item, []).append((line, row["text"].strip(), question))
    if not found:
        raise InputError(f"{name} holds no questions")
    return {item: Item(item, rows[0][1], _ordered(item, rows, name)) for item, rows in found.items()}


def _rows(text: str, name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Each data row with the line that it ends on."""
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise InputError(
                f"{name} lacks the column{'s'[: len(missing) > 1]} {', '.join(missing)}; "
                f"a question file has {', '.join(COLUMNS)}"
            )
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{name}, line {reader.line_num}: not as many fields as there are columns")
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: not CSV: {error}") from None


def _whole(text: str, column: str, where: str) -> int:
    try:
        number = float(text)  # a spreadsheet may have written 3 as 3.0
        if number == int(number) >= 0:
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise InputError(f"{where}: {column} is {text.strip()!r}; it must be a whole number, 0 or more")


def _ordered(item: str, rows: list[tuple[int, str, Question]], name: str) -> tuple[Question, ...]:
    by_id: dict[int, Question] = {}
    for line, _, question in rows:
        if question.id in by_id:
            raise InputError(f"{name}, line {line}: item {item} has proposition_id {question.id} twice")
        by_id[question.id] = question
    for line, _, question in rows:
        unknown = [parent for parent in question.parents if parent not in by_id]
        if unknown:
            raise InputError(
                f"{name}, line {line}: question {question.id} of item {item} depends on {unknown[0]}, "
                f"which the item does not have"
            )
    try:
        order = graphlib.TopologicalSorter({id: question.parents for id, question in by_id.items()}).static_order()
        return tuple(by_id[id] for id in order)
    except graphlib.CycleError as error:
        circle = " → ".join(map(str, error.args[1]))
        raise InputError(f"{name}: questions of item {item} depend on each other in a circle: {circle}") from None
