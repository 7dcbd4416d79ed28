"""The analysis tools: closed forms against brute force, shares that add up, figures that are there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flashu import InputError, TextToImagePipeline
from flashu.analysis import activations, compare, figures, obd
from flashu.pictures import open_picture, picture_latents
from flashu.question_rows import lay_out
from tests.bounds import EVALUATION, SUM

PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def pipe():
    return TextToImagePipeline.from_pretrained("embedded", device="cpu")


@pytest.fixture(scope="module")
def pairs(pipe):
    picture = Image.effect_noise((90, 60), 80).convert("RGBA")
    latents = picture_latents(pipe.vae, open_picture(picture), (8, 8))
    return [(latents, pipe.tokenizer.encode_question("Is there a red circle in the image?"))]


@pytest.fixture(scope="module")
def both(pipe, pairs):
    generation = obd.generation(pipe.model, pipe.tokenizer, PROMPTS, num_inference_steps=3)
    return generation, obd.understanding_of(pipe.model, pairs)


@torch.no_grad()
def test_closed_form_equals_taking_neurons_and_groups_out_one_by_one(pipe, pairs, both):
    """Brute force over a whole question row, layer by layer, each on the whole layers' outputs before it."""
    llm = pipe.model.showo.model
    latents, question = pairs[0]
    row = lay_out(pipe.model, latents, [question])
    x = row.embeds
    for number, layer in enumerate(llm.layers):
        baseline, _ = layer(x, row.rotary, None, row.mask, None)
        lost = SUM * float(baseline.norm())  # of a difference to it
        down, value = layer.mlp.down_proj.weight, layer.self_attn.v_proj
        for neuron in range(0, down.shape[1], 37):
            column = down[:, neuron].clone()
            down[:, neuron] = 0
            changed = (layer(x, row.rotary, None, row.mask, None)[0] - baseline).norm()
            down[:, neuron] = column
            assert both[1].ffn[number][neuron] == pytest.approx(float(changed), rel=EVALUATION, abs=lost)
        for group in range(2):
            kept = value.weight.clone(), value.bias.clone()
            for parameter in (value.weight, value.bias):
                parameter.unflatten(0, (2, -1))[group] = 0
            changed = (layer(x, row.rotary, None, row.mask, None)[0] - baseline).norm()
            value.weight.copy_(kept[0])
            value.bias.copy_(kept[1])
            assert both[1].kv[number][group] == pytest.approx(float(changed), rel=EVALUATION, abs=lost)
        x = baseline


def test_scores_survive_a_file(both, tmp_path):
    both[0].save(tmp_path / "obd.json")
    assert obd.ObdScores.load(tmp_path / "obd.json") == both[0]


def test_shares_of_the_top_half_add_up(both):
    shares = compare.compare(*both)
    assert len(shares) == 10
    for layer in shares:
        assert layer.generation_only + layer.shared == pytest.approx(50)
        assert layer.understanding_only + layer.shared == pytest.approx(50)
        assert 0 < layer.shared < 50


def test_the_same_scores_are_wholly_shared(both):
    same = obd.ObdScores("understanding", both[0].ffn, both[0].kv, both[0].fingerprint)
    assert all(layer.shared == pytest.approx(50) for layer in compare.compare(both[0], same))


def test_comparison_refuses_mixed_up_scores(both):
    with pytest.raises(InputError, match="expected scores for generation, got scores for understanding"):
        compare.compare(both[1], both[0])
    other = obd.ObdScores("understanding", both[1].ffn, both[1].kv, "another model")
    with pytest.raises(InputError, match="different models"):
        compare.compare(both[0], other)


def test_activations_describe_the_run(pipe):
    found = activations.analyze(pipe.model, pipe.tokenizer, PROMPTS, num_inference_steps=5, skip_ratio=0.2)
    assert np.shape(found.input_output) == (4, 10)
    assert np.shape(found.across_steps) == (3, 11)
    assert np.shape(found.head_drift) == (8, 4)
    inter = np.asarray(found.inter_layer)
    assert np.allclose(inter, inter.T, atol=EVALUATION)
    assert np.allclose(inter.diagonal(), 1, atol=EVALUATION)
    assert np.allclose(np.sum(found.skipped, axis=1), 2), "two of ten layers at 0.2"
    # A layer is as alike to its input as two neighbouring depths are to each other.
    assert np.allclose(np.mean(found.input_output, axis=0), inter.diagonal(offset=1), atol=EVALUATION)
    drift = np.asarray(found.head_drift)
    assert drift[0, 0] == 0
    assert (drift[0, 1:] > 0).all()
    assert drift[1, 3] > drift[0, 3], "two steps drift further than one"


def test_figures_are_drawn_for_28_layers(tmp_path):
    rng = np.random.default_rng(0)
    scores = obd.ObdScores("generation", rng.random((28, 640)).tolist(), rng.random((28, 2)).tolist(), "x")
    other = obd.ObdScores("understanding", rng.random((28, 640)).tolist(), rng.random((28, 2)).tolist(), "x")
    found = activations.Activations(
        34, 28, rng.random((34, 28)).tolist(), rng.random((29, 29)).tolist(), rng.random((33, 29)).tolist(),
        rng.random((34, 28)).tolist(), rng.random((8, 34)).tolist(), 0.2,
    )  # fmt: skip
    figures.draw_obd(scores, tmp_path / "obd.png")
    figures.draw_comparison(compare.compare(scores, other), tmp_path / "compare.png")
    figures.draw_layers(found, tmp_path / "layers.png")
    figures.draw_similarities(found, tmp_path / "similarities.png")
    figures.draw_head_drift(found, tmp_path / "drift.png")
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as picture:
            assert min(picture.size) >= 500
            assert np.asarray(picture.convert("L")).std() > 10, f"{file.name} is blank"


def test_garbage_is_not_taken_for_scores(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"task": "generation"}))
    with pytest.raises(InputError, match="does not hold OBD scores"):
        obd.ObdScores.load(tmp_path / "x.json")
