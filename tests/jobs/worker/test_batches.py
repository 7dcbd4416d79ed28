"""From rows to batches: what is made together, and that every attempt makes the same."""

import random

import pytest

from jobs.worker.batches import Defaults, ImageRequest, batches_of, requests_of

DEFAULTS = Defaults(seed=0, num_images=1, guidance_scale=7.5, negative_prompt="blurry")


def request(item, tokens=10, guidance=7.5, index=0):
    return ImageRequest(item, {}, index, 0, "", "", guidance, tokens)


def items(batches):
    return [[request.item for request in batch] for batch in batches]


def test_prompts_of_similar_length_are_made_together():
    requests = [request(0, 90), request(1, 5), request(2, 88), request(3, 6), request(4, 7)]
    assert items(batches_of(requests, (), 3)) == [[1, 3, 4], [2, 0]]


def test_a_batch_has_one_guidance_scale():
    requests = [request(item, guidance=item % 3) for item in range(9)]
    batches = list(batches_of(requests, (), 8))
    assert items(batches) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_batches_follow_from_the_rows_and_not_from_their_order():
    rng = random.Random(0)
    requests = [
        request(item, rng.randint(1, 9), rng.choice([3, 7.5]), index) for item in range(30) for index in range(2)
    ]
    batches = list(batches_of(requests, (), 4))
    assert sorted(request.order for batch in batches for request in batch) == sorted(r.order for r in requests)
    for _ in range(5):
        rng.shuffle(requests)
        assert list(batches_of(requests, (), 4)) == batches


def test_rows_that_may_take_a_worker_down_come_last_and_each_by_itself():
    requests = [request(item, index=index) for item in range(4) for index in range(2)]
    assert items(batches_of(requests, {1, 2}, 8)) == [[0, 0, 3, 3], [1, 1], [2, 2]]
    assert items(batches_of(requests, {1}, 1)) == [[0], [0], [2], [2], [3], [3], [1], [1]]


def test_no_rows_make_no_batches():
    assert list(batches_of([], (), 8)) == []


def test_a_row_that_says_nothing_gets_the_defaults():
    (made,) = requests_of(5, {"prompt_id": "a", "prompt": "a fox", "seed": None}, DEFAULTS, len)
    assert (made.item, made.index, made.prompt, made.negative_prompt) == (5, 0, "a fox", "blurry")
    assert (made.guidance_scale, made.tokens) == (7.5, 6)  # blurry is the longer


def test_a_rows_own_values_go_before_the_defaults_even_if_they_are_nothing():
    row = {
        "prompt_id": "a",
        "prompt": "a fox",
        "seed": 0,
        "num_images": 3,
        "guidance_scale": 0.0,
        "negative_prompt": "",
    }
    made = requests_of(0, row, DEFAULTS, len)
    assert [(one.index, one.seed) for one in made] == [(0, 0), (1, 1), (2, 2)]
    assert {(one.guidance_scale, one.negative_prompt) for one in made} == {(0.0, "")}


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_no_batch_is_larger_than_it_may_be(batch_size):
    batches = list(batches_of([request(item) for item in range(20)], (), batch_size))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert sum(map(len, batches)) == 20
