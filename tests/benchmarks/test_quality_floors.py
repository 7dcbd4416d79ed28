"""What the embedded model draws, and answers, must not get worse: scores on a fixed part of shapes-bench, with floors.

The scores are those that `benchmarks/quality.py` measures, of the same prompts from the same seeds. The floors lie
a few points below what was measured, for other processors round otherwise.
"""

import pytest
from quality import Bench, whole_bench
from quality_measures import answers_right
from quality_settings import SETTINGS
from shapes import oracle

from flashu import TextToImagePipeline

PROMPTS = 30


@pytest.fixture(scope="module")
def bench():
    return Bench(TextToImagePipeline.from_pretrained("embedded", device="cpu"), batch_size=PROMPTS)


FLOORS = [("stock-8", 90, 74), ("embedded", 90, 74), ("few-steps", 90, 74)]  # single things, all sorts


@pytest.mark.parametrize(("setting", "single", "all_sorts"), FLOORS)
def test_pictures_follow_their_prompts(bench, setting, single, all_sorts):
    prompts = whole_bench()[:PROMPTS]
    pictures, _ = bench.draw(SETTINGS[setting], prompts)
    drawn = zip(prompts, pictures, strict=True)
    scores = [100 * item.score(oracle.answers(picture, item.propositions)) for item, picture in drawn]
    of_single = [score for item, score in zip(prompts, scores, strict=True) if item.sort == "single"]
    assert sum(of_single) / len(of_single) >= single
    assert sum(scores) / len(scores) >= all_sorts


def test_questions_about_renders_are_answered(bench):
    assert answers_right(bench.pipe, 60, 64, 60) >= 78
