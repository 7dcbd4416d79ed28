"""The operation count: that remembering repeated blocks does not change it, and what each technique takes off."""

from dataclasses import replace

import pytest
import torch
from random_weights import random_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashu import FLASHU_PRESETS, FlashUConfig, InputError, Showo2Qwen2_5, WandaScores, apply_flashu_patch, sampler
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.plan import make_plan
from flashu.fingerprint import fingerprint
from flashu.flops import count_image
from flashu.models.presets import PRESETS, VAE_PRESETS

EIGHT = replace(FLASHU_PRESETS["off"], num_inference_steps=8)
SETTINGS = FlashUConfig(r_p=0.3, r_LS=0.3, T_LS=3, T_cache=2, tau=2, schedule=[(2, 3.0), (2, 1.0), (4, 6.0)])
CONFIG = PRESETS["embedded"]


def count(settings, steps, model="embedded"):
    config = PRESETS[model]
    plan = Acceleration.of(settings, config.llm).plan(steps, 7.5) if settings else make_plan(None, steps, 7.5)
    return count_image(config, VAE_PRESETS[model], plan, config.native_grid, 10)


@torch.no_grad()
def test_count_equals_that_of_a_real_run():
    """Every operation of a run with real weights on the CPU, nothing remembered, nothing multiplied."""
    model = random_model(Showo2Qwen2_5, CONFIG, 0)
    llm = CONFIG.llm
    ones = ([torch.ones(width)] * llm.num_hidden_layers for width in (llm.intermediate_size, llm.hidden_size))
    apply_flashu_patch(model, SETTINGS, scores=WandaScores(*ones, fingerprint(model)))
    limit, grid = CONFIG.max_text_tokens(16), CONFIG.native_grid
    rows = sampler.PromptTokens([[0] * 10, [0, 0]], [[0] * (4 + limit - 10), [0] * (2 + limit)], grid)
    states = sampler.trajectory(
        model,
        torch.zeros(1, CONFIG.image_latent_dim, 8, 8),
        rows,
        sampler.time_grid(8),
        model.acceleration.plan(8, 7.5),
    )
    # The counter knows the matrix products of attention, but not the fused operation that a CPU would run for them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        list(states)
    counted = count(SETTINGS, 8)
    assert counter.get_total_flops() == sum(counted.steps)


def test_parts_and_rows_add_up():
    counted = count(SETTINGS, 8)
    assert len(counted.steps) == 7
    assert sum(counted.steps) + counted.parts["VAE decode"] == counted.total


@pytest.fixture(scope="module")
def stock():
    return count(None, 8, "show-o2-1.5b")


@pytest.mark.parametrize(
    ("settings", "less", "same"),
    [
        ({"r_p": 0.3}, "LLM", ["head", "image path"]),
        ({"r_LS": 0.3, "T_LS": 8}, "LLM", ["head", "image path"]),
        ({"head_prune_ratio": 0.5}, "LLM", ["head", "image path"]),
        ({"T_cache": 3}, "head", []),
    ],
)
def test_each_technique_saves_where_it_says(stock, settings, less, same):
    saved = count(replace(EIGHT, **settings), 8, "show-o2-1.5b")
    assert saved.parts[less] < 0.95 * stock.parts[less]
    for part in same:
        assert saved.parts[part] == stock.parts[part]


def test_steps_without_guidance_run_the_conditional_rows_only():
    """Each as in a run without any guidance; the text of both rows is run once, by the first step."""
    guided, alone = (count(replace(EIGHT, schedule=[(8, scale)]), 8, "show-o2-1.5b").steps for scale in (5.0, 1.0))
    settings = replace(EIGHT, schedule=[(2, 1.0), (3, 5.0), (3, 1.0)])
    assert count(settings, 8, "show-o2-1.5b").steps[1:] == (alone[1], *guided[2:5], *alone[5:])
    settings = replace(EIGHT, schedule=[(3, 5.0), (5, 1.0)])
    assert count(settings, 8, "show-o2-1.5b").steps == (*guided[:3], *alone[3:])
    assert alone[1] < 0.6 * guided[1]


def test_a_variant_that_no_guided_step_runs_reads_no_empty_prompt():
    """Pruned steps without guidance, then whole ones with it: the pruned LLM never runs the unconditional text."""
    settings = replace(EIGHT, r_p=0.3, tau=4, schedule=[(4, 1.0), (4, 5.0)])
    alone = replace(settings, schedule=[(8, 1.0)])
    assert count(settings, 8).steps[:4] == count(alone, 8).steps[:4]


@pytest.mark.parametrize("prefix", [0, 1, 1000])
def test_a_prompt_that_cannot_be_is_not_counted(prefix):
    with pytest.raises(InputError, match=f"a prefix of {prefix} tokens"):
        count_image(CONFIG, VAE_PRESETS["embedded"], make_plan(None, 3, 7.5), CONFIG.native_grid, prefix)
