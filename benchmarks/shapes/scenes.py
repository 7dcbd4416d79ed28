"""Scenes of one to three flat shapes on a plain background, drawn at random from a seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (250, 225, 60),
    "green": (40, 160, 70),
    "cyan": (70, 205, 225),
    "blue": (40, 75, 215),
    "purple": (130, 50, 170),
    "pink": (250, 150, 200),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (15, 15, 15)}
SHAPES = ("circle", "square", "triangle", "star", "ring")

SIZES = {"small": 0.11, "medium": 0.165, "large": 0.23}
"""Half the longer side of a shape's bounding box, as a share of the picture's side."""

LATTICE = 8  # things stand on centres that are so many to the side
GAP, FRAME = 0.035, 0.015  # least space between two bounding boxes, and to the frame, as shares of the side
CLEAR = 0.2  # how far apart two centres must be for a relation to be told

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """One shape. `x` and `y` are its bounding box's centre from the left and the top, as shares of the side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]


def offset(a: Thing, b: Thing, relation: str) -> float:
    """How far `a` lies from `b` in the direction that `relation` names; negative on the other side."""
    return {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]


def clear_relation(a: Thing, b: Thing) -> str | None:
    """The relation in which a person would say `a` stands to `b`, or None where it lies askew."""
    first, second = sorted(RELATIONS, key=lambda relation: -offset(a, b, relation))[:2]
    if offset(a, b, first) >= CLEAR and offset(a, b, first) >= 1.3 * offset(a, b, second):
        return first
    return None


def random_scene(rng: random.Random, lattice: int | None = LATTICE) -> Scene:
    """One to three things, no two of which touch. Things of one kind (shape and colour) are also of one size.

    Centres are on a lattice, which makes the world small enough to be learned on a CPU; None lets them be anywhere.
    """
    while True:
        things = _place(_kinds(rng), rng, lattice)
        if things:
            return Scene(rng.choice(list(BACKGROUNDS)), things)


def _kinds(rng: random.Random) -> list[tuple[str, str, str]]:
    """Shape, colour and size of each thing: groups of equal ones, as counts are told of."""
    groups = rng.choices(((1,), (2,), (3,), (1, 1), (2, 1), (1, 1, 1)), (30, 9, 8, 35, 6, 12))[0]
    kinds: dict[tuple[str, str], str] = {}
    while len(kinds) < len(groups):
        kinds[rng.choice(SHAPES), rng.choice(list(COLOURS))] = rng.choice(list(SIZES))
    return [(*kind, size) for (kind, size), count in zip(kinds.items(), groups, strict=True) for _ in range(count)]


def _place(kinds: list[tuple[str, str, str]], rng: random.Random, lattice: int | None) -> tuple[Thing, ...] | None:
    """Places for all things, or None where they have blocked each other's way."""
    things: list[Thing] = []
    for shape, colour, size in kinds:
        margin = SIZES[size] + FRAME
        for _ in range(30):
            thing = Thing(shape, colour, size, *(_coordinate(margin, lattice, rng) for _ in range(2)))
            if all(_apart(thing, other) for other in things):
                things.append(thing)
                break
        else:
            return None
    return tuple(things)


def _coordinate(margin: float, lattice: int | None, rng: random.Random) -> float:
    if lattice is None:
        return rng.uniform(margin, 1 - margin)
    return rng.randint(math.ceil(margin * lattice), math.floor((1 - margin) * lattice)) / lattice


def _apart(a: Thing, b: Thing) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP


def outline(thing: Thing, side: float) -> list[tuple[float, float]]:
    """The corners of a square, triangle or star in a picture of `side` pixels. Circles and rings have none."""
    r, x, y = thing.radius * side, thing.x * side, thing.y * side
    if thing.shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if thing.shape == "triangle":
        h = r * 0.9
        return [(x, y - h), (x + r, y + h), (x - r, y + h)]
    outer = r / math.cos(math.radians(18))
    lower = outer * math.cos(math.radians(36))
    centre = y + (outer - lower) / 2  # of the circle through the points; the box's centre is y
    points = []
    for corner in range(10):
        radius = outer if corner % 2 == 0 else outer * 0.45
        angle = math.radians(36 * corner - 90)
        points.append((x + radius * math.cos(angle), centre + radius * math.sin(angle)))
    return points
