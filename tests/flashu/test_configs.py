"""LLM and SigLIP configs as transformers' own classes write and read them; what is refused; when it is imported."""

import json
import os
import subprocess
import sys

import pytest

from flashu import CheckpointError
from flashu.checkpoints.configs import read_llm_geometry, read_vision_geometry
from flashu.models.geometry import LlmGeometry, VisionGeometry

LLM = LlmGeometry(96, 160, 3, 6, 2, tie_word_embeddings=True, rope_theta=3e5, rms_norm_eps=1e-5, vocab_size=700)
SIZES = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "vocab_size": 700,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64,
    "patch_size": 16, "layer_norm_eps": 1e-5,
}  # fmt: skip


def written(folder, **data):
    (folder / "config.json").write_text(json.dumps(data))
    return folder / "config.json"


def refusal(read, file):
    with pytest.raises(CheckpointError) as raised:
        read(file)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------------- the LLM


def test_an_llms_config_of_transformers_own_making(tmp_path):
    from transformers import Qwen2Config

    Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 3e5}).save_pretrained(tmp_path)
    assert read_llm_geometry(tmp_path / "config.json") == LLM


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 3e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 3e5},
        {"rope_parameters": None, "rope_theta": 300_000},
    ],
)
def test_rope_theta_is_found_where_any_version_of_transformers_keeps_it(tmp_path, rope):
    assert read_llm_geometry(written(tmp_path, model_type="qwen2", **SIZES, **rope)) == LLM


def test_what_an_llms_config_leaves_out_is_as_in_transformers(tmp_path):
    from transformers import Qwen2Config

    default = Qwen2Config()
    geometry = read_llm_geometry(written(tmp_path))
    for key in SIZES:
        assert getattr(geometry, key) == getattr(default, key)
    assert geometry.rope_theta == default.rope_parameters["rope_theta"]


def test_other_keys_of_an_llms_config_are_none_of_ours(tmp_path):
    other = {"torch_dtype": "no such", "layer_types": ["?"], "auto_map": {"AutoConfig": "x.Y"}, "id2label": 7}
    assert read_llm_geometry(written(tmp_path, **SIZES, **other, rope_theta=3e5)) == LLM


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; it must be a positive whole number"),
        ({"num_key_value_heads": None}, "num_key_value_heads is None; it must be a positive whole number"),
        ({"vocab_size": True}, "vocab_size is True; it must be a positive whole number"),
        ({"rope_theta": "large"}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_an_llm_that_cannot_be_is_named_with_the_key(tmp_path, keys, told):
    assert told in refusal(read_llm_geometry, written(tmp_path, **SIZES | keys))


# ---------------------------------------------------------------------------------------------------------- SigLIP


@pytest.mark.parametrize("whole", [True, False], ids=["of a whole SigLIP", "of its vision model"])
def test_a_siglips_config_of_transformers_own_making(tmp_path, whole):
    from transformers import SiglipConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(**SIGLIP)
    (SiglipConfig(vision_config=vision.to_dict()) if whole else vision).save_pretrained(tmp_path)
    assert read_vision_geometry(tmp_path / "config.json") == VisionGeometry(48, 88, 3, 4, grid=4, layer_norm_eps=1e-5)


@pytest.mark.parametrize("data", [{"model_type": "siglip"}, {"model_type": "siglip", "vision_config": {}}, {}])
def test_what_a_siglips_config_leaves_out_is_as_in_transformers(tmp_path, data):
    from transformers import SiglipVisionConfig

    default, geometry = SiglipVisionConfig(), read_vision_geometry(written(tmp_path, **data))
    assert geometry.hidden_size == default.hidden_size
    assert geometry.num_hidden_layers == default.num_hidden_layers - 1
    assert geometry.grid == default.image_size // default.patch_size


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"image_size": [64, 64]}, "image_size is [64, 64]; it must be a positive whole number"),
        ({"image_size": 8}, "its image's patches, must be at least one"),
        ({"num_attention_heads": None}, "num_attention_heads is None; it must be a positive whole number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only gelu_pytorch_tanh is supported"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
    ],
)
def test_a_siglip_that_cannot_be_is_named_with_the_key(tmp_path, keys, told):
    file = written(tmp_path, model_type="siglip_vision_model", **SIGLIP | keys)
    assert told in refusal(read_vision_geometry, file)


# ------------------------------------------------------------------------------------------------------ on demand


@pytest.mark.parametrize(
    "code",
    [
        "from jobs.cli.main import app",
        "import flashu.models, flashu.pipeline, flashu.answering",
        "from flashu.checkpoints.configs import read_config; from flashu.checkpoints.files import *; "
        "read_config(EMBEDDED_FOLDER / CONFIG)",
        "from flashu.tokenizer import PromptTokenizer; PromptTokenizer.from_pretrained('embedded')",
    ],
    ids=["the command", "the library", "the built-in model's config", "its tokenizer"],
)
def test_transformers_is_not_imported_for(code):
    """It takes seconds."""
    command = [sys.executable, "-c", f"import sys\n{code}\nassert 'transformers' not in sys.modules"]
    outcome = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert outcome.returncode == 0, outcome.stderr
