"""From answers to DPG-Bench's scores; what came of scoring a run, and which answers nobody could score.

A question scores 1 when its answer is yes and every question that it depends on scored 1. An image's score is the mean
over its item's questions, an item's the mean over its images, the benchmark's 100 times the mean over items. Category
scores are of the answers themselves, before the dependency rule, over all questions of a category in all images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.scoring.judges import verdict
from jobs.scoring.questions import Item, Question

SHOWN = 5  # names, where there may be thousands


def image_score(item: Item, answers: Mapping[int, bool]) -> float:
    """One image's score, in [0, 1]; `answers` has whether each question, by id, was answered yes."""
    scored: dict[int, bool] = {}
    for question in item.questions:  # parents first
        scored[question.id] = answers[question.id] and all(scored[parent] for parent in question.parents)
    return sum(scored.values()) / len(scored)


@dataclass
class Tally:
    """How many of so many questions were answered yes."""

    yes: int = 0
    asked: int = 0

    def add(self, yes: int, asked: int) -> None:
        self.yes, self.asked = self.yes + yes, self.asked + asked

    @property
    def score(self) -> float:
        """0 to 100."""
        return 100 * self.yes / self.asked


@dataclass
class BenchmarkScores:
    """Scores of as many items as have been added."""

    items: dict[str, float] = field(default_factory=dict)  # 0 to 100
    answers: dict[str, dict[Question, Tally]] = field(default_factory=dict)  # of each item's questions

    def add(self, item: Item, images: Sequence[Mapping[int, bool]]) -> None:
        """Add an item with the answers about each of its images, at least one."""
        self.items[item.id] = 100 * sum(image_score(item, answers) for answers in images) / len(images)
        self.answers[item.id] = {
            question: Tally(sum(answers[question.id] for answers in images), len(images)) for question in item.questions
        }

    def over(self, items: Collection[str]) -> BenchmarkScores:
        """The scores of some items alone."""
        return BenchmarkScores(*({item: of[item] for item in of if item in items} for of in (self.items, self.answers)))

    @property
    def overall(self) -> float | None:
        """The benchmark's score, 0 to 100; None without items."""
        return sum(self.items.values()) / len(self.items) if self.items else None

    @property
    def categories(self) -> dict[str, Tally]:
        """By category of level 2."""
        return self._by(lambda question: question.category)

    @property
    def levels_1(self) -> dict[str, Tally]:
        return self._by(lambda question: question.level_1)

    def _by(self, name: Callable[[Question], str]) -> dict[str, Tally]:
        tallies: dict[str, Tally] = {}
        for of_item in self.answers.values():
            for question, tally in of_item.items():
                tallies.setdefault(name(question), Tally()).add(tally.yes, tally.asked)
        return dict(sorted(tallies.items()))


@dataclass
class OddAnswers:
    """Answers that are neither yes nor no, and count as no; `examples` are the first few that differ."""

    answers: int = 0  # of all kinds
    neither: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Count a row of answers."""
        self.answers += 1
        if row["yes"] or "answer" not in row or verdict(row["answer"]) is not None:  # older files lack it
            return
        self.neither += 1
        if len(self.examples) < SHOWN and all(row["answer"] != other["answer"] for other in self.examples):
            self.examples.append({key: row[key] for key in ("prompt_id", "image_index", "question_id", "answer")})

    @property
    def warning(self) -> str | None:
        """What to tell of them, if there are any."""
        if not self.neither:
            return None
        shown = some(example["answer"] for example in self.examples)
        text = f"{self.neither:,} of {self.answers:,} answers were neither yes nor no, and count as no: {shown}"
        if 2 * self.neither > self.answers:
            return f"WARNING: {text}. This model does not answer yes-or-no questions, and its scores mean nothing"
        return text


@dataclass
class Scored:
    """What came of scoring a run."""

    scores: BenchmarkScores
    images: int
    unanswered: list[dict[str, Any]]  # images that could not be asked about, with the error
    left_out: list[str]  # items of the question file that the run has no images of
    complete: bool  # every shard of the run was made, and every one answered
    folder: str  # of the answers, in the run's
    odd: OddAnswers
    answered_by: str | None  # the identity of the judge; None before it has answered

    def to_json(self) -> dict[str, Any]:
        scores = self.scores
        return {
            "score": scores.overall,
            "items": len(scores.items),
            "images": self.images,
            "complete": self.complete,
            "items_without_images": len(self.left_out),
            "images_not_answered": self.unanswered,
            "answers": self.odd.answers,
            "neither_yes_nor_no": self.odd.neither,
            "examples_of_neither": self.odd.examples,
            "level_1": {name: tally.score for name, tally in scores.levels_1.items()},
            "level_2": {name: tally.score for name, tally in scores.categories.items()},
            "by_item": scores.items,
        }


def format_scores(scored: Scored) -> str:
    """The scores as a table."""
    if not scored.scores.items:
        return "nothing is scored yet"
    lines = [f"{'DPG-Bench score':<32}{scored.scores.overall:7.2f}   of {len(scored.scores.items):,} items"]
    for title, tallies in (("level 1", scored.scores.levels_1), ("level 2", scored.scores.categories)):
        lines.append(f"\n{title:<32}{'score':>7}   questions")
        lines += [f"  {name:<30}{tally.score:7.2f}   {tally.asked:,}" for name, tally in tallies.items()]
    return "\n".join(lines)


def some(names: Iterable[str]) -> str:
    """The first of some names, quoted."""
    names = list(names)
    shown = ", ".join(json.dumps(name[:80], ensure_ascii=False) for name in names[:SHOWN])
    return shown + (", …" if len(names) > SHOWN else "")
