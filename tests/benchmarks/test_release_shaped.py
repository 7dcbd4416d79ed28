"""The baseline of the GPU benchmark is the released network: its numbers, its operations, and no second copy of it."""

import json
from pathlib import Path

import pytest
import torch
from random_weights import random_model
from release_modules import Batch
from release_shaped import ReleaseShaped, layers_to_skip
from release_vae import ReleaseVae
from torch.utils.flop_counter import FlopCounterMode

from flashu import FlashUConfig, Showo2Qwen2_5, WandaScores, apply_flashu_patch, remove_flashu_patch, sampler
from flashu.acceleration.plan import release_plan
from flashu.fingerprint import fingerprint
from flashu.flops import count_image
from flashu.models import WanImageVAE
from flashu.models.geometry import HeadGeometry, LlmGeometry, Showo2Config, VisionGeometry
from flashu.models.presets import PRESETS, VAE_PRESETS
from flashu.probe import stock_plan
from tests.bounds import EVALUATION, TRAJECTORY
from tests.reference import GoldenModel, load_vae, relative_error

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = [
    (folder, run)
    for folder in ("tiny", "tiny_hq")
    for run in json.loads((GOLDEN / folder / "meta.json").read_text())["flashu_runs"]
]


@pytest.fixture(scope="module", params=["tiny", "tiny_hq"])
def golden(request):
    return GoldenModel(GOLDEN / request.param)


def test_stock_trajectory_ends_where_the_published_codes_does(golden):
    steps = release_plan(None, golden.meta["num_inference_steps"], golden.meta["guidance_scale"]).steps
    points = sampler.time_grid(len(steps) + 1, golden.meta["time_shifting_factor"])
    rows = golden.prompt_tokens(range(len(golden.rows)))
    latents = ReleaseShaped.sharing(golden.model).sample(golden.expected["noise"], rows, points, steps)
    assert relative_error(latents, golden.expected["sample_base_trajectory"][-1]) < TRAJECTORY


@pytest.mark.parametrize(("folder", "run"), RUNS)
def test_flashu_trajectory_ends_where_the_published_codes_does(folder, run):
    golden = GoldenModel(GOLDEN / folder)
    config = FlashUConfig(**golden.meta["flashu_runs"][run]["config"])
    release = ReleaseShaped.sharing(golden.model)
    if config.r_p:
        release.prune_ffns(golden.scores().ffn, config.r_p)
    steps = release_plan(config, config.total_steps, golden.meta["guidance_scale"]).steps
    points = sampler.time_grid(config.total_steps, golden.meta["time_shifting_factor"])
    for prompt in range(len(golden.rows)):
        latents = release.sample(
            golden.expected["noise"][[prompt]],
            golden.prompt_tokens([prompt]),
            points,
            steps,
            layers_to_skip(config, golden.model.config),
        )
        assert relative_error(latents, golden.expected[f"flashu_{run}_final"][[prompt]]) < TRAJECTORY


@pytest.mark.parametrize(("llm_hidden", "tied"), [(64, True), (96, False)], ids=["wide as the head", "wider"])
@torch.no_grad()
def test_guided_velocity_is_our_models_with_the_same_weights(llm_hidden, tied):
    config = Showo2Config(
        llm=LlmGeometry(llm_hidden, 160, 4, 4, 2, tie_word_embeddings=tied),
        llm_vocab_size=50,
        image_latent_height=3,
        image_latent_width=5,
        num_diffusion_layers=3,
        vision=VisionGeometry(32, 80, 2, 4, grid=4),
        head=HeadGeometry(64, 128, 4, 2, 16),
    )
    model = random_model(Showo2Qwen2_5, config, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    rows = sampler.PromptTokens(
        [[1, 5, 6, 7, 2], [1, 9, 2], [1, 2], [1, 2]],
        [[3] * count for count in (10, 12, 13, 13)],
        (3, 5),
    )
    latents = torch.randn(2, 16, 6, 10, generator=generator)
    t = torch.tensor(0.37)
    ours = model.velocity(latents, model.embed_times(t[None]).at(0), model.encode_prefix(rows.prefixes, rows.grid))
    expected = sampler.guide(ours, 7.5, images=2)

    release = ReleaseShaped.sharing(model)
    batch = Batch.of(rows, release.device, release.dtype)
    guided = release.guide(release.velocity(torch.cat((latents, latents)), t, batch), 7.5)
    assert relative_error(guided[:2], expected) < EVALUATION
    assert torch.equal(guided[2:], guided[:2])


def test_weights_are_shared_also_after_flashu_was_on_and_off_again():
    model = random_model(Showo2Qwen2_5, PRESETS["embedded"], 0)
    model.join()  # as it is on CUDA
    release = ReleaseShaped.sharing(model)
    llm = model.config.llm
    scores = [torch.rand(width) for width in (llm.intermediate_size, llm.hidden_size)]
    per_layer = [[score] * llm.num_hidden_layers for score in scores]
    for _ in range(2):
        own = dict(model.named_parameters())
        theirs = dict(release.named_parameters())
        assert own.keys() == theirs.keys()
        assert all(own[name].data_ptr() == theirs[name].data_ptr() for name in own)
        apply_flashu_patch(model, FlashUConfig(), scores=WandaScores(*per_layer, fingerprint(model)))
        remove_flashu_patch(model)


@torch.no_grad()
def test_an_evaluation_takes_the_operations_of_the_published_code():
    """It was counted independently at 10.68 TFLOP for 1.5B at 432 pixels."""
    config = PRESETS["show-o2-1.5b"]
    with torch.device("meta"):
        model = Showo2Qwen2_5(config).bfloat16()
    limit, device = config.max_text_tokens(729), torch.device("meta")
    rows = sampler.PromptTokens([[0] * 62, [0] * 2], [[0] * (4 + limit - 62), [0] * (2 + limit)], config.native_grid)
    batch = Batch.of(rows, device, model.dtype)
    assert batch.tokens.shape == (2, 1024)
    latents, t = torch.empty(2, 16, 54, 54, device=device), torch.empty((), device=device)
    with FlopCounterMode(display=False) as counter:
        ReleaseShaped.sharing(model).velocity(latents, t, batch)
    assert counter.get_total_flops() == pytest.approx(10.68e12, rel=0.02)


def test_vae_makes_the_images_of_the_published_code():
    folded, expected = load_vae(GOLDEN / "vae_tiny")
    vae = random_model(ReleaseVae, folded.geometry, 0)
    vae.take_weights(folded)
    assert relative_error(vae.decode(expected["latents"]), expected["decoded"]) < EVALUATION


def test_vae_keeps_nothing_of_a_batch_that_failed(monkeypatch):
    vae = random_model(ReleaseVae, VAE_PRESETS["embedded"], 0)

    def fail(video):
        assert any(getattr(module, "kept", None) is not None for module in vae.modules())
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(vae.decoder.head, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(torch.zeros(1, 8, 8, 8))
    assert all(getattr(module, "kept", None) is None for module in vae.modules())


def test_vae_in_bfloat16_stays_close():
    folded = random_model(WanImageVAE, VAE_PRESETS["embedded"], 0)
    vae = random_model(ReleaseVae, folded.geometry, 1)
    vae.take_weights(folded)
    latents = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    vae.autocast = torch.bfloat16
    assert (vae.decode(latents) - folded.decode(latents)).abs().mean() < 0.02


def test_vae_takes_the_operations_of_three_dimensions():
    """2.6 times ours: a frame is convolved with two frames of zeros before it."""
    config, geometry = PRESETS["show-o2-1.5b"], VAE_PRESETS["show-o2-1.5b"]
    with torch.device("meta"):
        vae, model = ReleaseVae(geometry), Showo2Qwen2_5(config)
    with FlopCounterMode(display=False) as counter:
        vae.decode(torch.empty(1, 16, 54, 54, device="meta"))
    assert counter.get_total_flops() == pytest.approx(2.0e12, rel=0.02)
    ours = count_image(config, geometry, stock_plan(model, 2), config.native_grid, 62).parts["VAE decode"]
    assert counter.get_total_flops() / ours == pytest.approx(2.6, rel=0.02)
