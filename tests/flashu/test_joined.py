"""Joined projections: the same numbers from one product, under the checkpoint's names, however weights are changed."""

import copy

import pytest
import torch

from flashu import FlashUConfig, apply_flashu_patch, remove_flashu_patch
from flashu.models import Showo2Qwen2_5
from flashu.models.geometry import PRESETS
from flashu.models.joined import Joined
from flashu.models.random_weights import random_model
from flashu.pipeline import TextToImagePipeline

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
        pipe(PROMPTS, seeds=SEEDS, num_inference_steps=12, **settings)
    finally:
        pipe.vae.decode = decode
    return torch.cat(found)


def storage_bytes(model):
    """The memory that parameters, and what they are views of, take."""
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("settings", [None, FlashUConfig(r_p=0.2, r_LS=0.2, T_cache=3, tau=3, schedule=None)])
def test_pictures_and_answers_are_the_same_to_rounding(pipe, joined, settings):
    for one in (pipe, joined):
        if settings:
            apply_flashu_patch(one.model, settings, tokenizer=one.tokenizer)
    mine, theirs = latents(joined), latents(pipe)
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()
    if settings:
        for one in (pipe, joined):
            remove_flashu_patch(one.model)
    image = pipe("a red circle", seeds=1, num_inference_steps=8)[0]
    asked = ["Is there a circle?", "Is there a square?"]
    assert joined.yes_probability(image, asked) == pytest.approx(pipe.yes_probability(image, asked), abs=1e-5)
    assert joined.answer(image, "What is red?", max_new_tokens=6) == pipe.answer(
        image, "What is red?", max_new_tokens=6
    )


def test_kv_groups_are_pruned_alike(pipe, joined):
    settings = FlashUConfig(r_p=0.2, head_prune_ratio=0.5, r_LS=0.0, T_LS=-1, T_cache=-1, tau=0, schedule=None)
    for one in (pipe, joined):
        apply_flashu_patch(one.model, settings, tokenizer=one.tokenizer)
    mine, theirs = latents(joined), latents(pipe)
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


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
        return torch.allclose(mlp(x), plain(x), atol=1e-6)

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
