"""How many images fit at once, and which batch sizes a user may ask for."""

import pytest
import torch

from flashu.config import BATCH_SIZE
from flashu.errors import InputError
from jobs.batch_size import LARGEST, check_batch_size, choose_batch_size, fitting

GB = 10**9


@pytest.mark.parametrize(
    ("one", "two", "available", "images"),
    [
        (10, 12, 20, 6),  # 10 for the first, 2 for each of five more
        (10, 12, 21.9, 6),
        (10, 12, 22, 7),
        (10, 12, 11, 1),
        (10, 12, 10, 1),
        (10, 12, 5, 1),  # too little even for one: that one will say so
        (10, 10, 12, LARGEST),  # a second image cost nothing
        (10, 9, 12, LARGEST),
        (1, 1.01, 1000, LARGEST),
    ],
)
def test_what_fits_follows_from_what_one_and_two_images_take(one, two, available, images):
    assert fitting(one * GB, two * GB, available * GB) == images


def test_without_cuda_nothing_is_tried():
    def generate(prompts):
        raise AssertionError("generated")

    assert choose_batch_size("auto", torch.device("cpu"), generate) == BATCH_SIZE
    assert choose_batch_size(3, torch.device("cpu"), generate) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_memory_of_one_more_image_is_measured():
    held = torch.cuda.mem_get_info()[1] // 20

    def generate(prompts):
        torch.empty(held * (1 + len(prompts)), dtype=torch.uint8, device="cuda")

    assert 10 <= choose_batch_size("auto", torch.device("cuda"), generate) <= 18


@pytest.mark.parametrize("value", [1, 64, 1000, "auto"])
def test_a_number_or_auto_is_a_batch_size(value):
    check_batch_size(value)


@pytest.mark.parametrize("value", ["many", "8", 0, -1, 2.5, True, None, [8]])
def test_anything_else_is_none(value):
    with pytest.raises(InputError, match=r"sampling.batch_size is .*; it must be a whole number, at least 1, or auto"):
        check_batch_size(value)
