"""Checkpoint folders: every layout loads to the same numbers, in little memory; what cannot be loaded is named."""

import contextlib
import json
import os
import pickle
import select
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from random_weights import random_model

from flashu import CheckpointError, InputError, Showo2Qwen2_5, TextToImagePipeline
from flashu.checkpoints import configs, weights
from flashu.models import WanImageVAE
from flashu.models.geometry import LlmGeometry
from flashu.models.presets import PRESETS
from tests import fakes
from tests.command import assert_refused, flashu

EMBEDDING, HEAD = "showo.model.embed_tokens.weight", "showo.lm_head.weight"
UNTIED = replace(fakes.CONFIG, llm=replace(fakes.LLM, tie_word_embeddings=False))

both_kinds = pytest.mark.parametrize("config", [fakes.CONFIG, UNTIED], ids=["tied", "untied"])
every_layout = pytest.mark.parametrize("layout", fakes.LAYOUTS)


@pytest.fixture
def folder(tmp_path):
    """A release that loads, for a test to damage."""
    return fakes.write_release_folder(tmp_path / "model")


@pytest.fixture(scope="module")
def picture():
    """What the fakes' weights draw, with no checkpoint folder in between."""
    model = random_model(Showo2Qwen2_5, fakes.CONFIG, seed=0)
    return draw(TextToImagePipeline.from_model(model, vae=fakes.GOLDEN_VAE, tokenizer=fakes.extended_tokenizer()))


def draw(pipe):
    return pipe("a red circle", seeds=0, num_inference_steps=3)[0].tobytes()


def load(folder, dtype=None):
    return Showo2Qwen2_5.from_pretrained(folder, dtype=dtype)


def refusal(folder):
    """The text with which a folder is refused."""
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@contextlib.contextmanager
def in_silence():
    """Makes a warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_same_weights(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert {tensor.dtype for tensor in state.values()} == {tensor.dtype for tensor in expected.values()}
    assert not [key for key, tensor in expected.items() if not torch.equal(state[key], tensor)]


def edit(file, **keys):
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def cut(file, size):
    """Keep a file's first `size` bytes; negative numbers count from its end."""
    file.write_bytes(file.read_bytes()[:size])


# -------------------------------------------------------------------------------------------------- what loads


@every_layout
@both_kinds
def test_every_layout_loads_to_the_same_weights(tmp_path, layout, config):
    fakes.write_release_folder(tmp_path, config, layout=layout)
    assert_same_weights(load(tmp_path), fakes.weights(config))


@every_layout
def test_every_layout_draws_the_same_picture(tmp_path, layout, picture):
    fakes.write_whole_folder(tmp_path, layout=layout)
    assert draw(TextToImagePipeline.from_pretrained(tmp_path)) == picture


def test_of_weights_and_a_variant_the_plain_ones_are_taken_unless_it_is_asked_for(folder):
    fakes.write_weights(folder, fakes.weights(seed=3), "variant bin")
    assert_same_weights(load(folder), fakes.weights())
    assert_same_weights(Showo2Qwen2_5.from_pretrained(folder, variant="bf16"), fakes.weights(seed=3))
    pipe = TextToImagePipeline.from_pretrained(
        folder, variant="bf16", vae=fakes.GOLDEN_VAE, tokenizer=folder / "llm", dtype="float32", device="cpu"
    )
    assert_same_weights(pipe.model, fakes.weights(seed=3))


def test_of_several_variants_one_has_to_be_chosen(folder):
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model.fp16.bin")
    fakes.write_weights(folder, fakes.weights(), "variant bin")
    assert "holds its weights in variants only: bf16, fp16. Choose one with variant=" in refusal(folder)
    with pytest.raises(CheckpointError, match="has no variant 'ema'; it has bf16, fp16"):
        Showo2Qwen2_5.from_pretrained(folder, variant="ema")


def test_shards_without_an_index_load_beside_those_of_another_save(tmp_path):
    """A folder saved into twice, the second time in fewer shards, of which one file was then lost."""
    fakes.write_release_folder(tmp_path, layout="sharded bin, no index")
    whole = sorted(file.name for file in tmp_path.glob("*.bin"))
    count = len(whole) + 3
    (tmp_path / f"pytorch_model-00001-of-{count:05d}.bin").write_bytes(b"of another save")
    assert_same_weights(load(tmp_path), fakes.weights())
    (tmp_path / whole[1]).unlink()
    assert f"has no index, and lacks 1 of {len(whole)} shards: number 2 beside {whole[0]}" in refusal(tmp_path)


@pytest.mark.parametrize("config", [fakes.CONFIG, UNTIED], ids=["tied", "untied"])
def test_a_head_that_was_trained_apart_from_its_embedding_is_kept(tmp_path, config):
    """As the release loads it, which unties a tied LLM: its answers are those of the head that is stored."""
    tensors = fakes.weights(UNTIED)
    assert not torch.equal(tensors[HEAD], tensors[EMBEDDING])
    fakes.write_release_folder(tmp_path / "apart", config, tensors=tensors)
    tied = config is fakes.CONFIG
    expected = pytest.warns(UserWarning, match="output head that differs from its embedding")
    with expected if tied else contextlib.nullcontext():
        model = load(tmp_path / "apart")
    assert_same_weights(model, tensors)
    model.save_pretrained(tmp_path / "saved")
    with in_silence():
        assert_same_weights(load(tmp_path / "saved"), tensors)


def test_a_stored_head_that_equals_its_embedding_stays_tied(folder):
    tensors = fakes.weights()
    tensors[HEAD] = tensors[EMBEDDING].clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    with in_silence():
        model = load(folder)
    assert model.showo.lm_head.weight is model.showo.model.embed_tokens.weight


def test_a_head_of_another_size_is_named(folder):
    tensors = fakes.weights()
    tensors[HEAD] = tensors[HEAD][:-1].clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="differs"):
        text = refusal(folder)
    assert f"1 misshapen ({HEAD} is [{fakes.VOCAB_SIZE - 1}, 48], should be [{fakes.VOCAB_SIZE}, 48])" in text


def test_a_vocabulary_that_the_config_does_not_give_is_the_llms_own(folder):
    edit(folder / "config.json", llm_vocab_size=None)
    assert_same_weights(load(folder), fakes.weights())
    edit(folder / "llm" / "config.json", vocab_size=7)
    assert "misshapen" in refusal(folder)
    edit(folder / "llm" / "config.json", vocab_size=None)
    assert "llm_vocab_size is not set, and its LLM ('llm') has no vocab_size" in refusal(folder)


SIGLIP = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "siglip",
    [
        {"model_type": "siglip", "vision_config": {**SIGLIP, "image_size": 59, "patch_size": 14}},
        {"model_type": "siglip_vision_model", **SIGLIP, "image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6},
    ],
    ids=["of a whole SigLIP", "of its vision model"],
)
def test_the_semantic_layers_are_of_the_size_of_the_siglip_that_the_config_names(folder, siglip):
    name_siglip(folder, siglip)
    model = load(folder)
    assert model.config.vision == fakes.CONFIG.vision
    assert_same_weights(model, fakes.weights())


@pytest.mark.parametrize(
    ("siglip", "told"),
    [
        ({"model_type": "clip"}, "is a 'clip' model; Show-o2's vision is a SigLIP's"),
        ({"vision_config": [1]}, "vision_config is a JSON list"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
        ({"vision_config": {"patch_size": 0}}, "patch_size is 0"),
        ({"vision_config": {"num_hidden_layers": 1}}, "its layers but the last"),
    ],
)
def test_a_siglip_that_cannot_be_is_named(folder, siglip, told):
    name_siglip(folder, siglip)
    text = refusal(folder)
    assert str(folder / "siglip" / "config.json") in text
    assert told in text


def test_a_siglip_that_is_not_there_is_named(folder):
    name_siglip(folder, {})
    edit(folder / "config.json", clip_pretrained_model_path="/no/such/siglip")
    assert "names a SigLIP (clip_pretrained_model_path) that is not there: no such checkpoint folder" in refusal(folder)


def name_siglip(folder, config):
    """Have a release's config leave its semantic layers' sizes to a SigLIP folder."""
    file = folder / "config.json"
    data = json.loads(file.read_text())
    del data["vision_config"]
    file.write_text(json.dumps({**data, "clip_pretrained_model_path": "siglip"}))
    (folder / "siglip").mkdir()
    (folder / "siglip" / "config.json").write_text(json.dumps({"model_type": "siglip", **config}))


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD])
def test_a_tied_checkpoint_may_name_its_shared_tensor_either_way(folder, kept):
    expected = fakes.weights()
    (dropped,) = {EMBEDDING, HEAD} - {kept}
    torch.save({key: tensor for key, tensor in expected.items() if key != dropped}, folder / "pytorch_model.bin")
    model = load(folder)
    assert_same_weights(model, expected)
    assert model.showo.lm_head.weight is model.showo.model.embed_tokens.weight


def test_an_untied_checkpoint_must_have_its_head(tmp_path):
    fakes.write_release_folder(tmp_path, UNTIED)
    tensors = fakes.weights(UNTIED)
    del tensors[HEAD]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert f"1 missing ({HEAD})" in refusal(tmp_path)


def test_weights_saved_by_the_hubs_own_function_load(folder):
    (folder / "pytorch_model.bin").unlink()
    save_torch_state_dict(fakes.weights(), folder)
    assert_same_weights(load(folder), fakes.weights())


def test_of_several_sets_of_shards_without_an_index_none_is_guessed(tmp_path):
    fakes.write_release_folder(tmp_path, layout="sharded bin, no index")
    torch.save({}, tmp_path / "pytorch_model-00001-of-00001.bin")
    assert "holds several sets of shards, of 1 and 4 files, and no index" in refusal(tmp_path)


def test_one_file_is_not_hidden_by_an_index_that_is_left_of_another_name(folder):
    (folder / "pytorch_model.bin").unlink()
    fakes.write_weights(folder, fakes.weights(seed=2), "safetensors")
    fakes.write_index(folder / "diffusion_pytorch_model.safetensors.index.json", {"a": "gone.safetensors"})
    assert_same_weights(load(folder), fakes.weights(seed=2))


@pytest.mark.parametrize("second", [("safetensors", "5GB"), ("safetensors", "200KB"), ("release", "10GB")])
@pytest.mark.parametrize("first", [("safetensors", "5GB"), ("safetensors", "200KB"), ("release", "200KB")])
def test_what_is_saved_last_is_what_loads(tmp_path, monkeypatch, first, second):
    for seed, (layout, shard_size) in enumerate((first, second)):
        pattern, index, _ = weights.LAYOUTS[layout]
        monkeypatch.setitem(weights.LAYOUTS, layout, (pattern, index, shard_size))
        model = random_model(Showo2Qwen2_5, fakes.CONFIG, seed)
        model.save_pretrained(tmp_path, layout=layout)
        assert_same_weights(load(tmp_path), model.state_dict())
        (tmp_path / "pytorch_model.ema.bin").touch()  # a variant, which nobody asks for, stays
    assert (tmp_path / "pytorch_model.ema.bin").exists()


@pytest.mark.parametrize("layout", ["safetensors", "release"])
def test_an_untied_model_whose_file_shares_its_head_can_be_saved(tmp_path, layout):
    tensors = fakes.weights()  # one tensor under two names
    fakes.write_release_folder(tmp_path / "source", UNTIED, tensors=tensors)
    load(tmp_path / "source").save_pretrained(tmp_path / "saved", "bfloat16", layout)
    assert_same_weights(load(tmp_path / "saved"), {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_a_full_disk_is_told_in_one_line(tmp_path):
    """A limit on the size of files stands in for one. In the layout whose writer tells it in the oddest way."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        outcome = flashu("convert", "embedded", tmp_path / "out", "--layout", "release")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(outcome, "cannot be written")
    assert list(tmp_path.iterdir()) == []


@both_kinds
@pytest.mark.parametrize("shard_size", ["5GB", "200KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_loads_back_bit_for_bit(tmp_path, monkeypatch, config, shard_size, dtype):
    model = random_model(Showo2Qwen2_5, config, seed=1, dtype=getattr(torch, dtype))
    pattern, index, _ = weights.LAYOUTS["safetensors"]
    monkeypatch.setitem(weights.LAYOUTS, "safetensors", (pattern, index, shard_size))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "200KB")
    again = load(tmp_path)
    assert_same_weights(again, model.state_dict())
    assert replace(again.config, llm_model_path="") == config


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@both_kinds
def test_diffusers_loads_what_is_saved_in_the_releases_layout(tmp_path, monkeypatch, config, dtype):
    """Its own loading code, with which the release's is one but for the names of single files."""
    pattern, index, _ = weights.LAYOUTS["release"]
    monkeypatch.setitem(weights.LAYOUTS, "release", (pattern, index, "200KB"))
    model = random_model(Showo2Qwen2_5, replace(config, llm_model_path="llm"), seed=1)
    model.save_pretrained(tmp_path, dtype, "release")
    number_format = getattr(torch, dtype or "float32")
    theirs = (
        diffusers_model().from_pretrained(tmp_path, use_safetensors=False, low_cpu_mem_usage=False).to(number_format)
    )  # which the release's scripts do after loading
    expected = {key: value.to(number_format) for key, value in model.state_dict().items()}
    assert_same_weights(theirs, expected)
    assert_same_weights(load(tmp_path), expected)
    told = {"llm_vocab_size": fakes.VOCAB_SIZE, "llm_model_path": "llm", "load_from_showo": True, "hidden_size": 48}
    assert told.items() <= dict(theirs.config).items()


def diffusers_model():
    """A model of diffusers' with the constructor of the release's, over a network of the same parameters."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Showo2Qwen2_5Released(ModelMixin, ConfigMixin):  # noqa: N801
        @register_to_config
        def __init__(
            self,
            llm_vocab_size=None,
            llm_model_path="",
            load_from_showo=False,
            image_latent_dim=16,
            image_latent_height=16,
            image_latent_width=16,
            video_latent_height=16,
            video_latent_width=16,
            patch_size=2,
            hidden_size=2048,
            clip_latent_dim=1152,
            num_diffusion_layers=10,
            add_time_embeds=True,
            add_qk_norm=False,
            clip_pretrained_model_path="google/siglip-so400m-patch14-384",
        ):
            super().__init__()
            for name, module in random_model(Showo2Qwen2_5, UNTIED, seed=9).named_children():
                self.add_module(name, module)

    return Showo2Qwen2_5Released


def test_one_file_in_the_releases_layout_holds_what_its_reader_asks_for(tmp_path):
    model = random_model(Showo2Qwen2_5, replace(fakes.CONFIG, llm_model_path="llm"), seed=1)
    model.save_pretrained(tmp_path, layout="release")
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert tensors.keys() == model.state_dict().keys()
    assert tensors[HEAD].data_ptr() == tensors[EMBEDDING].data_ptr()  # one tensor, and not twice in the file
    assert_same_weights(load(tmp_path), model.state_dict())


def test_a_released_config_is_written_as_the_release_writes_it(tmp_path):
    for name in ("show-o2-1.5b", "show-o2-7b", "show-o2-1.5b-hq-512"):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(PRESETS[name].to_release_dict()))
        data = json.loads(file.read_text())
        assert len([key for key in data if not key.startswith("_")]) == 15
        assert configs.read_config(file) == PRESETS[name]
        assert not PRESETS[name].unlike_released()
    assert PRESETS["embedded"].unlike_released()[0] == "it builds heads of hidden size 2048, not 192"


def test_a_layout_that_there_is_not_is_refused(tmp_path):
    model = random_model(Showo2Qwen2_5, fakes.CONFIG, seed=1)
    with pytest.raises(InputError, match="layout is 'gguf'; there are: safetensors, release"):
        model.save_pretrained(tmp_path / "saved", layout="gguf")
    assert not (tmp_path / "saved").exists()


def test_a_saved_model_is_readable_by_the_user_who_may_read_its_folder(tmp_path):
    random_model(Showo2Qwen2_5, fakes.CONFIG, seed=1).save_pretrained(tmp_path)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_without_a_dtype_weights_stay_as_they_are_stored(tmp_path, stored):
    fakes.write_release_folder(tmp_path, dtype=stored)
    assert_same_weights(load(tmp_path), fakes.weights(dtype=stored))


def test_without_a_dtype_mixed_weights_take_that_of_the_embedding(tmp_path):
    mixed = {
        key: value.bfloat16() if "embed" in key or "lm_head" in key else value for key, value in fakes.weights().items()
    }
    fakes.write_release_folder(tmp_path, tensors=mixed)
    assert {value.dtype for value in load(tmp_path).state_dict().values()} == {torch.bfloat16}


def test_float16_is_not_run_unless_converted(tmp_path):
    fakes.write_release_folder(tmp_path, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="stored as float16; load it with dtype set to one of: bfloat16, float32"):
        load(tmp_path)
    assert load(tmp_path, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_weights_are_converted_to_the_dtype_asked_for(tmp_path, layout, dtype):
    fakes.write_release_folder(tmp_path, layout=layout)
    model = load(tmp_path, dtype)
    assert model.dtype == torch.bfloat16
    assert_same_weights(model, {key: tensor.bfloat16() for key, tensor in fakes.weights().items()})


def test_bfloat16_weights_widen_exactly(tmp_path):
    fakes.write_release_folder(tmp_path, dtype=torch.bfloat16)
    stored = fakes.weights(dtype=torch.bfloat16)
    assert_same_weights(load(tmp_path, torch.float32), {key: tensor.float() for key, tensor in stored.items()})


@pytest.mark.parametrize("dtype", ["int7", torch.float16, torch.int64])
def test_a_dtype_that_cannot_be_run_is_refused_with_those_that_can(folder, dtype):
    with pytest.raises(InputError, match="bfloat16, float32"):
        load(folder, dtype)


def test_safetensors_are_preferred_to_a_pickle_beside_them(folder):
    fakes.write_weights(folder, fakes.weights(seed=5), "safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_same_weights(load(folder), fakes.weights(seed=5))


def test_the_llm_may_be_named_by_an_absolute_path(folder, tmp_path):
    (folder / "llm").rename(tmp_path / "elsewhere")
    edit(folder / "config.json", llm_model_path=str(tmp_path / "elsewhere"))
    assert load(folder).config.llm == fakes.LLM


def test_rope_theta_is_read_from_where_transformers_5_keeps_it(folder):
    file = folder / "llm" / "config.json"
    data = json.loads(file.read_text())
    data["rope_parameters"] = {"rope_type": "default", "rope_theta": data.pop("rope_theta") / 10}
    file.write_text(json.dumps(data))
    assert load(folder).config.llm.rope_theta == fakes.LLM.rope_theta / 10


@pytest.mark.parametrize(
    ("preset", "llm", "hidden_size", "side"),
    [
        ("show-o2-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 1536, 27),
        ("show-o2-1.5b-hq-1024", "Qwen/Qwen2.5-1.5B-Instruct", 1536, 64),
        ("show-o2-1.5b-hq-512", "Qwen/Qwen2.5-1.5B-Instruct", 1536, 32),
        ("show-o2-7b", "Qwen/Qwen2.5-7B-Instruct", 3584, 27),
    ],
)
def test_a_released_config_is_the_preset_of_its_name(tmp_path, preset, llm, hidden_size, side):
    released = {
        "_class_name": "Showo2Qwen2_5",
        "_diffusers_version": "0.30.1",
        "add_qk_norm": True,
        "add_time_embeds": True,
        "clip_latent_dim": 1152,
        "clip_pretrained_model_path": "google/siglip-so400m-patch14-384",
        "hidden_size": hidden_size,
        "image_latent_dim": 16,
        "image_latent_height": side,
        "image_latent_width": side,
        "llm_model_path": llm,
        "llm_vocab_size": 151669,
        "load_from_showo": False,
        "num_diffusion_layers": 10,
        "patch_size": 2,
        "video_latent_height": 27,
        "video_latent_width": 27,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(released))
    assert configs.read_config(file) == PRESETS[preset]


# ---------------------------------------------------------------------------------------------------- in memory


LOADER = """
import json, sys
from flashu import Showo2Qwen2_5
for folder in sys.stdin:
    model = Showo2Qwen2_5.from_pretrained(json.loads(folder), dtype="bfloat16")
    print(sum(p.nbytes for p in model.parameters()), flush=True)
    del model
"""


@pytest.fixture(scope="module")
def loader():
    """A process that loads the folders it is told, one after the other."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with process:
        yield process
        process.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["bin", "safetensors"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["as stored", "converted"])
def test_loading_holds_one_copy_of_the_weights(tmp_path, loader, layout, stored):
    """File-backed pages, which the kernel may drop, do not count: a mapped checkpoint costs next to nothing."""
    megabytes = 1e6
    config = replace(fakes.CONFIG, llm=LlmGeometry(1024, 4096, 6, 8, 2, tie_word_embeddings=True))
    fakes.write_release_folder(tmp_path, config, layout=layout, tensors=zeros(config, stored))
    warm_up = fakes.write_release_folder(tmp_path / "warm-up")
    anonymous_peak(loader, warm_up)  # imports, thread pools

    before = anonymous_bytes(loader.pid)
    peak, model_bytes = anonymous_peak(loader, tmp_path)
    assert model_bytes > 150 * megabytes
    copies = 0 if stored == torch.bfloat16 else 1.15
    assert peak - before < copies * model_bytes + 30 * megabytes


def zeros(config, dtype):
    with torch.device("meta"):
        state = Showo2Qwen2_5(config).state_dict()
    return {key: torch.zeros(tensor.shape, dtype=dtype) for key, tensor in state.items() if key != HEAD}


def anonymous_peak(loader, folder):
    """The most memory that the loader had while it loaded `folder`, and the loaded model's size, in bytes."""
    loader.stdin.write(json.dumps(str(folder)) + "\n")
    peak = 0
    while not select.select([loader.stdout], [], [], 0.001)[0]:
        peak = max(peak, anonymous_bytes(loader.pid))
    return peak, int(loader.stdout.readline())


def anonymous_bytes(pid):
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    return int(fields["RssAnon"].removesuffix("kB")) * 1024


# ----------------------------------------------------------------------------------------- what does not belong


def test_misfits_of_every_kind_are_told_in_one_error(folder):
    tensors = fakes.weights()
    del tensors["fusion_proj.1.bias"]
    tensors["lora.weight"] = torch.zeros(1)
    tensors["time_embed.mlp.0.bias"] = torch.zeros(7)
    torch.save(tensors, folder / "pytorch_model.bin")
    text = refusal(folder)
    assert str(folder) in text
    assert "1 missing (fusion_proj.1.bias)" in text
    assert "1 unexpected (lora.weight)" in text
    assert "1 misshapen (time_embed.mlp.0.bias is [7], should be [64])" in text


def test_buffers_that_older_releases_of_transformers_saved_are_passed_over(folder):
    tensors = fakes.weights()
    tensors["showo.model.rotary_emb.inv_freq"] = torch.zeros(6)
    tensors["und_trans.embeddings.position_ids"] = torch.zeros(1, 16, dtype=torch.int64)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_same_weights(load(folder), fakes.weights())


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "describes a 'AutoencoderKLWan', not a Show-o2"),
        ({"add_time_embeds": False}, "add_time_embeds is false"),
        ({"patch_size": 4}, "patch_size is 4; only 2 is supported"),
        ({"hidden_size": 2048}, "hidden_size is 2048, but its LLM ('llm') has hidden size 48"),
        ({"clip_latent_dim": 1152}, "clip_latent_dim is 1152, but its SigLIP ('google/siglip-so400m-patch14-384') has"),
        ({"llm_model_path": ""}, "names no LLM (llm_model_path)"),
        ({"llm_model_path": 7}, "names no LLM (llm_model_path)"),
        ({"llm_config": {"hidden_size": 48}}, "incomplete LlmGeometry"),
        ({"llm_config": None}, "llm_config"),
        ({"vision_config": None}, "vision_config"),
        ({"head_config": [1]}, "head_config"),
        ({"num_diffusion_layers": "10"}, "num_diffusion_layers"),
        ({"llm_vocab_size": -4}, "llm_vocab_size"),
        ({"image_latent_height": None}, "image_latent_height"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_config_of_something_else_is_named_with_the_key_that_does_not_fit(folder, keys, told):
    edit(folder / "config.json", **keys)
    text = refusal(folder)
    assert str(folder / "config.json") in text
    assert told in text


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model_type": "llama"}, "is a 'llama' model; Show-o2's LLM is a qwen2"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"rope_parameters": [1]}, "rope_parameters"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_an_llm_that_is_no_qwen2_is_named_with_the_key_that_does_not_fit(folder, keys, told):
    edit(folder / "llm" / "config.json", **keys)
    text = refusal(folder)
    assert str(folder / "llm" / "config.json") in text
    assert told in text


def test_an_llm_of_another_width_is_told_with_both_widths(folder):
    edit(folder / "llm" / "config.json", hidden_size=64)
    assert "hidden_size is 48, but its LLM ('llm') has hidden size 64" in refusal(folder)


def test_an_llm_that_is_not_there_is_named(folder):
    edit(folder / "config.json", llm_model_path="/no/such/llm")
    assert "no such checkpoint folder: /no/such/llm" in refusal(folder)


# ------------------------------------------------------------------------------------------------ what is damaged


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x80", b"[1]", b"null"])
@pytest.mark.parametrize("name", ["config.json", "llm/config.json", "model.safetensors.index.json"])
def test_garbage_json_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    text = refusal(folder)
    assert str(folder / name) in text
    assert "cannot be read as JSON" in text or "not an object" in text


@pytest.mark.parametrize("size", [0, 7, 100, 10_000, -1])
def test_truncated_safetensors_are_named_as_damaged(tmp_path, size):
    fakes.write_release_folder(tmp_path, layout="safetensors")
    cut(tmp_path / "model.safetensors", size)
    assert f"{tmp_path / 'model.safetensors'} is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 30, 100, 1000, 10_000, -1000, -1])
@pytest.mark.parametrize("layout", ["bin", "legacy bin"])
def test_a_truncated_bin_is_named_as_damaged(tmp_path, layout, size):
    fakes.write_release_folder(tmp_path, layout=layout)
    cut(tmp_path / "pytorch_model.bin", size)
    assert f"{tmp_path / 'pytorch_model.bin'} is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("layout", ["bin", "legacy bin", "safetensors"])
def test_a_flipped_byte_is_refused_or_spoils_numbers_only(tmp_path, layout):
    fakes.write_release_folder(tmp_path, layout=layout)
    (file,) = (file for file in tmp_path.iterdir() if file.suffix in (".bin", ".safetensors"))
    whole, names = file.read_bytes(), fakes.weights().keys()
    for position in range(0, 6000, 200):
        damaged = bytearray(whole)
        damaged[position] ^= 0b0100_0001
        file.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            assert load(tmp_path).state_dict().keys() == names


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"<!DOCTYPE html>\n<html>"]
)
def test_a_page_or_a_pointer_in_place_of_weights_is_named_as_damaged(folder, name, content):
    (folder / name).write_bytes(content)
    assert f"{folder / name} is damaged" in refusal(folder)


class RunsCode:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("writer", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_before_it_runs(folder, tmp_path, writer):
    trace = tmp_path / "the code ran"
    data, file = {**fakes.weights(), "payload": RunsCode(trace)}, folder / "pytorch_model.bin"
    if writer == "plain pickle":
        file.write_bytes(pickle.dumps(data["payload"], protocol=2))
    else:
        torch.save(data, file, _use_new_zipfile_serialization=writer == "zip")
    text = refusal(folder)
    assert not trace.exists()
    assert str(file) in text
    assert "could run code" in text
    assert ".safetensors" in text


def test_a_vae_pickle_that_would_run_code_is_refused_before_it_runs(tmp_path):
    trace, file = tmp_path / "the code ran", tmp_path / fakes.VAE_FILE
    torch.save({**fakes.released_vae(), "payload": RunsCode(trace)}, file)
    with pytest.raises(CheckpointError, match="could run code"):
        WanImageVAE.from_pretrained(file)
    assert not trace.exists()


@pytest.mark.parametrize(
    "data",
    [[1, 2], torch.zeros(3), {"state_dict": {"a": torch.zeros(1)}}, {"a": 1}, {1: torch.zeros(1)}],
    ids=["list", "tensor", "nested", "numbers", "numbered"],
)
def test_a_bin_of_something_else_is_told_what_it_should_hold(folder, data):
    torch.save(data, folder / "pytorch_model.bin")
    assert f"{folder / 'pytorch_model.bin'} does not hold a flat dictionary of tensors" in refusal(folder)


def test_weights_that_are_whole_numbers_are_refused(folder):
    tensors = fakes.weights()
    tensors["fusion_proj.1.bias"] = tensors["fusion_proj.1.bias"].long()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "fusion_proj.1.bias" in refusal(folder)


# ------------------------------------------------------------------------------------------------ what is missing


def test_a_missing_shard_is_named(tmp_path):
    fakes.write_release_folder(tmp_path, layout="sharded safetensors")
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    text = refusal(tmp_path)
    assert str(tmp_path) in text
    assert "lacks 1 of 4 shards that model.safetensors.index.json names: model-00002-of-00004.safetensors" in text


@pytest.mark.parametrize("outside", ["../x.safetensors", "/etc/passwd", "llm/../../x.safetensors", "."])
def test_an_index_that_points_out_of_its_folder_is_refused(folder, tmp_path, outside):
    fakes.write_weights(tmp_path, fakes.weights(), "safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    fakes.write_index(index, dict.fromkeys(fakes.weights(), outside))
    assert f"{index} names files outside its own folder: {outside}" in refusal(folder)


@pytest.mark.parametrize(
    "weight_map", [{}, ["a"], None, {"a": 1}, {"a": None}, {"a": ["model.safetensors"]}], ids=json.dumps
)
def test_an_index_without_file_names_is_refused(folder, weight_map):
    index = folder / "model.safetensors.index.json"
    fakes.write_index(index, weight_map)
    text = refusal(folder)
    assert str(index) in text
    assert "weight_map" in text


def test_an_empty_folder_is_told_what_it_lacks(tmp_path):
    assert f"{tmp_path} has no config.json; it is not a Show-o2 checkpoint folder" in refusal(tmp_path)


def test_a_folder_without_weights_is_told_what_it_has_and_what_was_looked_for(folder):
    (folder / "pytorch_model.bin").unlink()
    text = refusal(folder)
    assert f"{folder} holds no weights" in text
    assert "It has config.json, llm/" in text
    assert "pytorch_model.bin, model.safetensors.index.json" in text


def test_a_file_is_told_to_be_a_file(folder):
    file = folder / "pytorch_model.bin"
    assert f"{file} is a file; give the checkpoint's folder" in refusal(file)


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-folder", "./a/b", "a/b/c", "~nobody-here/x", "x" * 5000])
def test_a_folder_that_is_not_there_is_named(name):
    assert refusal(name) == f"no such checkpoint folder: {name}"
