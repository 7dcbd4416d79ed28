"""Against the published code's own numbers: stock Show-o2, every FlashU run, and the Wan VAE, in float32.

Other reference folders: `pytest tests/flashu/test_parity.py --golden DIR`, repeatable. Tolerances are those of
tests/golden/README.md, as shares of a tensor's largest magnitude.
"""

import json

import pytest
import torch

from flashu import FlashUConfig, apply_flashu_patch, conversation, question_rows, sampler
from flashu.acceleration import layer_skipping
from flashu.acceleration.plan import make_plan
from flashu.acceleration.wanda import ActivationNorms
from flashu.calibration import watch_token_row
from flashu.models.patches import patchify
from flashu.tokenizer import EncodedQuestion
from tests.bounds import EVALUATION, TRAJECTORY
from tests.conftest import golden_folders
from tests.reference import GoldenModel, load_vae, relative_error


@pytest.fixture(scope="module")
def golden(golden_model):
    return GoldenModel(golden_model)


@pytest.fixture(scope="module")
def step(golden):
    """The time and the prefix of the one evaluation that the references describe."""
    with torch.no_grad():
        return golden.model.embed_times(golden.expected["step_t"]).at(0), golden.prefix()


def test_rows_are_laid_out_as_the_reference_has_them(golden):
    rows = golden.prompt_tokens(range(len(golden.rows)))
    tokens, spans = (
        torch.cat((golden.expected[name], golden.expected[f"{name}_null"]))
        for name in ("text_tokens", "modality_positions")
    )
    for prefix, suffix, row, (offset, length) in zip(
        rows.prefixes, rows.suffixes, tokens.tolist(), spans[:, 0].tolist(), strict=True
    ):
        assert row[:offset] == list(prefix)
        assert length == 1 + golden.grid[0] * golden.grid[1]
        assert row[offset + length :] == list(suffix)


@torch.no_grad()
def test_image_path(golden):
    model, noise, expected = golden.model, golden.expected["noise"], golden.expected
    patches = patchify(noise)
    semantic = model.image_embedder_und(patches)
    positions = model.semantic_positions(golden.grid)
    assert relative_error(semantic, expected["image_embed_und_patch"]) < EVALUATION
    assert relative_error(model.image_embedder_gen(patches), expected["image_embed_gen_patch"]) < EVALUATION
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
    plan = make_plan(None, golden.meta["num_inference_steps"], settings["guidance"])
    rows = golden.prompt_tokens(range(len(golden.rows)), plan.guided)
    points = sampler.time_grid(plan.num_inference_steps, settings["shift"])
    return sampler.trajectory(golden.model, golden.expected["noise"], rows, points, plan)


def _last(golden, **overrides):
    *_, last = _sample(golden, **overrides)
    return last


@torch.no_grad()
def test_wanda_scores_from_token_rows(golden):
    norms = ActivationNorms(golden.model.showo.model)
    for prompt in range(len(golden.rows)):
        watch_token_row(golden.model, golden.prompt_tokens([prompt]), golden.meta["token_ids"]["img_pad"], norms)
    expected = golden.scores()
    for ours, theirs in zip(norms.scores(), (expected.ffn, expected.attention), strict=True):
        for layer, reference in zip(ours, theirs, strict=True):
            assert relative_error(layer, reference) < EVALUATION


@pytest.fixture(scope="module")
def question(golden):
    ids, mmu = golden.meta["token_ids"], golden.meta["mmu"]
    return EncodedQuestion(
        before=[ids["bos"], *mmu["system_ids"], *mmu["role_user_ids"], ids["boi"]],
        after=[ids["eoi"], *mmu["question_ids"], *mmu["role_assistant_ids"]],
    )


@torch.no_grad()
def test_understanding_prefill(golden, question):
    row = question_rows.lay_out(golden.model, golden.expected["noise"][:1], [question])
    logits = golden.model.showo.lm_head(question_rows.prefill(golden.model, row)[:, -1])
    assert relative_error(logits, golden.expected["mmu_prefill_last_logits"]) < EVALUATION


def test_answer_with_the_image_read_once(golden, question):
    images = conversation.read_images(golden.model, golden.expected["noise"][:1], question)
    (logits,) = conversation.first_logits(golden.model, images, [[question]])
    assert relative_error(logits, golden.expected["mmu_prefill_last_logits"]) < EVALUATION
    expected = golden.expected["mmu_greedy_tokens"].flatten().tolist()
    never = -1  # the reference stops after so many tokens, whatever they are
    ((tokens,),) = conversation.generate(golden.model, images, [[question]], len(expected), never, conversation.greedy)
    assert tokens == expected


def pytest_generate_tests(metafunc):
    if "flashu_run" in metafunc.fixturenames:
        runs = [
            pytest.param(folder, name, id=f"{folder.name}-{name}")
            for folder in golden_folders(metafunc.config, "noise")
            for name in json.loads((folder / "meta.json").read_text())["flashu_runs"]
        ]
        metafunc.parametrize(("flashu_folder", "flashu_run"), runs)


def test_flashu_run_alone_and_in_one_batch(flashu_folder, flashu_run, monkeypatch):
    """Finals and mids within tolerance, and exactly the reference's skipped layers, however prompts are batched."""
    golden = GoldenModel(flashu_folder)
    run, expected = golden.meta["flashu_runs"][flashu_run], golden.expected
    config = FlashUConfig(**run["config"])
    apply_flashu_patch(golden.model, config, scores=golden.scores())
    widths = [width for width in run["kept_neurons"] if width is not None]
    assert set(widths) <= {golden.model.acceleration.ffn_width}
    plan = golden.model.acceleration.plan(config.total_steps, golden.meta["guidance_scale"])
    # The reference lists a set for every step that is due to measure; ours measures those that some step uses.
    due = [
        step for step in range(1, config.total_steps) if (step - 1) % (config.T_LS or 1) == 0
        and step <= config.total_steps - config.tau
    ]  # fmt: skip
    measured = [due.index(step.number) for step in plan.steps if step.measure]
    chosen = []
    choose = layer_skipping.least_important
    monkeypatch.setattr(layer_skipping, "least_important", lambda *args: chosen.append(choose(*args)) or chosen[-1])

    everyone = list(range(len(golden.rows)))
    for prompts in [everyone, *([prompt] for prompt in everyone)]:
        chosen.clear()
        states = list(
            sampler.trajectory(
                golden.model,
                expected["noise"][prompts],
                golden.prompt_tokens(prompts, plan.guided),
                sampler.time_grid(config.total_steps, golden.meta["time_shifting_factor"]),
                plan,
            )
        )
        for state, moment in ((states[config.total_steps // 2], "mid"), (states[-1], "final")):
            assert relative_error(state, expected[f"flashu_{flashu_run}_{moment}"][prompts]) < TRAJECTORY
        for place, prompt in enumerate(prompts):
            reference = run["per_sample"][prompt]["skipped_layers_at_recalc"]
            assert [list(sets[place]) for sets in chosen] == [reference[index] for index in measured]


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
