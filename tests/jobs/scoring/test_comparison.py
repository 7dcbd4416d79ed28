"""The arms of a benchmark beside each other: over the same items, by the same models."""

import math
import random
import statistics

import pytest

from cluster.open_storage import open_storage
from flashu.errors import InputError
from jobs.scoring.comparison import Arm, compare, format_comparison
from jobs.scoring.questions import Item, Question
from jobs.scoring.rules import BenchmarkScores, OddAnswers, Scored

ITEMS = [
    Item(f"item{number}", "text", (Question(1, "?", (), "entity - whole"), Question(2, "?", (1,), "attribute - color")))
    for number in range(8)
]


def arm(name, answers, model="model A, VAE B, float32", judge="self: A", failed=0, neither=0):
    """An arm with the answers {item: [(yes, yes) of each image]}."""
    scores = BenchmarkScores()
    for item in ITEMS:
        if item.id in answers:
            scores.add(item, [dict(zip((1, 2), image, strict=True)) for image in answers[item.id]])
    left_out = [item.id for item in ITEMS if item.id not in answers]
    scored = Scored(scores, 4 * len(answers), [], left_out, True, "scores/self/", OddAnswers(100, neither, []), judge)
    seconds = {"worker_seconds_per_image": 2.0, "gpu_seconds_per_image": None, "images_per_second": 0.5}
    summary = {
        "throughput": seconds,
        "prompts": {"failed": failed},
        "config": {"flashu": {}},
        "model": {"identity": model},
    }
    return Arm(name, open_storage("nowhere"), scored, summary, 1.5)


def some_answers(seed):
    rng = random.Random(seed)
    return {item.id: [(rng.random() < 0.7, rng.random() < 0.5) for _ in range(4)] for item in ITEMS}


def test_the_difference_is_the_mean_over_items_with_its_standard_error():
    first, second = arm("baseline", some_answers(0)), arm("flashu", some_answers(1))
    found = compare([first, second])
    each = [second.scored.scores.items[item.id] - first.scored.scores.items[item.id] for item in ITEMS]
    assert found["difference"]["score"] == pytest.approx(statistics.mean(each))
    assert found["difference"]["standard_error"] == pytest.approx(statistics.stdev(each) / math.sqrt(len(each)))
    assert {item["item"]: item["difference"] for item in found["by_item"]} == pytest.approx(
        dict(zip((item.id for item in ITEMS), each, strict=True))
    )


def test_items_that_an_arm_lacks_count_in_neither():
    answers = some_answers(0)
    fewer = {name: of for name, of in answers.items() if name not in ("item0", "item5")}
    found = compare([arm("baseline", answers), arm("flashu", fewer, failed=2)])
    baseline, flashu = found["arms"]["baseline"], found["arms"]["flashu"]
    assert baseline["score"] == flashu["score"]
    assert baseline["level_2"] == flashu["level_2"]
    assert set(found["difference"]["level_1"].values()) == {0}
    assert (baseline["items"], flashu["items"]) == (6, 6)
    table = format_comparison(found)
    assert "items left out of the scores                 2           2" in table
    assert "prompts given up                             0           2" in table
    nothing = compare([arm("baseline", answers), arm("flashu", {})])
    assert nothing["difference"]["score"] is None
    assert "–" in format_comparison(nothing)


def test_answers_that_were_no_answers_stand_in_the_table():
    answers = some_answers(0)
    assert "answers neither yes nor no" in format_comparison(compare([arm("baseline", answers, neither=90)]))
    assert "neither yes nor no" not in format_comparison(compare([arm("baseline", answers)]))


def test_arms_of_other_models_or_judges_are_refused():
    answers = some_answers(0)
    pruned = arm("flashu", answers, model="model A, VAE B, float32, scores 12")
    compare([arm("baseline", answers), pruned])
    with pytest.raises(InputError, match="drawn by different models: baseline by model A, VAE B, float32, flashu by"):
        compare([arm("baseline", answers), arm("flashu", answers, model="model A, VAE B, bfloat16, scores 12")])
    with pytest.raises(InputError, match="judged by different models: baseline by self: A, flashu by self: C"):
        compare([arm("baseline", answers), arm("flashu", answers, judge="self: C")])
