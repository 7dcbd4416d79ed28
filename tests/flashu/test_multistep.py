"""The solver of order 2: as arithmetic, as a loop written out by hand, and what it is for."""

from dataclasses import replace

import pytest
import torch

from flashu import FLASHU_PRESETS, TextToImagePipeline, sampler
from flashu.acceleration import multistep
from flashu.acceleration.plan import make_plan
from flashu.models.presets import PRESETS
from tests.bounds import TRAJECTORY
from tests.reference import relative_error

GRID = PRESETS["embedded"].native_grid
PROMPTS = ("a red circle", "two small blue squares to the left of a large green triangle")
GUIDANCE = 2.5
SECOND_ORDER = replace(FLASHU_PRESETS["off"], solver_order=2)


@pytest.fixture(scope="module")
def model_and_rows():
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    texts = [pipe.tokenizer.encode_prompt(text, 100) for text in (*PROMPTS, "", "")]
    return pipe.model, sampler.PromptTokens([text.prefix for text in texts], [text.suffix for text in texts], GRID)


def run(model, rows, steps, config=None):
    """Latents at every grid point of a run from two fixed seeds."""
    noise = sampler.initial_noise([0, 1], 8, 8, 8)
    return list(sampler.trajectory(model, noise, rows, sampler.time_grid(steps), make_plan(config, steps, GUIDANCE)))


def test_a_velocity_that_changes_evenly_is_integrated_exactly():
    """dx/dt = 1 - 6t, over intervals of any length."""
    velocity = lambda t: torch.tensor(1 - 6 * t)  # noqa: E731
    before, now, then = 0.1, 0.25, 0.7
    mean = multistep.continued(velocity(now), velocity(before), multistep.share(then - now, now - before))
    assert (then - now) * mean.item() == pytest.approx((then - 3 * then**2) - (now - 3 * now**2))


@torch.no_grad()
def test_a_run_equals_the_rule_written_out(model_and_rows):
    """Adams-Bashforth's weights of the last two velocities, first and last step Euler's."""
    model, rows = model_and_rows
    points = sampler.time_grid(6)
    times, prefix = model.embed_times(points[:-1]), model.encode_prefix(rows.prefixes, GRID, guided=True)
    states, velocities = [sampler.initial_noise([0, 1], 8, 8, 8)], []
    t = points.tolist()
    for step in range(5):
        conditional, unconditional = model.velocity(states[-1], times.at(step), prefix).chunk(2)
        velocities.append(unconditional + GUIDANCE * (conditional - unconditional))
        now, before = t[step + 1] - t[step], t[step] - t[step - 1]
        if step in (0, 4):
            states.append(states[-1] + now * velocities[-1])
        else:
            weights = 1 + now / (2 * before), -now / (2 * before)
            states.append(states[-1] + now * (weights[0] * velocities[-1] + weights[1] * velocities[-2]))
    for ours, expected in zip(run(model, rows, 6, SECOND_ORDER), states, strict=True):
        assert relative_error(ours, expected) < TRAJECTORY


def test_ten_grid_points_end_nearer_to_thirty_than_twenty_of_euler(model_and_rows):
    *_, reference = run(*model_and_rows, 30)
    *_, few = run(*model_and_rows, 10, SECOND_ORDER)
    *_, euler = run(*model_and_rows, 20)
    assert (few - reference).norm() < (euler - reference).norm()
