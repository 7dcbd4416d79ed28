"""The shapes world: the oracle on clean and damaged pictures, captions that tell the truth, the benchmark's file."""

import csv
import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from shapes.bench import Item, items, to_csv
from shapes.captions import caption, describe, held_out, question, training_caption, yes_no
from shapes.oracle import answers, look
from shapes.propositions import Kind, Proposition
from shapes.render import render
from shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing, random_scene

SIDE = 64


def noisy(picture, sigma, seed):
    noise = np.random.default_rng(seed).normal(0, sigma, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(picture, float) + noise).clip(0, 255).astype(np.uint8))


def compressed(picture, quality):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


DAMAGES = {
    "none": lambda picture, seed: picture,
    "noise": lambda picture, seed: noisy(picture, 10, seed),
    "blur": lambda picture, seed: picture.filter(ImageFilter.GaussianBlur(0.7)),
    "jpeg": lambda picture, seed: compressed(picture, 60),
}


def told(scene):
    return scene.background, sorted((thing.shape, thing.colour, thing.size) for thing in scene.things)


@pytest.mark.parametrize(("damage", "floor"), [("none", 0.995), ("noise", 0.98), ("blur", 0.98), ("jpeg", 0.95)])
def test_oracle_sees_the_whole_scene(damage, floor):
    rng = random.Random(f"oracle {damage}")
    scenes = [random_scene(rng) for _ in range(200)]
    seen = [look(DAMAGES[damage](render(scene, SIDE), seed)) for seed, scene in enumerate(scenes)]
    right = [told(scene) == told(found) for scene, found in zip(scenes, seen, strict=True)]
    assert np.mean(right) >= floor


def test_oracle_sees_where_things_are_and_at_other_sizes_too():
    rng = random.Random("places")
    for side in (64, 96, 128):
        for _ in range(20):
            scene = random_scene(rng)
            found = look(render(scene, side))
            assert told(found) == told(scene)
            for thing in scene.things:
                nearest = min(((seen.x - thing.x) ** 2 + (seen.y - thing.y) ** 2) ** 0.5 for seen in found.things)
                assert nearest < 0.02


def test_every_shape_colour_size_and_background_is_told_from_the_others():
    for background in BACKGROUNDS:
        for shape in SHAPES:
            for colour in COLOURS:
                for size in SIZES:
                    scene = Scene(background, (Thing(shape, colour, size, 0.47, 0.53),))
                    assert told(look(render(scene))) == told(scene)


def drawn(draw_on):
    picture = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS["white"])
    draw_on(ImageDraw.Draw(picture))
    return picture


RED = COLOURS["red"]


@pytest.mark.parametrize(
    "draw_on",
    [
        lambda draw: None,
        lambda draw: draw.rectangle((20, 20, 44, 26), fill=RED),  # no square
        lambda draw: (draw.circle((24, 32), 10, fill=RED), draw.circle((38, 32), 10, fill=RED)),  # two, merged
        lambda draw: draw.rectangle((2, 2, 61, 61), fill=RED),  # larger than anything
        lambda draw: draw.polygon([(20, 20), (44, 22), (40, 30), (30, 28), (34, 44), (18, 40)], fill=RED),
        lambda draw: draw.circle((32, 32), 10, fill=(150, 100, 60)),  # no colour of the world
    ],
)
def test_what_a_person_would_not_recognise_counts_for_nothing(draw_on):
    assert look(drawn(draw_on)).things == ()


def test_noise_and_other_backgrounds_are_none():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    assert look(noise).things == ()
    assert look(Image.new("RGB", (SIDE, SIDE), (30, 90, 30))).background == ""


SCENE = Scene(
    "grey",
    (
        Thing("circle", "red", "small", 0.2, 0.3),
        Thing("circle", "red", "small", 0.2, 0.7),
        Thing("star", "blue", "large", 0.7, 0.5),
    ),
)
CIRCLE, STAR = Kind("circle", "red"), Kind("star", "blue")


@pytest.mark.parametrize(
    ("proposition", "holds", "asked"),
    [
        (Proposition(Kind("circle")), True, "Is there a circle?"),
        (Proposition(Kind("ring")), False, "Is there a ring?"),
        (Proposition(Kind("circle", "orange")), False, "Is there an orange circle?"),
        (Proposition(Kind("star", "blue", "large")), True, "Is there a large blue star?"),
        (Proposition(Kind("star", "blue", "small")), False, "Is there a small blue star?"),
        (Proposition(CIRCLE, count=2), True, "Are there exactly two red circles?"),
        (Proposition(STAR, count=2), False, "Are there exactly two blue stars?"),
        (Proposition(STAR, count=1), True, "Is there exactly one blue star?"),
        (Proposition(CIRCLE, relation="left of", other=STAR), True, "Is the red circle to the left of the blue star?"),
        (
            Proposition(CIRCLE, relation="right of", other=STAR),
            False,
            "Is the red circle to the right of the blue star?",
        ),
        (Proposition(STAR, relation="below", other=CIRCLE), True, "Is the blue star below the red circle?"),
        (Proposition(background="grey"), True, "Is the background grey?"),
        (Proposition(background="white"), False, "Is the background white?"),
    ],
)
def test_propositions_of_a_scene_and_of_its_picture(proposition, holds, asked):
    assert proposition.holds(SCENE) is holds
    assert answers(render(SCENE), [proposition]) == [holds]
    assert proposition.question == asked


def test_captions_tell_the_truth_and_training_never_shows_what_is_held_out():
    rng = random.Random("truth")
    held = 0
    for _ in range(500):
        scene = random_scene(rng)
        description = describe(scene, rng)
        assert all(proposition.holds(scene) for proposition, _ in description.propositions()), caption(description, rng)
        held += held_out(description)
    assert 30 < held < 100, "an eighth"
    benchmark = {item.text for item in items()}
    assert not benchmark & {training_caption(random_scene(rng), rng) for _ in range(3000)}


def test_questions_are_answered_as_the_scene_is():
    rng = random.Random("questions")
    for _ in range(300):
        scene = random_scene(rng)
        proposition, yes = yes_no(scene, rng)
        assert proposition.holds(scene) is yes
        asked, answer = question(scene, rng)
        assert asked.endswith("?")
        if asked.startswith("How many shapes"):
            assert answer == ("one", "two", "three")[len(scene.things) - 1]
        elif "is the background" in asked:
            assert answer == scene.background
        elif asked.startswith("What shape"):
            assert answer in {thing.shape for thing in scene.things}


def test_benchmark_file_is_the_committed_one_in_dpg_benchs_columns():
    file = Path(__file__).parents[2] / "benchmarks" / "shapes" / "shapes_bench.csv"
    text = to_csv(items())
    assert text == file.read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert ",".join(rows[0]) == (
        "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
        "question_natural_language"
    )
    assert len({row["item_id"] for row in rows}) == len({row["text"] for row in rows}) == 300
    known = {}
    for row in rows:
        known.setdefault(row["item_id"], set())
        dependency = {int(number) for number in row["dependency"].split(",")} - {0}
        assert dependency <= known[row["item_id"]], "what a question depends on stands before it"
        known[row["item_id"]].add(int(row["proposition_id"]))
        assert row["tuple"].startswith(f"{row['category_broad']} - {row['category_detailed']} (")


def test_a_question_counts_only_if_those_it_depends_on_were_answered_yes():
    item = Item("x", "pair", "", (Proposition(CIRCLE),) * 4, ((), (0,), (1,), ()))
    assert item.score([True, True, True, True]) == 1
    assert item.score([False, True, True, True]) == 0.25
    assert item.score([True, False, True, False]) == 0.25


@pytest.mark.parametrize(
    "draw_on",
    [
        lambda draw: (
            draw.pieslice((20, 20, 44, 44), 90, 270, fill=RED),
            draw.pieslice((20, 20, 44, 44), -90, 90, fill=COLOURS["blue"]),
        ),  # neither red, nor blue, nor purple
        lambda draw: (draw.rectangle((27, 20, 36, 44), fill=RED), draw.rectangle((20, 27, 44, 36), fill=RED)),  # cross
        lambda draw: draw.pieslice((20, 20, 44, 44), 0, 270, fill=RED),
        lambda draw: draw.circle((32, 32), 10, fill=(128, 128, 128)),
    ],
)
def test_two_colours_in_one_and_near_misses_count_for_nothing(draw_on):
    assert look(drawn(draw_on)).things == ()


def test_a_filled_ring_is_a_ring_and_a_circle():
    picture = drawn(lambda draw: (draw.circle((32, 32), 15, fill=RED), draw.circle((32, 32), 7, fill=COLOURS["blue"])))
    assert told(look(picture)) == ("white", [("circle", "blue", "small"), ("ring", "red", "large")])


def test_noise_is_no_grey_background():
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    patches = Image.fromarray(pixels[:8, :8]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    for noise in (Image.fromarray(pixels), patches):
        assert look(noise) == Scene("", ())
