"""What can be said of a scene and be true or false: the questions of DPG-Bench, for this world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .scenes import Scene, Thing, offset

COUNT_WORDS = {1: "one", 2: "two", 3: "three"}
BESIDE = 0.05  # how far a centre must lie to one side for a relation to hold, as a share of the picture's side


@dataclass(frozen=True)
class Kind:
    """What a thing is: as much of it as is told."""

    shape: str
    colour: str | None = None
    size: str | None = None

    def matches(self, thing: Thing) -> bool:
        told = ((self.shape, thing.shape), (self.colour, thing.colour), (self.size, thing.size))
        return all(said is None or said == seen for said, seen in told)

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Proposition:
    """One statement. Without `count`, `relation` and `background` it says that there is a thing of `kind`."""

    kind: Kind | None = None
    count: int | None = None  # exactly so many of `kind`
    relation: str | None = None  # of some `kind` to some `other`
    other: Kind | None = None
    background: str | None = None

    def holds(self, scene: Scene) -> bool:
        if self.background:
            return scene.background == self.background
        found = [thing for thing in scene.things if self.kind.matches(thing)]
        if self.count is not None:
            return len(found) == self.count
        if self.relation:
            others = [thing for thing in scene.things if self.other.matches(thing)]
            return any(a is not b and offset(a, b, self.relation) > BESIDE for a in found for b in others)
        return bool(found)

    @property
    def question(self) -> str:
        """As it is asked, for a yes or a no."""
        if self.background:
            return f"Is the background {self.background}?"
        if self.count is not None and self.count > 1:
            return f"Are there exactly {COUNT_WORDS[self.count]} {self.kind}s?"
        if self.count is not None:
            return f"Is there exactly one {self.kind}?"
        if self.relation:
            return f"Is the {self.kind} {at(self.relation)} the {self.other}?"
        return f"Is there {article(str(self.kind))} {self.kind}?"

    @property
    def categories(self) -> tuple[str, str]:
        """The broad and the detailed category, in DPG-Bench's words."""
        if self.background:
            return "global", "background"
        if self.count is not None:
            return "other", "count"
        if self.relation:
            return "relation", "spatial"
        if self.kind.size:
            return "attribute", "size"
        return ("attribute", "color") if self.kind.colour else ("entity", "whole")

    @property
    def tuple(self) -> str:
        """The statement in DPG-Bench's `tuple` column: categories, then what it is about."""
        broad, detailed = self.categories
        if self.background:
            about = f"background, {self.background}"
        elif self.count is not None:
            about = f"{self.kind}, =={self.count}"
        elif self.relation:
            about = f"{self.kind}, {self.other}, {self.relation}"
        elif self.kind.size:
            about = f"{Kind(self.kind.shape, self.kind.colour)}, {self.kind.size}"
        else:
            about = f"{self.kind.shape}, {self.kind.colour}" if self.kind.colour else self.kind.shape
        return f"{broad} - {detailed} ({about})"


@dataclass(frozen=True)
class Group:
    """Things that are told of together: "two small red circles"."""

    count: int
    kind: Kind


@dataclass(frozen=True)
class Description:
    """What a caption tells of a scene, before it is put into words."""

    groups: tuple[Group, ...]
    relation: str | None = None  # of the first group, a single thing, to the second, another
    background: str | None = None

    def propositions(self) -> list[tuple[Proposition, tuple[int, ...]]]:
        """Every statement, and the places in this list, from 0, of those that it depends on."""
        found: list[tuple[Proposition, tuple[int, ...]]] = []
        coloured: list[int] = []
        for group in self.groups:
            kind = group.kind
            parent = _add(found, Proposition(Kind(kind.shape)))
            parent = _add(found, Proposition(Kind(kind.shape, kind.colour)), parent)
            coloured.append(parent)
            if kind.size:
                _add(found, Proposition(kind), parent)
            if group.count > 1:
                _add(found, Proposition(Kind(kind.shape, kind.colour), count=group.count), parent)
        if self.relation:
            first, second = (Kind(group.kind.shape, group.kind.colour) for group in self.groups[:2])
            _add(found, Proposition(first, relation=self.relation, other=second), *coloured[:2])
        if self.background:
            _add(found, Proposition(background=self.background))
        return found


def _add(found: list[tuple[Proposition, tuple[int, ...]]], proposition: Proposition, *parents: int) -> int:
    """Adds it unless it is there, and returns its place."""
    said: Sequence[Proposition] = [known for known, _ in found]
    if proposition not in said:
        found.append((proposition, parents))
        return len(said)
    return said.index(proposition)


def at(relation: str) -> str:
    """A relation as it follows "is": "to the left of", "above"."""
    return f"to the {relation}" if relation.endswith("of") else relation


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"
