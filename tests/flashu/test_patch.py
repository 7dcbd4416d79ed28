"""Switching FlashU on and off: what it may change, what it must not, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_weights import random_model

from flashu import (
    FLASHU_PRESETS,
    FlashUConfig,
    InputError,
    Showo2Qwen2_5,
    TextToImagePipeline,
    WandaScores,
    apply_flashu_patch,
    calibrate,
    remove_flashu_patch,
    sampler,
)
from flashu.acceleration import kv_pruning, layer_skipping
from flashu.acceleration.plan import make_plan
from flashu.fingerprint import fingerprint
from flashu.models.blocks import Blocks
from flashu.models.presets import PRESETS
from flashu.models.qwen2 import Subnetwork
from tests.bounds import EVALUATION, LEVEL, TRAJECTORY
from tests.reference import relative_error

OFF = FLASHU_PRESETS["off"]
GRID = PRESETS["embedded"].native_grid
SETTINGS = FlashUConfig(r_p=0.3, r_LS=0.3, T_LS=3, T_cache=2, tau=2, schedule=[(4, 3.0), (4, 6.0)])
PROMPTS = ["a red circle", "two small blue squares to the left of a large green triangle", ""]


@pytest.fixture(scope="module")
def pipe():
    return TextToImagePipeline.from_pretrained("embedded", device="cpu")


@pytest.fixture(scope="module")
def scores(pipe):
    return calibrate(pipe.model, PROMPTS[:2], tokenizer=pipe.tokenizer, num_inference_steps=3)


@pytest.fixture(autouse=True)
def unpatched(pipe):
    yield
    remove_flashu_patch(pipe.model)


def pixels(pictures):
    return np.stack([np.asarray(picture).astype(int) for picture in pictures])


def test_removing_restores_every_weight_and_output_bit_for_bit(pipe, scores):
    weights = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    before = pixels(pipe(PROMPTS, seeds=0, num_inference_steps=5))
    settings = replace(SETTINGS, head_prune_ratio=0.5)
    apply_flashu_patch(pipe.model, settings, scores=scores)
    apply_flashu_patch(pipe.model, SETTINGS, scores=scores)  # replaces
    changed = pixels(pipe(PROMPTS, seeds=0, num_inference_steps=5))
    remove_flashu_patch(pipe.model)
    assert all(torch.equal(value, weights[name]) for name, value in pipe.model.state_dict().items())
    assert (pixels(pipe(PROMPTS, seeds=0, num_inference_steps=5)) == before).all()
    assert (changed != before).any()


def test_removing_nothing_is_allowed(pipe):
    assert remove_flashu_patch(pipe.model) is pipe.model


def test_repr_tells_what_is_on(pipe, scores):
    assert "FlashU" not in repr(pipe.model)
    apply_flashu_patch(pipe.model, SETTINGS, scores=scores)
    assert "FlashU: FFN pruning r_p=0.3; layer skipping r_LS=0.3 every T_LS=3; head cache T_cache=2" in repr(pipe.model)


@pytest.mark.parametrize(
    "nothing",
    [
        {"r_p": 0.0},
        {"r_LS": 0.0, "T_LS": 3},
        {"r_LS": 0.05, "T_LS": 3},  # too little to skip one of ten layers
        {"T_cache": 1},
        {"tau": 9},
        {"head_prune_ratio": 0.4},  # too little to leave out one of two groups
        {"schedule": [(8, 2.5)]},
    ],
    ids=str,
)
def test_a_technique_set_to_nothing_changes_nothing(pipe, nothing):
    before = pixels(pipe(PROMPTS, seeds=0, num_inference_steps=9))
    apply_flashu_patch(pipe.model, replace(OFF, num_inference_steps=9, **nothing))
    assert (pixels(pipe(PROMPTS, seeds=0)) == before).all()


def test_patched_model_takes_its_steps_from_the_settings(pipe, scores):
    apply_flashu_patch(pipe.model, SETTINGS, scores=scores)
    (picture,) = pipe("x", seeds=0)
    assert picture.info["num_inference_steps"] == 8
    assert picture.info["flashu"].startswith("FFN pruning r_p=0.3")


def test_a_picture_is_the_same_alone_and_in_a_batch(pipe, scores):
    apply_flashu_patch(pipe.model, SETTINGS, scores=scores)
    together = pixels(pipe(PROMPTS, seeds=0, batch_size=3))
    for index, prompt in enumerate(PROMPTS):
        alone = pixels(pipe(prompt, seeds=index))
        assert np.abs(alone[0] - together[index]).max() <= LEVEL


def test_prompts_that_skip_different_layers_each_get_their_own(pipe, scores, monkeypatch):
    """Each image of the batch is what it is when every image skips that image's layers."""
    apply_flashu_patch(pipe.model, SETTINGS, scores=scores)
    sets = ((0, 4, 9), (2, 3, 4), (5, 6, 7))
    everyone = lambda chosen: lambda importances, count: tuple(chosen)[: len(importances)]  # noqa: E731
    monkeypatch.setattr(layer_skipping, "least_important", everyone(sets))
    mixed = pixels(pipe(PROMPTS, seeds=0, batch_size=3))
    for index, prompt in enumerate(PROMPTS):
        monkeypatch.setattr(layer_skipping, "least_important", everyone([sets[index]]))
        alone = pixels(pipe(prompt, seeds=index))
        assert np.abs(alone[0] - mixed[index]).max() <= LEVEL


@pytest.mark.parametrize("negative", ["", ["blurry", "", "a dark picture of many things"]], ids=["one", "several"])
def test_laid_out_as_a_compiler_wants_it_a_batch_makes_the_same_pictures(pipe, scores, monkeypatch, negative):
    """Padded otherwise, and with the only image that runs a layer there twice; guided, unguided, and measured."""
    phases = replace(SETTINGS, schedule=((4, 3.0), (2, 1.0), (2, 6.0)))
    apply_flashu_patch(pipe.model, phases, scores=scores)
    monkeypatch.setattr(layer_skipping, "least_important", lambda importances, count: ((0, 4, 9), (0, 4, 9), (1, 2, 3)))
    plain = pixels(pipe(PROMPTS, seeds=0, batch_size=3, negative_prompts=negative))
    pipe.blocks = Blocks.through(lambda block: block)
    try:
        padded = pixels(pipe(PROMPTS, seeds=0, batch_size=3, negative_prompts=negative))
    finally:
        pipe.compile("off")
    assert np.abs(plain - padded).max() <= LEVEL


@torch.no_grad()
def test_a_schedule_whose_first_phase_is_unguided(pipe):
    """Scale 1 for four steps, then 5: as if the run had been cut there and gone on guided from its latents."""
    model = pipe.model
    texts = [pipe.tokenizer.encode_prompt(text, 100) for text in (PROMPTS[0], "")]
    rows = sampler.PromptTokens([text.prefix for text in texts], [text.suffix for text in texts], GRID)
    noise, points = sampler.initial_noise([0], 8, 8, 8), sampler.time_grid(8)
    config = replace(OFF, schedule=((4, 1.0), (4, 5.0)), num_inference_steps=None)
    *_, mixed = sampler.trajectory(model, noise, rows, points, make_plan(config, 8, 7.5))

    alone = sampler.PromptTokens(rows.prefixes[:1], rows.suffixes[:1], rows.grid)
    middle = list(sampler.trajectory(model, noise, alone, points, make_plan(None, 8, 1.0)))[4]
    *_, guided = sampler.trajectory(model, middle, rows, points[4:], make_plan(None, 4, 5.0))
    assert relative_error(mixed, guided) < TRAJECTORY


def test_no_text_is_read_for_skip_sets_that_the_next_measurement_replaces(pipe, monkeypatch):
    """Unguided steps that skip layers, then guided ones that do, and between them a measurement."""
    read, original = [], Showo2Qwen2_5.read_text

    def read_text(model, text, subnetwork, *others):
        read.append((len(text.lengths), subnetwork.running_rows is not None))
        return original(model, text, subnetwork, *others)

    monkeypatch.setattr(Showo2Qwen2_5, "read_text", read_text)
    config = replace(OFF, r_LS=0.3, T_LS=4, tau=1, schedule=((4, 1.0), (7, 5.0)), num_inference_steps=None)
    apply_flashu_patch(pipe.model, config)
    try:
        pipe(PROMPTS[0], seeds=0)
    finally:
        remove_flashu_patch(pipe.model)
    skipping = [rows for rows, skips in read if skips]
    assert skipping[:2] == [1, 2]
    assert set(skipping[2:]) <= {2}


@torch.no_grad()
@pytest.mark.parametrize("skipped", [((0, 4, 9), (2, 4, 5)), ((3, 4), (3, 4)), ((), ())], ids=str)
def test_conditional_rows_of_a_prefix_are_what_those_rows_alone_would_be(pipe, skipped):
    """Texts of two lengths, layers that some, all or none of the images skip; velocities and measurements."""
    model = pipe.model
    texts = [pipe.tokenizer.encode_prompt(text, 20) for text in (PROMPTS[0], PROMPTS[1], "", "")]
    layers = len(model.showo.model.layers)
    both, one = (
        Subnetwork(((0, 128),) * layers, None, layer_skipping.rows_that_run(skipped, layers, count, model.device))
        for count in (2, 1)
    )
    suffixes = [text.suffix for text in texts] if not any(skipped) else None
    whole = model.encode_prefix([text.prefix for text in texts], GRID, both, suffixes)
    alone = model.encode_prefix([text.prefix for text in texts[:2]], GRID, one, suffixes and suffixes[:2])
    first, time = whole.conditional(one), model.embed_times(torch.tensor([0.3])).at(0)
    noise = sampler.initial_noise([0, 1], 8, 8, 8)
    assert relative_error(model.velocity(noise, time, first), model.velocity(noise, time, alone)) < EVALUATION
    if suffixes:
        measured = [model.measure_llm(noise, time, prefix)[1] for prefix in (first, alone)]
        assert relative_error(*measured) < EVALUATION


def test_phases_without_guidance_leave_an_image_independent_of_its_batch(pipe, scores):
    """With everything on: pruning, layers measured with and without guidance, a store that both kinds of step reuse."""
    schedule = [(1, 1.0), (4, 3.0), (3, 1.0), (4, 4.0)]
    settings = replace(SETTINGS, T_cache=3, schedule=schedule, solver_order=2)
    apply_flashu_patch(pipe.model, settings, scores=scores)
    together = pixels(pipe(PROMPTS, seeds=0, batch_size=3))
    for index, prompt in enumerate(PROMPTS):
        assert np.abs(pixels(pipe(prompt, seeds=index))[0] - together[index]).max() <= LEVEL


def test_pruned_groups_take_their_biases_along(pipe, scores):
    """Half the KV groups: as if the others' values were zero, biases included."""
    model = random_model(Showo2Qwen2_5, PRESETS["embedded"], 0)
    generator = torch.Generator().manual_seed(1)
    for layer in model.showo.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.bias.data.normal_(generator=generator)
    own = replace(scores, fingerprint=fingerprint(model))
    settings = replace(OFF, head_prune_ratio=0.5, num_inference_steps=4)
    rows = sampler.PromptTokens([[1, 2, 3], [1, 3]], [[4, 5], [4, 5, 6]], GRID)
    noise, points = sampler.initial_noise([0], 8, 8, 8), sampler.time_grid(4)

    apply_flashu_patch(model, settings, scores=own)
    assert model.acceleration.kv_heads == 1
    *_, pruned = sampler.trajectory(model, noise, rows, points, model.acceleration.plan(4, 5.0))
    remove_flashu_patch(model)
    for layer, layer_scores in zip(model.showo.model.layers, own.attention, strict=True):
        lost = kv_pruning.group_scores(layer_scores, 2).argmin()
        layer.self_attn.o_proj.weight.data.unflatten(1, (2, -1))[:, lost] = 0
    *_, zeroed = sampler.trajectory(model, noise, rows, points, make_plan(None, 4, 5.0))
    assert relative_error(pruned, zeroed) < TRAJECTORY


def test_scores_survive_a_file_and_number_formats(pipe, scores, tmp_path):
    scores.save(tmp_path / "scores.safetensors")
    loaded = WandaScores.load(tmp_path / "scores.safetensors")
    assert all(torch.equal(*pair) for pair in zip(scores.ffn, loaded.ffn, strict=True))
    low = Showo2Qwen2_5.from_pretrained("embedded", dtype="bfloat16")
    apply_flashu_patch(low, SETTINGS, scores=tmp_path / "scores.safetensors")
    assert low.acceleration.ffn_width == 192


def test_scores_of_another_model_are_refused(scores):
    other = random_model(Showo2Qwen2_5, PRESETS["embedded"], seed=1)
    with pytest.raises(InputError, match="measured on another model"):
        apply_flashu_patch(other, SETTINGS, scores=scores)
    assert other.acceleration is None


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_file_that_holds_no_scores_is_refused(pipe, tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match="not a file of Wanda scores"):
        apply_flashu_patch(pipe.model, SETTINGS, scores=tmp_path / "x")


def test_unknown_presets_are_refused_with_those_there_are(pipe):
    with pytest.raises(InputError, match=r"no FlashU preset 'warp'; there are: paper-1\.5b"):
        apply_flashu_patch(pipe.model, "warp")


def test_saving_a_patched_model_saves_the_original_weights(pipe, scores, tmp_path):
    apply_flashu_patch(pipe.model, SETTINGS, scores=scores)
    pipe.model.save_pretrained(tmp_path / "saved")
    assert pipe.model.acceleration is not None
    remove_flashu_patch(pipe.model)
    saved = Showo2Qwen2_5.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, pipe.model.state_dict()[name]) for name, value in saved.state_dict().items())


def test_calibration_methods_differ_and_both_score_every_neuron(pipe):
    options = {"prompts": PROMPTS[:1], "tokenizer": pipe.tokenizer, "num_inference_steps": 3}
    real, tokens = (calibrate(pipe.model, method=method, **options) for method in ("trajectories", "tokens"))
    for scored in (real, tokens):
        assert [len(layer) for layer in scored.ffn] == [320] * 10
        assert all((layer > 0).all() for layer in scored.ffn)
    assert not torch.allclose(real.ffn[0], tokens.ffn[0], rtol=0.1)


@pytest.mark.parametrize(
    ("options", "message"), [({"method": "guess"}, "no calibration method 'guess'"), ({"prompts": []}, "at least one")]
)
def test_calibration_refuses_what_it_cannot_do(pipe, options, message):
    with pytest.raises(InputError, match=message):
        calibrate(pipe.model, tokenizer=pipe.tokenizer, **options)


def test_scores_of_another_task_are_refused(pipe, scores):
    with pytest.raises(InputError, match="measured for understanding; generation is pruned by scores for generation"):
        apply_flashu_patch(pipe.model, SETTINGS, scores=replace(scores, task="understanding"))


def test_a_refused_patch_leaves_the_one_before(pipe, scores):
    apply_flashu_patch(pipe.model, SETTINGS, scores=scores)
    before = pixels(pipe("x", seeds=0))
    with pytest.raises(InputError, match="another model"):
        apply_flashu_patch(pipe.model, "fast", scores=replace(scores, fingerprint="other"))
    assert (pixels(pipe("x", seeds=0)) == before).all()


def test_switching_off_between_two_batches_of_one_call_is_refused(pipe, scores):
    apply_flashu_patch(pipe.model, SETTINGS, scores=scores)
    pictures = pipe.stream(PROMPTS, seeds=0, batch_size=1)
    next(pictures)
    remove_flashu_patch(pipe.model)
    with pytest.raises(RuntimeError, match="switched on or off between two batches"):
        next(pictures)


def test_accelerated_bfloat16_stays_close_to_float32(pipe, scores):
    low = TextToImagePipeline.from_pretrained("embedded", dtype="bfloat16", device="cpu")
    exact, rounded = (
        pixels(apply_flashu_patch(each.model, SETTINGS, scores=scores) and each(PROMPTS, seeds=0))
        for each in (pipe, low)
    )
    assert 10 * np.log10(255**2 / np.mean((exact - rounded) ** 2)) > 25
