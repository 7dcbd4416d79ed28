"""What a run loads is looked for before Ray starts: an error where this machine must have it, a warning where the nodes
of a cluster may."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from cluster.open_storage import open_storage
from cluster.storage import S3Options, StorageError
from flashu.checkpoints.files import EMBEDDED_FOLDER, find_tokenizer
from flashu.errors import InputError
from jobs.settings.config import read_config
from jobs.settings.inputs import check_inputs, small_files
from tests import fakes
from tests.command import assert_refused, flashu

ON_CLUSTER = "cluster.address=10.0.0.1:6379"


@pytest.fixture(autouse=True)
def no_hub_and_no_cluster(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def model(tmp_path):
    """A copy of the built-in model's folder, which a test may spoil."""
    shutil.copytree(EMBEDDED_FOLDER, tmp_path / "model")
    return tmp_path / "model"


def looked_at(*overrides):
    return check_inputs(read_config("demo", overrides))


def refusal(*overrides):
    with pytest.raises((InputError, StorageError)) as error:
        looked_at(*overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_there_is_no_matter(model):
    for overrides in (
        [],
        [f"model.path={model}"],
        [f"model.vae={model}/vae", f"model.tokenizer={model}/tokenizer/tokenizer.json"],
        ["model.vae=embedded", "model.tokenizer=embedded"],
        [f"model.vae={model}/vae/model.safetensors", f"model.tokenizer={model}"],
    ):
        assert looked_at(*overrides) == []
        assert looked_at(*overrides, ON_CLUSTER) == []


@pytest.mark.parametrize("name", ["model.path", "model.vae", "model.tokenizer", "quality.clip"])
@pytest.mark.parametrize("path", ["/no/such/model", "./nowhere", "nowhere", "a/b/c", "~no-such-user/x", "x" * 5000])
def test_a_folder_that_does_not_exist_is_told_with_what_can_be_given(name, path):
    told = refusal(f"{name}={path}")
    assert told.startswith(f"{name}: no such checkpoint folder: {path[:40]}")
    assert told.endswith("; give a folder, a hub id (OWNER/NAME) or an s3:// folder")


@pytest.mark.parametrize("name", ["model.path", "model.vae", "model.tokenizer", "quality.clip"])
def test_a_hub_id_that_cannot_be_had_is_told(name):
    told = refusal(f"{name}=nobody/nothing")
    assert told.startswith(
        f"{name}: 'nobody/nothing' is neither a local folder nor a hub id that can be loaded: the hub "
    )
    for no_id in ("a/-b", "a/b--c", "a/..b"):
        assert refusal(f"{name}={no_id}").startswith(f"{name}: ")
    assert refusal(f"{name}=gs://bucket/model").startswith(f"{name} cannot be read from gs://; give a folder")


def test_a_folder_that_holds_something_else_is_told(model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    empty, file = tmp_path / "empty", tmp_path / "file"
    for overrides, told in (
        ([f"model.path={empty}"], f"model.path: {empty} has no config.json; it is not a Show-o2 checkpoint folder"),
        ([f"model.path={file}"], f"model.path: {file} is a file; give the checkpoint's folder"),
        ([f"model.vae={empty}"], f"model.vae: {empty} holds no weights. It has no files; looked for "),
        ([f"model.tokenizer={empty}"], f"model.tokenizer: {empty} holds no tokenizer.json"),
        ([f"model.tokenizer={empty}/tokenizer.json"], f"model.tokenizer: there is no file {empty}/tokenizer.json"),
        ([f"flashu.scores={empty}"], f"flashu.scores: {empty} is a folder; give a file"),
        ([f"flashu.scores={empty}/x"], f"flashu.scores: there is no file {empty}/x"),
        (
            [f"flashu.scores={file}"],
            f"flashu.scores: {file} is not a file of Wanda scores (flashu calibrate makes them)",
        ),
        ([f"quality.clip={empty}"], f"quality.clip: {empty} has no config.json; it is no checkpoint of transformers"),
    ):
        assert refusal(*overrides).startswith(told)
    assert looked_at(f"quality.clip={empty}", "quality.enabled=false") == []

    (model / "model.safetensors").unlink()
    assert refusal(f"model.path={model}").startswith(f"model.path: {model} holds no weights. It has README.md")
    (model / "config.json").write_text(json.dumps({"_class_name": "Other"}))
    assert "describes a 'Other', not a Show-o2 (Showo2Qwen2_5) model" in refusal(f"model.path={model}")
    (model / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in refusal(f"model.path={model}")


def test_what_is_to_be_beside_a_model_and_is_not_is_told(model):
    shutil.rmtree(model / "vae")
    told = refusal(f"model.path={model}")
    assert told.startswith("model.vae is not set, and the model has none beside it: 'Wan-AI/Wan2.1-T2V-14B' is neither")
    shutil.rmtree(model / "tokenizer")
    told = refusal(f"model.path={model}", "model.vae=embedded")
    assert told.startswith(f"{model} has no tokenizer, and names none; set model.tokenizer (give a folder, a hub id")
    assert looked_at(f"model.path={model}", "model.vae=embedded", "model.tokenizer=embedded") == []


@pytest.mark.parametrize("setting", ["model.path=/no/model", "model.vae=/no/vae", "model.path=nobody/nothing"])
def test_what_a_clusters_nodes_may_have_is_a_warning_there(monkeypatch, setting):
    [warning] = looked_at(setting, ON_CLUSTER)
    assert warning.startswith(f"Warning: {setting.partition('=')[0]}: ")
    assert warning.endswith("That is on this machine; workers look on their nodes")
    assert "name the cluster, as in cluster.address=auto" in refusal("model.path=/no/model", "cluster.address=null")
    assert "name the cluster" not in refusal("model.path=/no/model", "cluster.address=local")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # as `ray job submit` sets it
    assert len(looked_at(setting, "cluster.address=null")) == 1
    refusal(setting, "cluster.address=local")


@pytest.mark.parametrize("path", ["./nowhere", "nowhere", "a/b/c", "gs://bucket/model"])
def test_what_can_be_meant_on_no_machine_is_an_error_on_a_cluster_too(path):
    assert refusal(f"model.path={path}", ON_CLUSTER).startswith("model.path")


def test_what_is_in_s3_is_looked_for_there(bucket, model):
    storage = open_storage(bucket.url, S3Options(bucket.endpoint_url, path_style=True))
    s3 = (f"storage.endpoint_url={bucket.endpoint_url}", "storage.path_style=true", "cluster.address=null")
    url = f"{bucket.url}/m"

    def put(*names):
        for name in names:
            storage.put(f"m/{name}", (model / name).read_bytes())

    assert refusal(*s3, f"model.path={url}") == f"model.path: {url} holds none of config.json"
    put("config.json")
    assert refusal(*s3, f"model.path={url}/").startswith(f"model.path: {url}/ holds no weights. It has config.json")
    put("model.safetensors")
    assert refusal(*s3, f"model.path={url}").startswith("model.vae is not set, and the model has none beside it: ")
    put("vae/config.json", "vae/model.safetensors")
    assert f"{url} has no tokenizer, and names none" in refusal(*s3, f"model.path={url}")
    put("tokenizer/tokenizer.json")
    assert looked_at(*s3, f"model.path={url}") == []
    words = f"model.tokenizer={url}/tokenizer/tokenizer.json"
    for vae in ("vae/", "vae/model.safetensors"):
        assert looked_at(*s3, f"model.vae={url}/{vae}", words, f"quality.clip={url}") == []
    for name in ("model.vae", "flashu.scores"):
        assert refusal(*s3, f"{name}={url}/nowhere", ON_CLUSTER).startswith(f"{name}: {url}/nowhere ")
    storage.put("m/config.json", b'{"_class_name": "Other"}')
    assert refusal(*s3, f"model.path={url}").startswith(f"model.path: {url}/config.json describes a 'Other'")
    nowhere = f"model.path=s3://{bucket.name}-nowhere/m"
    assert "nowhere" in refusal(*s3, nowhere)


def test_a_tokenizer_may_be_a_vocabulary_with_its_merges_here_and_in_s3(bucket, model, tmp_path):
    words = tmp_path / "words"
    fakes.write_slow_tokenizer(words, fakes.small_vocabulary(), fakes.MERGES)
    assert looked_at(f"model.tokenizer={words}") == []
    shutil.rmtree(model / "tokenizer")
    shutil.copytree(words, model / "tokenizer")
    assert looked_at(f"model.path={model}") == []

    s3 = S3Options(bucket.endpoint_url, path_style=True)
    storage = open_storage(bucket.url, s3)
    settings = (f"storage.endpoint_url={bucket.endpoint_url}", "storage.path_style=true", "cluster.address=null")
    storage.put("words/vocab.json", (words / "vocab.json").read_bytes())
    here = f"model.tokenizer={bucket.url}/words"
    assert refusal(*settings, here) == (
        f"model.tokenizer: {bucket.url}/words holds none of tokenizer.json, tokenizer/tokenizer.json"
    )
    for file in words.iterdir():
        storage.put(f"words/{file.name}", file.read_bytes())
        storage.put(f"beside/tokenizer/{file.name}", file.read_bytes())
    assert looked_at(*settings, here) == []
    for place in ("words", "beside"):
        folder = small_files(f"{bucket.url}/{place}", s3, tmp_path / "copies" / place)
        assert {file.name for file in find_tokenizer(folder).parent.iterdir()} == {
            file.name for file in words.iterdir()
        }


def test_a_size_that_the_hq_model_was_not_made_for_is_told(model, tmp_path):
    hq = model.rename(tmp_path / "Show-o2-1.5B-HQ")
    (warning,) = looked_at(f"model.path={hq}")
    assert warning.startswith(f"Warning: sampling.size is not set. {hq} is made for 512x512 and 1024x1024 pixels")
    assert looked_at(f"model.path={hq}", "sampling.size=64") == []


def test_it_is_told_before_torch_is_imported(tmp_path):
    code = "import sys; sys.modules['torch'] = sys.modules['ray'] = None\nfrom jobs.cli.main import main; main()"
    command = [sys.executable, "-c", code, "run", "demo", f"output.path={tmp_path / 'run'}", "model.path=/no/such"]
    outcome = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("flashu: model.path: no such checkpoint folder: /no/such")
    assert not (tmp_path / "run").exists()


def test_a_judge_that_cannot_be_had_is_told_before_the_first_image(tmp_path):
    settings = (f"output.path={tmp_path / 'dpg'}", "cluster.address=local")
    for vqa, told in (("hf:nobody/nothing", "hf:nobody/nothing: 'nobody/nothing' is neither"), ("hf:/no", "hf:/no: ")):
        assert_refused(flashu("dpg", "--demo", *settings, f"vqa={vqa}"), told)
    assert_refused(flashu("dpg", "--demo", *settings, "model.path=/no/model"), "model.path: no such checkpoint folder")
    assert not (tmp_path / "dpg").exists()
