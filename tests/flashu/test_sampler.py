"""The time grid, the noise and guidance, as formulas."""

import pytest
import torch

from flashu import InputError, sampler


def test_grid_runs_from_noise_to_image_and_lingers_at_the_noise():
    grid = sampler.time_grid(5, shift=3.0)
    assert grid.tolist() == pytest.approx([0, 0.1, 0.25, 0.5, 1])
    assert grid.dtype == torch.float32


def test_grid_without_shift_is_even():
    assert sampler.time_grid(5, shift=None).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_fewer_than_two_grid_points_are_refused(steps):
    with pytest.raises(InputError, match=f"num_inference_steps is {steps}.*at least 2"):
        sampler.time_grid(steps)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_time_shift_must_be_positive(shift):
    with pytest.raises(InputError, match="time_shift"):
        sampler.time_grid(5, shift)


def test_a_time_shift_that_leaves_no_time_between_steps_is_refused():
    with pytest.raises(InputError, match="time_shift is 1e-09, with which steps of 14 fall on one point"):
        sampler.time_grid(14, 1e-9)
    assert (sampler.time_grid(1000, 100.0).diff() > 0).all()


def test_noise_depends_on_the_seed_and_not_on_its_place():
    together = sampler.initial_noise([7, 8, 9], 16, 4, 6)
    alone = sampler.initial_noise([8], 16, 4, 6)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_guidance_extrapolates_from_the_unconditional_row():
    rows = torch.tensor([3.0, 5.0, 1.0, 1.0]).reshape(4, 1)
    assert sampler.guide(rows, 2.0, images=2).flatten().tolist() == [5.0, 9.0]


def test_without_unconditional_rows_there_is_no_guidance():
    velocity = torch.tensor([3.0, 5.0], dtype=torch.bfloat16).reshape(-1, 1)
    assert sampler.guide(velocity, 7.5, images=2).flatten().tolist() == [3.0, 5.0]
