"""Scenes in words: captions in varied wording, and questions with their answers."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Sequence

from .propositions import COUNT_WORDS, Description, Group, Kind, Proposition, article
from .scenes import BACKGROUNDS, COLOURS, OPPOSITE, RELATIONS, SHAPES, SIZES, Scene, clear_relation, offset

SIZE_WORDS = {"small": ("small", "tiny", "little"), "medium": ("medium", "medium-sized"), "large": ("large", "big")}
COLOUR_WORDS = {"grey": ("grey", "gray"), "purple": ("purple", "violet")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
FRAMES = ("{}",) * 5 + ("a picture of {}", "an image of {}", "a drawing of {}", "there {be} {}", "{} in the picture")
BACKGROUND_FRAMES = ("{} on a {} background", "{}, {} background", "{} in front of a {} background")

DESCRIBE = "Describe the picture."

HELD_OUT = 8  # one description in so many is never shown in training


def held_out(description: Description) -> bool:
    """Whether descriptions of these things, in this relation, are kept for testing: in any order, on any background."""
    groups, relation = description.groups, description.relation
    if groups != (ordered := tuple(sorted(groups, key=repr))):
        groups, relation = ordered, relation and OPPOSITE[relation]
    return zlib.crc32(repr((groups, relation)).encode()) % HELD_OUT == 0


def describe(scene: Scene, rng: random.Random) -> Description:
    """What a caption might tell of a scene: all of its things, by colour and shape, and some of the rest."""
    counts = Counter((thing.shape, thing.colour, thing.size) for thing in scene.things)
    groups = [Group(n, Kind(*kind[:2], kind[2] if rng.random() < 0.4 else None)) for kind, n in counts.items()]
    rng.shuffle(groups)
    relation = None
    if len(scene.things) == len(groups) == 2 and rng.random() < 0.75:
        first, second = (next(thing for thing in scene.things if group.kind.matches(thing)) for group in groups)
        relation = clear_relation(first, second)
    background = scene.background if rng.random() < 0.4 else None
    return Description(tuple(groups), relation, background)


def caption(description: Description, rng: random.Random) -> str:
    """A description in words."""
    parts = [_group_in_words(group, rng) for group in description.groups]
    if description.relation:
        told = f"{parts[0]} {rng.choice(RELATION_WORDS[description.relation])} {parts[1]}"
    elif len(parts) == 3:
        told = f"{parts[0]}, {parts[1]} and {parts[2]}"
    else:
        told = " and ".join(parts)
    told = rng.choice(FRAMES).format(told, be="is" if description.groups[0].count == 1 else "are")
    if description.background:
        told = rng.choice(BACKGROUND_FRAMES).format(told, _varied(COLOUR_WORDS, description.background, rng))
    return told


def _group_in_words(group: Group, rng: random.Random) -> str:
    kind = group.kind
    size = rng.choice(SIZE_WORDS[kind.size]) if kind.size else None
    words = " ".join(word for word in (size, _varied(COLOUR_WORDS, kind.colour, rng), kind.shape) if word)
    if group.count > 1:
        return f"{COUNT_WORDS[group.count]} {words}s"
    return f"{'one' if rng.random() < 0.1 else article(words)} {words}"


def _varied(words: dict[str, Sequence[str]], word: str, rng: random.Random) -> str:
    return rng.choice(words.get(word, (word,)))


def training_caption(scene: Scene, rng: random.Random) -> str:
    """A caption of `scene` whose description is not held out; "" for the few scenes of which all are."""
    for _ in range(10):
        description = describe(scene, rng)
        if not held_out(description):
            return caption(description, rng)
    return ""


def plain_caption(scene: Scene) -> str:
    """The one answer to "Describe the picture.": things from left to right."""
    counts = Counter(f"{t.size} {t.colour} {t.shape}" for t in sorted(scene.things, key=lambda t: t.x))
    parts = [f"{article(kind)} {kind}" if n == 1 else f"{COUNT_WORDS[n]} {kind}s" for kind, n in counts.items()]
    return f"{' and '.join(parts)} on a {scene.background} background"


def yes_no(scene: Scene, rng: random.Random) -> tuple[Proposition, bool]:
    """A statement about `scene` and whether it holds; about as many do as do not."""
    wanted = rng.random() < 0.5
    while True:
        proposition = _statement(scene, rng)
        if proposition and proposition.holds(scene) == wanted:
            return proposition, wanted


def _statement(scene: Scene, rng: random.Random) -> Proposition | None:
    """A statement that is near the truth, as far as it is false; None where it would be a matter of opinion."""
    sort = rng.choices(("shape", "colour", "size", "count", "relation", "background"), (2, 4, 2, 2, 3, 1))[0]
    if sort == "background":
        return Proposition(background=rng.choice(list(BACKGROUNDS)))
    thing = rng.choice(scene.things)
    other = rng.choice(scene.things)
    shape = rng.choice((thing.shape, other.shape, rng.choice(SHAPES)))
    colour = rng.choice((thing.colour, other.colour, rng.choice(list(COLOURS))))
    if sort == "shape":
        return Proposition(Kind(shape))
    if sort == "colour":
        return Proposition(Kind(shape, colour))
    if sort == "size":
        return Proposition(Kind(thing.shape, thing.colour, rng.choice(list(SIZES))))
    if sort == "count":
        return Proposition(Kind(thing.shape, thing.colour), count=rng.choice((1, 2, 3)))
    kinds = [Kind(one.shape, one.colour) for one in (thing, other)]
    relation = rng.choice(RELATIONS)
    alone = all(sum(kind.matches(one) for one in scene.things) == 1 for kind in kinds)
    if not alone or thing is other or abs(offset(thing, other, relation)) < 0.1:
        return None
    return Proposition(kinds[0], relation=relation, other=kinds[1])


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about `scene` and its answer, of one word."""
    sort = rng.choices(("yes or no", "how many", "what colour", "what shape", "background"), (8, 2, 2, 2, 1))[0]
    if sort == "yes or no":
        proposition, holds = yes_no(scene, rng)
        return proposition.question, "yes" if holds else "no"
    colour_word = rng.choice(("color", "colour"))
    if sort == "background":
        return f"What {colour_word} is the background?", scene.background
    thing = rng.choice(scene.things)
    shapes = [one for one in scene.things if one.shape == thing.shape]
    if sort == "how many":
        what, found = rng.choice((("shape", scene.things), (thing.shape, shapes)))
        return f"How many {what}s are there?", COUNT_WORDS[len(found)]
    if sort == "what colour" and len(shapes) == 1:
        return f"What {colour_word} is the {thing.shape}?", thing.colour
    alike = {one.shape for one in scene.things if one.colour == thing.colour}
    if len(alike) == 1:
        return f"What shape is {thing.colour}?", thing.shape
    return question(scene, rng)
