"""From answers to DPG-Bench's scores.

A question scores 1 when its answer is yes and every question that it depends on scored 1. An image's score is the mean
over its item's questions, an item's the mean over its images, the benchmark's 100 times the mean over items. Category
scores are of the answers themselves, before the dependency rule, over all questions of a category in all images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jobs.dpg.questions import Item


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
    """Scores of as many items as have been added. Parts that were added apart can be merged."""

    items: dict[str, float] = field(default_factory=dict)  # 0 to 100
    categories: dict[str, Tally] = field(default_factory=dict)  # of level 2
    levels_1: dict[str, Tally] = field(default_factory=dict)

    def add(self, item: Item, images: Sequence[Mapping[int, bool]]) -> None:
        """Add an item with the answers about each of its images, at least one."""
        self.items[item.id] = 100 * sum(image_score(item, answers) for answers in images) / len(images)
        for question in item.questions:
            yes = sum(answers[question.id] for answers in images)
            self.categories.setdefault(question.category, Tally()).add(yes, len(images))
            self.levels_1.setdefault(question.level_1, Tally()).add(yes, len(images))

    def merge(self, other: BenchmarkScores) -> None:
        """Add what `other` has; no item may be in both."""
        self.items |= other.items
        for mine, theirs in ((self.categories, other.categories), (self.levels_1, other.levels_1)):
            for name, tally in theirs.items():
                mine.setdefault(name, Tally()).add(tally.yes, tally.asked)

    @property
    def overall(self) -> float:
        """The benchmark's score, 0 to 100."""
        return sum(self.items.values()) / len(self.items)
