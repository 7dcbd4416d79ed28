"""FlashU while answering: each technique against the network run the long way, together, and beside generation's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashu import (
    FlashUConfig,
    InputError,
    TextToImagePipeline,
    WandaScores,
    apply_flashu_patch,
    calibrate,
    calibrate_understanding,
    conversation,
    question_rows,
    remove_flashu_patch,
)
from flashu.acceleration import ffn_pruning, visual_tokens
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.reading import Reading
from flashu.acceleration.wanda import importance_order
from flashu.flops import count_answer
from tests.bounds import EVALUATION, LEVEL
from tests.reference import relative_error

OFF = FlashUConfig(r_p=0, r_LS=0, T_cache=None, tau=0, schedule=None)
TECHNIQUES = {
    "neurons": {"und_r_p": 0.3},
    "layers": {"und_r_LS": 0.3},
    "tokens": {"und_r_tok": 0.5, "und_tok_layer": 3},
    "all": {"und_r_p": 0.3, "und_r_LS": 0.2, "und_r_tok": 0.3, "und_tok_layer": 1},
}
GENERATING = {
    "r_p": 0.3,
    "head_prune_ratio": 0.5,
    "r_LS": 0.3,
    "T_LS": 3,
    "T_cache": 2,
    "tau": 2,
    "num_inference_steps": 8,
}
QUESTIONS = ("Is there a red circle?", "What colour is the background?")


@pytest.fixture(scope="module")
def pipe():
    return TextToImagePipeline.from_pretrained("embedded", device="cpu")


@pytest.fixture(scope="module")
def model(pipe):
    return pipe.model


@pytest.fixture(scope="module")
def latents(model):
    shape = (model.config.image_latent_dim, 2 * model.config.image_latent_height, 2 * model.config.image_latent_width)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def encoded(pipe):
    return [pipe.tokenizer.encode_question(text) for text in QUESTIONS]


@pytest.fixture(scope="module")
def scores(pipe, latents, encoded):
    pairs = [(latents[:1], encoded[0]), (latents[1:], encoded[1])]
    return {
        "scores": calibrate(pipe.model, QUESTIONS[:1], tokenizer=pipe.tokenizer, num_inference_steps=3),
        "understanding_scores": calibrate_understanding(pipe.model, pairs),
    }


@pytest.fixture(autouse=True)
def unpatched(model):
    yield
    remove_flashu_patch(model)


def first_logits(model, latents, encoded):
    images = conversation.read_images(model, latents, encoded[0])
    return torch.stack(conversation.first_logits(model, images, [encoded] * len(latents)))


@torch.no_grad()
def the_long_way(model, latents, question, settings, scores):
    """One image's and question's last logits on an unpatched model: zeroed neurons, layers and tokens left out."""
    acceleration = Acceleration.of(replace(OFF, **settings), model.config.llm)
    row = question_rows.lay_out(model, latents, [question])
    x, positions = row.embeds, torch.arange(row.embeds.shape[1])
    layers = model.showo.model.layers
    skipped = scores.layer_importances.argsort()[: acceleration.und_layers_to_skip].tolist()
    first, last = len(question.before) + 1, x.shape[1] - len(question.after)  # the image's tokens
    value = None
    for index, layer in enumerate(layers):
        if index not in skipped:
            unimportant = importance_order(scores.ffn[index])[acceleration.und_ffn_width or len(scores.ffn[index]) :]
            down = layer.mlp.down_proj.weight.clone()
            layer.mlp.down_proj.weight.data[:, unimportant] = 0
            mask = row.mask[:, :, positions][:, :, :, positions]
            x, own = layer(x, question_rows.rotary_at(model, positions[None]), None, mask, None)
            layer.mlp.down_proj.weight.data = down
            value = own.value
        if settings.get("und_r_tok") and index == settings["und_tok_layer"]:
            norms = value[0].transpose(0, 1).flatten(1).norm(dim=1)[first:last]
            dropped = norms.argsort()[: int(len(norms) * settings["und_r_tok"])] + first
            kept = torch.tensor([place for place in range(x.shape[1]) if place not in dropped.tolist()])
            x, positions = x[:, kept], positions[kept]
    return model.showo.lm_head(model.showo.model.norm(x))[:, -1]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_each_technique_is_what_it_says(model, latents, encoded, scores, technique):
    settings = TECHNIQUES[technique]
    expected = torch.stack(
        [
            torch.cat([the_long_way(model, one[None], q, settings, scores["understanding_scores"]) for q in encoded])
            for one in latents
        ]
    )
    before = first_logits(model, latents, encoded)
    apply_flashu_patch(model, replace(OFF, **settings), **scores)
    assert relative_error(first_logits(model, latents, encoded), expected) < EVALUATION
    assert relative_error(before, expected) > 10 * EVALUATION
    alone = first_logits(model, latents[1:], encoded[1:])
    assert relative_error(alone[0], expected[1, 1:]) < EVALUATION, "it does not depend on what stands beside it"


def test_each_task_keeps_to_its_own_settings(pipe, model, latents, encoded, scores):
    """On a model patched for both, pictures are those of one patched for generation, answers of the other."""

    def pictures():
        drawn = pipe(["a red circle", "two blue squares"], seeds=3)
        return np.stack([np.asarray(picture).astype(int) for picture in drawn])

    apply_flashu_patch(model, replace(OFF, **GENERATING), **scores)
    generated, whole = pictures(), first_logits(model, latents, encoded)
    apply_flashu_patch(model, replace(OFF, **TECHNIQUES["all"], num_inference_steps=8), **scores)
    answered, stock = first_logits(model, latents, encoded), pictures()
    apply_flashu_patch(model, replace(OFF, **GENERATING | TECHNIQUES["all"]), **scores)
    assert abs(pictures() - generated).max() <= LEVEL
    assert relative_error(first_logits(model, latents, encoded), answered) < EVALUATION
    remove_flashu_patch(model)
    assert abs(pipe_pictures_of_eight_steps(pipe) - stock).max() <= LEVEL
    assert relative_error(first_logits(model, latents, encoded), whole) < EVALUATION


def pipe_pictures_of_eight_steps(pipe):
    drawn = pipe(["a red circle", "two blue squares"], seeds=3, num_inference_steps=8)
    return np.stack([np.asarray(picture).astype(int) for picture in drawn])


def test_removing_restores_every_weight_bit_for_bit(model, scores):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    apply_flashu_patch(model, replace(OFF, **GENERATING | TECHNIQUES["all"]), **scores)
    remove_flashu_patch(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_both_tasks_neurons_are_neighbours_without_a_second_copy():
    generator = torch.Generator().manual_seed(0)
    generation, answers = torch.rand(2, 640, generator=generator)
    order, (start, end) = ffn_pruning.shared_order(generation, 448, answers, 320)
    assert sorted(order.tolist()) == list(range(640))
    assert set(order[:448].tolist()) == set(importance_order(generation)[:448].tolist())
    assert set(order[start:end].tolist()) == set(importance_order(answers)[:320].tolist())


def test_dropped_tokens_leave_the_cache_and_everything_else_stays(model, latents, encoded, scores):
    apply_flashu_patch(model, replace(OFF, und_r_tok=0.5, und_tok_layer=3), **scores)
    images = conversation.read_images(model, latents, encoded[0])
    tokens = model.config.image_latent_height * model.config.image_latent_width
    lengths = [layer.key.shape[2] for layer in images.layers]
    assert lengths == [images.length] * 4 + [images.length - tokens // 2] * (len(lengths) - 4)


def test_tokens_are_ranked_by_their_value_vectors():
    values = torch.zeros(2, 2, 5, 3)
    values[0, 0, :, 0] = torch.tensor([5.0, 1, 4, 2, 3])
    values[1, 1, :, 2] = torch.tensor([-9.0, 0, 1, -8, 7])
    assert visual_tokens.most_valued(values, 3).tolist() == [[0, 2, 4], [0, 3, 4]]
    assert [visual_tokens.kept_tokens(729, share) for share in (0, 0.5, 0.999)] == [729, 365, 1]


def test_long_answers_go_on_from_the_same_cache(model, latents, encoded, scores):
    """Token by token as when the answer so far is asked anew."""
    apply_flashu_patch(model, replace(OFF, **TECHNIQUES["all"]), **scores)
    images = conversation.read_images(model, latents, encoded[0])
    ((answer,), _) = conversation.generate(model, images, [encoded[:1], encoded[1:]], 8, -1, conversation.greedy)
    for length in range(8):
        longer = replace(encoded[0], after=[*encoded[0].after, *answer[:length]])
        assert int(first_logits(model, latents[:1], [longer]).argmax()) == answer[length]


@pytest.mark.parametrize("technique", [None, *TECHNIQUES])
def test_operations_are_counted_as_they_are_run(model, latents, encoded, scores, technique):
    acceleration = None
    if technique:
        apply_flashu_patch(model, replace(OFF, **TECHNIQUES[technique]), **scores)
        acceleration = model.acceleration
    question = encoded[0]
    # The counter knows the matrix products of attention, but not the fused operation that a CPU would run for them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        images = conversation.read_images(model, latents[:1], question)
        conversation.generate(model, images, [[question, question]], 3, -1, conversation.greedy)
    grid = model.config.native_grid
    counted = count_answer(model.config, acceleration, grid, len(question.after) - 1, 3, 2, len(question.before))
    assert sum(counted.values()) == counter.get_total_flops()


def test_scores_are_written_and_read_whole(scores, tmp_path):
    scores["understanding_scores"].save(tmp_path / "scores.safetensors")
    read = WandaScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(read.layer_importances, scores["understanding_scores"].layer_importances)
    assert len(read.ffn) == len(scores["understanding_scores"].ffn)
    assert read.task == "understanding"


def test_without_scores_they_are_measured_on_the_models_own_images(model):
    settings = replace(OFF, und_r_p=0.3, und_r_LS=0.2)
    own = calibrate_understanding(model)
    apply_flashu_patch(model, settings)
    measured = model.acceleration
    apply_flashu_patch(model, settings, understanding_scores=own)
    assert measured.reading == model.acceleration.reading
    assert all(map(torch.equal, measured.ffn_orders, model.acceleration.ffn_orders))


@pytest.mark.parametrize(
    ("left_out", "drop_after", "whole"),
    [((), 3, 4), ((3,), 3, 3), ((2, 3), 3, 2), ((0, 1), 1, 3), (tuple(range(4, 10)), 3, 4), ((0, 9), None, 10)],
)
def test_the_layer_that_ranks_tokens_is_one_that_runs(model, latents, encoded, left_out, drop_after, whole):
    reading = Reading(None, left_out, drop_after, 0.5)
    assert reading.whole_layers(10) == whole
    apply_flashu_patch(model, OFF)
    model.acceleration.reading = reading
    images = conversation.read_images(model, latents, encoded[0])
    kept = images.length - (8 if drop_after is not None else 0)
    lengths = [None if layer is None else layer.key.shape[2] for layer in images.layers]
    ran = [None if layer in left_out else images.length if layer < whole else kept for layer in range(10)]
    assert lengths == ran
    logits = torch.stack(conversation.first_logits(model, images, [encoded] * len(latents)))
    assert logits.isfinite().all()


def test_scores_that_say_nothing_of_layers_are_refused(model, scores):
    without = replace(scores["understanding_scores"], layer_importances=None)
    with pytest.raises(InputError, match="say nothing of layers"):
        apply_flashu_patch(model, replace(OFF, und_r_LS=0.2), understanding_scores=without)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"und_r_p": 1.0}, "und_r_p is 1.0"),
        ({"und_r_LS": -0.1}, "und_r_LS is -0.1"),
        ({"und_r_tok": 2}, "und_r_tok is 2"),
        ({"und_tok_layer": 1.5}, "und_tok_layer is 1.5"),
        ({"und_r_tok": 0.5, "und_tok_layer": 9}, "und_tok_layer is 9.*with 10 layers it is at most 8"),
    ],
)
def test_settings_that_do_not_fit_are_named(model, settings, said):
    with pytest.raises(InputError, match=said):
        apply_flashu_patch(model, replace(OFF, **settings))
    assert model.acceleration is None


def test_scores_of_the_other_task_are_refused(model, scores):
    with pytest.raises(InputError, match="measured for generation; understanding is pruned by"):
        apply_flashu_patch(model, replace(OFF, und_r_p=0.3), understanding_scores=scores["scores"])
