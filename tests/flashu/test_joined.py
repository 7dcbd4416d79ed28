"""Joined projections: the same numbers from one product, under the checkpoint's names, however weights are changed."""

import copy
from functools import partial

import pytest
import torch
from random_weights import random_model

from flashu import FlashUConfig, apply_flashu_patch, remove_flashu_patch
from flashu.models import Showo2Qwen2_5
from flashu.models.blocks import Blocks
from flashu.models.joined import Joined
from flashu.models.presets import PRESETS
from flashu.pipeline import TextToImagePipeline
from tests.bounds import EVALUATION, SUM, TRAJECTORY
from tests.reference import relative_error

PROMPTS, SEEDS = ["a red circle", "two blue squares beside a ring"], [1, 2]


@pytest.fixture
def pipe():
    return TextToImagePipeline.from_pretrained("embedded", device="cpu", dtype="float32")


@pytest.fixture
def joined(pipe):
    """The same pipeline, its projections joined."""
    other = TextToImagePipeline(copy.deepcopy(pipe.model), pipe.vae, pipe.tokenizer)
    other.model.join()
    return other


def latents(pipe, **settings):
    """The last state of a run, (images, channels, height, width)."""
    found = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda states: found.append(states) or decode(states)
    try:
        pipe(PROMPTS, seeds=SEEDS, num_inference_steps=8, **settings)
    finally:
        pipe.vae.decode = decode
    return torch.cat(found)


def storage_bytes(model):
    """The memory that parameters, and what they are views of, take."""
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


# FFNs and groups of key/value heads are pruned, layers skipped, and the head's output is reused.
ALL = FlashUConfig(r_p=0.2, head_prune_ratio=0.5, r_LS=0.2, T_LS=4, T_cache=3, tau=2, schedule=None)


@pytest.mark.parametrize("settings", [None, ALL], ids=["stock", "flashu"])
def test_pictures_and_answers_are_the_same_to_rounding(pipe, joined, settings):
    for one in (pipe, joined):
        if settings:
            apply_flashu_patch(one.model, settings, tokenizer=one.tokenizer)
    mine, theirs = latents(joined), latents(pipe)
    assert relative_error(mine, theirs) < TRAJECTORY
    if settings:
        for one in (pipe, joined):
            remove_flashu_patch(one.model)
    image = pipe("a red circle", seeds=1, num_inference_steps=8)[0]
    asked = ["Is there a circle?", "Is there a square?"]
    assert joined.yes_probability(image, asked) == pytest.approx(pipe.yes_probability(image, asked), abs=EVALUATION)
    assert joined.answer(image, "What is red?", max_new_tokens=6) == pipe.answer(
        image, "What is red?", max_new_tokens=6
    )


def test_names_weights_and_memory_are_those_of_the_checkpoint(pipe, joined, tmp_path):
    stock, ours = pipe.model.state_dict(), joined.model.state_dict()
    assert list(stock) == list(ours)
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
    joined.model.save_pretrained(tmp_path / "saved")
    again = Showo2Qwen2_5.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(stock[name], again[name]) for name in stock)
    model = random_model(Showo2Qwen2_5, PRESETS["embedded"], 0, torch.float32, torch.device("cpu"))
    before = storage_bytes(model)
    model.join()
    assert storage_bytes(model) == before


def test_a_patch_comes_off_bit_for_bit(joined):
    before = {name: value.clone() for name, value in joined.model.state_dict().items()}
    apply_flashu_patch(joined.model, "embedded", tokenizer=joined.tokenizer)
    remove_flashu_patch(joined.model)
    assert all(torch.equal(before[name], value) for name, value in joined.model.state_dict().items())


def test_weights_that_are_changed_in_any_way_are_those_that_run(pipe, joined):
    """Copied into, loaded, loaded with `assign`, converted there and back, copied as a whole."""
    doubled = {name: value * 1.5 for name, value in pipe.model.state_dict().items()}
    other = random_model(Showo2Qwen2_5, pipe.model.config, 1, torch.float32, torch.device("cpu"))
    x = torch.randn(1, 5, pipe.model.config.llm.hidden_size)
    mlp = joined.model.showo.model.layers[1].mlp
    plain = pipe.model.showo.model.layers[1].mlp

    def same():
        plain.load_state_dict(mlp.state_dict())
        return relative_error(mlp(x), plain(x)) < SUM

    first = mlp(x)
    with torch.no_grad():
        mlp.up_proj.weight.mul_(2)
    assert same()
    joined.model.load_state_dict(doubled)
    assert same()
    assert not torch.allclose(mlp(x), first)
    joined.model.load_state_dict(other.state_dict(), assign=True)
    assert same()
    joined.model.to(torch.float64).to(torch.float32)
    assert same()
    twin = copy.deepcopy(joined.model).showo.model.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.zero_()
    assert mlp(x).abs().max() == 0
    assert twin(x).abs().max() > 0


def test_a_prefix_keeps_no_more_than_its_keys_and_values(joined):
    prefix = joined.model.encode_prefix([[1, 2, 3, 4, 5]], joined.model.config.native_grid)
    for states in (*prefix.llm, *prefix.head):
        assert states.value.untyped_storage().nbytes() == states.value.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_layers_are_joined_from_the_start():
    loaded = Showo2Qwen2_5.from_pretrained("embedded", device="cuda")
    moved = Showo2Qwen2_5.from_pretrained("embedded").cuda()
    for model in (loaded, moved):
        assert all(module._whole is not None for module in model.modules() if isinstance(module, Joined))


# --------------------------------------------------------------------------------------------- more than weights


def train(model, steps=3):
    """Some steps towards a velocity, from one noise."""
    height, width = model.config.native_grid
    generator = torch.Generator().manual_seed(0)
    noise, target = torch.randn(2, 1, model.config.image_latent_dim, 2 * height, 2 * width, generator=generator)
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        prefix = model.encode_prefix([[1, 2, 3, 4]], model.config.native_grid)
        time = model.embed_times(torch.tensor([0.3])).at(0)
        (model.velocity(noise, time, prefix) - target).square().mean().backward()
        optimizer.step()


def test_training_moves_every_weight_as_it_does_unjoined(pipe, joined):
    before = {name: value.clone() for name, value in pipe.model.named_parameters()}
    for one in (pipe, joined):
        train(one.model)
    mine, theirs = dict(joined.model.named_parameters()), dict(pipe.model.named_parameters())
    moved = [name for name in before if not torch.equal(before[name], theirs[name])]
    assert len(moved) > 100
    assert {name for name in moved if "q_proj" in name or "up_proj" in name}
    assert all(torch.equal(mine[name], theirs[name]) for name in before)
    assert all(module._whole is not None for module in joined.model.modules() if isinstance(module, Joined))
    assert relative_error(latents(joined), latents(pipe)) < TRAJECTORY, "by the trained weights"


def test_what_watches_a_layer_sees_it_and_what_stands_for_it_runs(pipe, joined):
    seen = []
    layer, plain = (one.model.showo.model.layers[0] for one in (joined, pipe))
    x = torch.randn(1, 3, pipe.model.config.llm.hidden_size)
    handles = [
        layer.self_attn.k_proj.register_forward_hook(lambda *args: seen.append("k")),
        layer.mlp.up_proj.register_forward_pre_hook(lambda *args: seen.append("up")),
    ]
    with torch.no_grad():
        layer.self_attn.project(x), layer.mlp(x)
        assert seen == ["k", "up"]
        for handle in handles:
            handle.remove()
        layer.self_attn.project(x), layer.mlp(x)
        assert seen == ["k", "up"]
        layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj, torch.nn.Tanh())  # as an adapter is put in
        expected = plain.mlp.down_proj(torch.nn.functional.silu(plain.mlp.gate_proj(x)) * plain.mlp.up_proj(x).tanh())
        assert relative_error(layer.mlp(x), expected) < SUM
    joined.model.to(torch.float64).to(torch.float32)
    twin = copy.deepcopy(joined.model)
    twin.join()
    with torch.no_grad():
        assert relative_error(twin.showo.model.layers[0].mlp(x), expected) < SUM


@pytest.mark.parametrize("compiled", [False, True])
def test_other_data_behind_a_parameter_is_what_runs(pipe, joined, compiled):
    """As an average of weights is swapped in for a while."""
    before = latents(joined)
    if compiled:
        joined.blocks = Blocks.through(partial(torch.compile, backend="eager"))
        assert relative_error(latents(joined), before) < TRAJECTORY
    with torch.no_grad():
        for one in (pipe, joined):
            for name, parameter in one.model.named_parameters():
                if "q_proj" in name or "up_proj" in name:
                    parameter.data = parameter * 1.5
    mine, theirs = latents(joined), latents(pipe)
    assert relative_error(mine, theirs) < TRAJECTORY
    assert (mine - before).abs().max() > 0.01 * before.abs().max()


def test_a_copy_holds_one_copy_of_the_weights_and_goes_its_own_way(joined):
    twin = copy.deepcopy(joined.model)
    assert storage_bytes(twin) == storage_bytes(joined.model)
    for module in (joined.model, twin):
        owners = [one for one in module.modules() if isinstance(one, Joined)]
        wholes = {one._whole[0].untyped_storage().data_ptr() for one in owners}
        held = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        assert len(wholes) == len(owners)
        assert wholes <= held
    mlp, other = joined.model.showo.model.layers[0].mlp, twin.showo.model.layers[0].mlp
    x = torch.randn(1, 3, joined.model.config.llm.hidden_size)
    with torch.no_grad():
        expected = mlp(x)
        other.up_proj.weight.zero_()
        assert other(x).abs().max() == 0
        assert torch.equal(mlp(x), expected)
