"""From answers to DPG-Bench's scores.

A question scores 1 when its answer is yes and every question that it depends on scored 1. An image's score is the mean
over its item's questions, an item's the mean over its images, the benchmark's 100 times the mean over items. Category
scores are of the answers themselves, before the dependency rule, over all questions of a category in all images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from jobs.scoring.questions import Item, Question


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
