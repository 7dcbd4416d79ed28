"""`flashu ask`: what it prints, and how it refuses, before any model is loaded."""

import pytest
from PIL import Image

from flashu import TextToImagePipeline
from tests.command import assert_refused, flashu

QUESTIONS = ("Is there a red circle?", "What colour is the background?")


@pytest.fixture(autouse=True)
def picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = Image.new("RGB", (96, 64), "white")
    image.paste("red", (10, 10, 50, 50))
    image.save("picture.png")
    return image


def ask(*arguments):
    return flashu("ask", "picture.png", *arguments, "--device", "cpu")


def test_an_answer_a_line_in_the_order_of_the_questions(picture):
    outcome = ask(*QUESTIONS)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == TextToImagePipeline.from_pretrained("embedded").answer(picture, list(QUESTIONS))


def test_yes_or_no_comes_with_its_probability(picture):
    answer, probability = ask(QUESTIONS[0], "--yes-no").out.split()
    expected = TextToImagePipeline.from_pretrained("embedded").yes_probability(picture, QUESTIONS[0])
    assert float(probability) == pytest.approx(expected, abs=1e-3)
    assert answer == ("yes" if expected > 0.5 else "no")


def test_drawn_answers_repeat_with_their_seed():
    drawn = [ask("Describe the picture.", "--temperature", 2, "--seed", seed).out for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_letterbox_shows_the_model_another_picture():
    whole, cut = (ask(QUESTIONS[0], "--yes-no", *more).out for more in (("--letterbox",), ()))
    assert whole != cut


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("ask", "none.png", "What?"), "none.png: there is no such file"),
        (("ask", __file__, "What?"), "cannot be read as an image"),
        (("ask", "picture.png", " "), "a question is empty"),
        (("ask", "picture.png", "What?", "--top-p", 2), "top_p is 2.0"),
        (("ask", "picture.png", "What?", "--top-k", 0), "top_k is 0"),
        (("ask", "picture.png", "What?", "--temperature", "nan"), "temperature is nan"),
        (("ask", "picture.png", "What?", "--seed", -1), "seeds holds -1"),
        (("ask", "picture.png", "What?", "--size", 100), "each side must be a multiple of 16"),
        (("ask", "picture.png", "What?", "--model", "nowhere/at-all"), "nowhere/at-all"),
        (("ask", "picture.png", "What? " * 100), "tokens, with what frames it, is longer than"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, told):
    assert_refused(flashu(*arguments), told)
