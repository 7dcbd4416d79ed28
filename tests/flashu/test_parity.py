"""Against the published code's own numbers: every tensor of stock Show-o2 and of the Wan VAE, in float32.

Other reference folders: `pytest tests/flashu/test_parity.py --golden DIR`, repeatable. Tolerances are those of
tests/golden/README.md, as shares of a tensor's largest magnitude.
"""

import pytest
import torch

from flashu import sampler
from tests.golden import GoldenModel, load_vae, relative_error

EVALUATION = 1e-4
TRAJECTORY = 1e-3


@pytest.fixture(scope="module")
def golden(golden_model):
    with torch.no_grad():
        yield GoldenModel(golden_model)


@pytest.fixture(scope="module")
def step(golden):
    """The time and the prefix of the one evaluation that the references describe."""
    with torch.no_grad():
        return golden.model.embed_times(golden.expected["step_t"]).at(0), golden.prefix()


def test_rows_are_laid_out_as_the_reference_has_them(golden):
    for rows, suffix in ((golden.rows, ""), (golden.null_rows, "_null")):
        tokens = golden.expected[f"text_tokens{suffix}"]
        spans = golden.expected[f"modality_positions{suffix}"]
        for row, reference, (offset, length) in zip(rows, tokens, spans[:, 0].tolist(), strict=True):
            assert reference[:offset].tolist() == row
            assert length == 1 + golden.grid[0] * golden.grid[1]


@torch.no_grad()
def test_image_path(golden):
    model, noise, expected = golden.model, golden.expected["noise"], golden.expected
    semantic = model.image_embedder_und(noise)
    positions = model.semantic_positions(golden.grid)
    assert relative_error(semantic, expected["image_embed_und_patch"]) < EVALUATION
    assert relative_error(model.image_embedder_gen(noise), expected["image_embed_gen_patch"]) < EVALUATION
    assert relative_error(model.und_trans(semantic + positions), expected["und_trans_out"]) < EVALUATION
    assert relative_error(model.embed_images(noise, positions), expected["image_embeds"]) < EVALUATION


@torch.no_grad()
def test_time_embedding(golden):
    embeds = golden.model.time_embed(golden.expected["step_t"])
    assert relative_error(embeds, golden.expected["time_embeds"]) < EVALUATION


@torch.no_grad()
def test_one_evaluation(golden, step):
    conditional, unconditional = golden.model.velocity(golden.expected["noise"], *step).chunk(2)
    assert relative_error(conditional, golden.expected["step_velocity_cond"]) < EVALUATION
    assert relative_error(unconditional, golden.expected["step_velocity_uncond"]) < EVALUATION


@torch.no_grad()
def test_logits_over_the_image_span(golden, step):
    hidden = golden.model.run_llm(golden.expected["noise"], *step)
    logits = golden.model.showo.lm_head(hidden[0])
    assert relative_error(logits, golden.expected["step_logits_cond_image0"]) < EVALUATION


def test_every_grid_point_of_a_guided_trajectory(golden):
    expected = golden.expected["sample_base_trajectory"]
    states = list(_sample(golden))
    assert len(states) == len(expected)
    for state, reference in zip(states, expected, strict=True):
        assert relative_error(state, reference) < TRAJECTORY


def test_sampling_without_time_shift(golden):
    assert relative_error(_last(golden, shift=None), golden.expected["sample_noshift_final"]) < TRAJECTORY


def test_sampling_without_guidance_takes_one_row(golden):
    assert relative_error(_last(golden, guidance=0.0), golden.expected["sample_nocfg_final"]) < TRAJECTORY


def _sample(golden, **overrides):
    settings = {"shift": golden.meta["time_shifting_factor"], "guidance": golden.meta["guidance_scale"], **overrides}
    prefix = golden.prefix(guided=sampler.needs_unconditional(settings["guidance"]))
    grid = sampler.time_grid(golden.meta["num_inference_steps"], settings["shift"])
    return sampler.trajectory(golden.model, golden.expected["noise"], prefix, grid, settings["guidance"])


def _last(golden, **overrides):
    *_, last = _sample(golden, **overrides)
    return last


@torch.no_grad()
def test_vae_decodes(golden_vae):
    vae, expected = load_vae(golden_vae)
    assert relative_error(vae.decode(expected["latents"]), expected["decoded"]) < EVALUATION


@torch.no_grad()
def test_vae_encodes(golden_vae):
    vae, expected = load_vae(golden_vae)
    mean, log_variance = vae.encode(expected["image"])
    assert relative_error(mean, expected["encoded_mean"]) < EVALUATION
    assert relative_error(log_variance, expected["encoded_logvar"]) < EVALUATION
