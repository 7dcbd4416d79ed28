"""DPG-Bench's question file and rules: against a plain reading of the rules, and what a bad file is told."""

import csv
import io
import random

import pytest

from flashu.errors import InputError
from jobs.scoring.questions import COLUMNS, Item, Question, read_questions
from jobs.scoring.rules import BenchmarkScores, image_score


def file_of(rows, columns=COLUMNS):
    """Rows (item, id, dependency, tuple) as a question file's text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    for item, number, dependency, category in rows:
        values = (item, f"the prompt of {item}", number, dependency, category, f"Is {number} so?")
        writer.writerow(dict(zip(COLUMNS, values, strict=True)))
    return text.getvalue()


def read(rows):
    return read_questions(file_of(rows), "dpg_bench.csv")


def plainly(parents, answers):
    """The rule as it is written, asked of each question on its own."""

    def scores(question):
        return answers[question] and not any(not scores(parent) for parent in parents[question])

    return sum(scores(question) for question in parents) / len(parents)


def test_rule_on_random_graphs_in_any_order():
    rng = random.Random(0)
    for _ in range(300):
        count = rng.randint(1, 9)
        names = rng.sample(range(1, 40), count)
        parents = {name: rng.sample(names[:place], rng.randint(0, min(place, 3))) for place, name in enumerate(names)}
        rows = [("it", name, ",".join(map(str, parents[name])) or "0", "entity - whole (x)") for name in names]
        rng.shuffle(rows)
        item = read(rows)["it"]
        answers = {name: rng.random() < 0.7 for name in names}
        assert image_score(item, answers) == pytest.approx(plainly(parents, answers))


def test_an_example_by_hand():
    """Two items. Of the first, two images; 2 depends on 1, and 3 on 2."""
    items = read(
        [
            ("a", 1, "0", "entity - whole (car)"),
            ("a", 2, "1", "attribute - color (car, red)"),
            ("a", 3, "2", "attribute - size (car, big)"),
            ("a", 4, "0", "global - (photo)"),
            ("b", 1, "0", "entity - whole (dog)"),
        ]
    )
    scores = BenchmarkScores()
    scores.add(items["a"], [{1: True, 2: False, 3: True, 4: True}, {1: False, 2: True, 3: True, 4: True}])
    scores.add(items["b"], [{1: True}])
    # Image 1: 1 and 4 count, 3 falls with 2. Image 2: only 4, as 2 and 3 fall with 1.
    assert scores.items == {"a": 100 * (2 / 4 + 1 / 4) / 2, "b": 100.0}
    assert scores.overall == pytest.approx((37.5 + 100) / 2)
    by_category = {name: tally.score for name, tally in scores.categories.items()}
    assert by_category == {
        "entity - whole": pytest.approx(200 / 3),
        "attribute - color": 50,
        "attribute - size": 100,
        "global": 100,
    }
    assert {name: tally.score for name, tally in scores.levels_1.items()} == {
        "entity": pytest.approx(200 / 3),
        "attribute": 75,
        "global": 100,
    }


def test_the_first_data_row_counts_and_a_byte_order_mark_does_not():
    items = read_questions("\ufeff" + file_of([("a", 1, "0", "entity - whole (x)")]), "f.csv")
    assert items == {"a": Item("a", "the prompt of a", (Question(1, "Is 1 so?", (), "entity - whole"),))}


GOOD = ("a", 1, "0", "entity - whole (x)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (file_of([GOOD], COLUMNS[:4]), "f.csv lacks the columns tuple, question_natural_language; a question file has"),
        ("", "lacks the columns item_id"),
        (file_of([]), "f.csv holds no questions"),
        (file_of([("", 1, "0", "x")]), "line 2: item_id is empty"),
        (file_of([GOOD, ("a", "two", "0", "x")]), "line 3: proposition_id is 'two'"),
        (file_of([GOOD, ("a", 2, "-1", "x")]), "line 3: dependency is '-1'"),
        (file_of([GOOD, GOOD]), "line 3: item a has proposition_id 1 twice"),
        (file_of([GOOD, ("a", 2, "1, 9", "x")]), "line 3: question 2 of item a depends on 9, which the item does not"),
        (file_of([("a", 1, "2", "x"), ("a", 2, "1", "x")]), "questions of item a depend on each other in a circle"),
        (file_of([("a", 1, "1", "x")]), "in a circle: 1 → 1"),
        (file_of([GOOD]) + "b,short\n", "line 3: not as many fields"),
        (file_of([GOOD]).replace("Is 1 so?", " "), "line 2: question_natural_language is empty"),
        (file_of([GOOD]) + '"b', "not CSV"),
    ],
)
def test_a_bad_file_is_told_what_is_wrong_and_where(text, said):
    with pytest.raises(InputError) as raised:
        read_questions(text, "f.csv")
    assert said in str(raised.value)
