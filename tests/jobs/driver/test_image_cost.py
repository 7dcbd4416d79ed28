"""What an image of a run is said to cost, against the count for the geometry, the plan and the prompt's tokens."""

import json
import shutil
from dataclasses import replace
from functools import cache

import pytest

from cluster.open_storage import open_storage
from cluster.storage import S3Options, StorageError
from flashu import FLASHU_PRESETS, InputError
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.plan import make_plan
from flashu.checkpoints.files import EMBEDDED_FOLDER
from flashu.flops import count_image
from flashu.models.geometry import VaeGeometry
from flashu.models.presets import PRESETS, VAE_PRESETS
from jobs.driver.image_cost import MANY_IN_SHARD, costly, tflop_per_image
from jobs.settings.config import read_config

NETWORK, VAE = PRESETS["embedded"], VAE_PRESETS["embedded"]
PROMPTS = ["a red circle", "a blue square above a green circle"]  # 3 and 7 tokens, each between bos and boi
PREFIX = 7
STEPS = 3
OFF = ("flashu.preset=off", f"sampling.num_inference_steps={STEPS}")
WIDE, NARROW = replace(NETWORK, image_latent_dim=16), replace(VaeGeometry(), dim=32)


def cost(*overrides, prompts=PROMPTS):
    return tflop_per_image(read_config(None, overrides), prompts)


@cache
def counted(network=NETWORK, vae=VAE, grid=(4, 4), prefix=PREFIX, guidance=NETWORK.guidance_scale):
    """Of the unaccelerated model, in TFLOP."""
    return count_image(network, vae, make_plan(None, STEPS, guidance), grid, prefix).total / 1e12


@pytest.fixture
def model(tmp_path):
    """The built-in model's small files, without a VAE; no weights are looked for."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_FOLDER / "tokenizer", folder / "tokenizer")
    shutil.copy(EMBEDDED_FOLDER / "config.json", folder)
    return folder


@pytest.fixture
def wide_model(model):
    """Such a one that draws in as many channels as the released VAE has."""
    return write_config(model, WIDE)


def write_config(folder, geometry):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(geometry.to_dict()))
    return folder


def test_it_is_the_count_for_prompts_of_mean_length():
    assert cost(*OFF) == counted()
    assert cost(*OFF, prompts=PROMPTS[:1]) == counted(prefix=5)
    assert cost(*OFF, "sampling.size=96x64", "sampling.guidance_scale=0") == counted(grid=(4, 6), guidance=0)
    settings = FLASHU_PRESETS["embedded"]
    plan = Acceleration.of(settings, NETWORK.llm).plan(settings.total_steps, NETWORK.guidance_scale)
    accelerated = count_image(NETWORK, VAE, plan, (4, 4), PREFIX).total / 1e12
    assert cost("flashu.preset=embedded") == accelerated
    assert accelerated < cost("flashu.preset=off", f"sampling.num_inference_steps={settings.total_steps}")


def test_without_prompts_there_is_no_figure():
    assert cost(*OFF, prompts=[]) is None


def test_the_built_in_vae_may_have_a_place_of_its_own(model, tmp_path):
    shutil.copytree(EMBEDDED_FOLDER / "vae", tmp_path / "vae")
    for vae in (tmp_path / "vae", "embedded"):
        assert cost(*OFF, f"model.path={model}", f"model.vae={vae}") == counted()


def test_a_vae_that_is_given_counts_and_not_the_one_beside_the_model(wide_model, tmp_path):
    write_config(wide_model / "vae", VaeGeometry())
    write_config(tmp_path / "narrow", NARROW)
    expected = counted(WIDE, NARROW)
    assert expected < counted(WIDE, VaeGeometry())
    assert cost(*OFF, f"model.path={wide_model}", f"model.vae={tmp_path / 'narrow'}") == expected


def test_the_released_vae_has_the_released_geometry(wide_model, tmp_path):
    folder = write_config(tmp_path / "Wan2.1", NARROW)  # as the release's config is that of another network
    (folder / "Wan2.1_VAE.pth").write_bytes(b"no weights are read")
    expected = counted(WIDE, VaeGeometry())
    for vae in (folder, folder / "Wan2.1_VAE.pth", "Wan-AI/Wan2.1-T2V-14B", "null"):
        assert cost(*OFF, f"model.path={wide_model}", f"model.vae={vae}") == expected


def test_of_s3_only_the_small_files_are_read(wide_model, tmp_path, bucket):
    """There are no others."""
    storage = open_storage(bucket.url, S3Options(bucket.endpoint_url, path_style=True))
    tokenizer = (wide_model / "tokenizer" / "tokenizer.json").read_bytes()
    storage.put("model/config.json", (wide_model / "config.json").read_bytes())
    storage.put("words/tokenizer.json", tokenizer)
    storage.put("narrow/config.json", json.dumps(NARROW.to_dict()).encode())
    storage.put("release/config.json", json.dumps(NARROW.to_dict()).encode())
    storage.put("release/Wan2.1_VAE.pth", b"weights")
    s3 = (f"storage.endpoint_url={bucket.endpoint_url}", "storage.path_style=true", f"model.path={bucket.url}/model")
    words = f"model.tokenizer={bucket.url}/words"
    of_narrow, of_release = counted(WIDE, NARROW), counted(WIDE, VaeGeometry())
    for place in (words, f"{words}/", f"{words}/tokenizer.json"):
        assert cost(*OFF, *s3, place, f"model.vae={bucket.url}/narrow") == of_narrow
    for vae in ("release", "release/Wan2.1_VAE.pth"):
        assert cost(*OFF, *s3, words, f"model.vae={bucket.url}/{vae}") == of_release
    storage.put("model/vae/config.json", json.dumps(NARROW.to_dict()).encode())
    assert cost(*OFF, *s3, words) == of_narrow


def test_files_that_cannot_be_had_are_told(model, tmp_path, bucket):
    with pytest.raises(InputError, match="no such checkpoint folder"):
        cost(*OFF, f"model.path={tmp_path}/nowhere")
    shutil.rmtree(model / "tokenizer")
    with pytest.raises(InputError, match="tokenizer"):
        cost(*OFF, f"model.path={model}")
    nowhere = f"s3://{bucket.name}-nowhere/model"
    s3 = (f"storage.endpoint_url={bucket.endpoint_url}", "storage.path_style=true")
    with pytest.raises(StorageError, match="nowhere"):
        cost(*OFF, *s3, f"model.path={nowhere}")


def told(*overrides):
    return costly(read_config("demo", overrides))


def test_a_size_far_from_the_models_own_is_told_with_what_it_takes():
    tflop = counted(grid=(64, 64), prefix=32)
    [large] = told(*OFF, "sampling.size=1024")
    assert large == (
        "Warning: an image of 1024x1024 has 256 times the pixels of 64x64, which the model was made for: "
        f"about {tflop:.4g} TFLOP an image, {tflop / counted(prefix=32):,.0f} times as many as usual"
    )
    [small] = told(*OFF, "sampling.size=32x16")
    assert small.startswith("Warning: an image of 32x16 has 1/8 of the pixels of 64x64, which the model was made for: ")
    assert "as many" not in small
    [huge] = told(*OFF, "sampling.size=8192", "cluster.lease_timeout_s=90")
    assert huge.endswith("A worker whose batch takes longer than cluster.lease_timeout_s=90 seconds is taken for hung")


def test_a_usual_size_is_not_told():
    for size in ("null", "64", "128", "32", "96x128"):
        assert told(f"sampling.size={size}") == []


def test_many_steps_and_large_shards_are_told():
    [steps] = told("flashu.preset=off", "sampling.num_inference_steps=1000")
    assert steps.startswith("Warning: 1,000 steps are 20 times the usual 50: about 0.")
    assert steps.endswith(" TFLOP an image, 20 times as many as usual")
    assert len(told("flashu.tau=300", "sampling.num_inference_steps=400")) == 1  # which fits no run of 50 steps
    assert told("sampling.num_inference_steps=200") == []
    [shard] = told(f"sampling.num_images={MANY_IN_SHARD}")
    assert shard.startswith("Warning: a shard is 32,768 images, of 8 prompts, which its worker holds until it has made")
    assert told(f"sampling.num_images={MANY_IN_SHARD // 8}") == []


def test_of_a_model_that_cannot_be_seen_from_here_nothing_is_told():
    for unseen in ("model.path=/no/model", "model.vae=/no/vae"):
        assert told(unseen, "sampling.size=4096") == []
