"""Configs of a run as a person writes them: what is read, and how mistakes are told."""

import pytest
import yaml

from flashu.errors import InputError
from jobs.config import BUILT_IN, RunConfig, read_config

BUILT_INS = sorted(file.stem for file in BUILT_IN.glob("*.yaml"))


@pytest.fixture
def written(tmp_path):
    """A config file with this text."""

    def write(text):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return str(file)

    return write


def test_the_written_defaults_are_the_defaults():
    written, defaults = yaml.safe_load((BUILT_IN / "default.yaml").read_text()), RunConfig().to_dict()
    assert (written["flashu"].pop("preset"), defaults["flashu"].pop("preset")) == ("auto", "embedded")
    assert written == defaults
    assert read_config(None) == RunConfig()


@pytest.mark.parametrize(
    ("model", "preset"), [("embedded", "embedded"), ("showlab/show-o2-1.5B", "paper-1.5b"), ("s3://b/m", "paper-1.5b")]
)
def test_the_preset_is_the_one_for_the_model_unless_another_is_named(model, preset):
    assert read_config(None, [f"model.path={model}"]).flashu.preset == preset
    assert read_config(None, [f"model.path={model}", "flashu.preset=fast"]).flashu.preset == "fast"


@pytest.mark.parametrize("name", BUILT_INS)
def test_every_built_in_config_reads_and_says_what_its_file_says(name):
    config = read_config(name).to_dict()
    for section, settings in yaml.safe_load((BUILT_IN / f"{name}.yaml").read_text()).items():
        if settings.get("preset") == "auto":
            settings["preset"] = "embedded"
        assert config[section] | settings == config[section]


def test_later_settings_go_before_earlier_ones_and_both_before_the_defaults(written):
    file = written("sampling:\n  seed: 1\n  num_images: 4\n")
    config = read_config(file, ["sampling.seed=2", "sampling.seed=3", "output.path=s3://bucket/a=b"])
    assert (config.sampling.seed, config.sampling.num_images, config.sampling.time_shift) == (3, 4, 3.0)
    assert config.output.path == "s3://bucket/a=b"


def test_a_file_goes_before_a_built_in_config_of_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("sampling: {seed: 5}")
    assert read_config("demo").sampling.seed == 5


def test_lists_mappings_and_nothing_can_be_given_on_the_command_line():
    config = read_config(
        None, ["flashu.schedule=[[4,5.0],[8,7.5]]", "manifest.columns.prompt=caption", "sampling.time_shift=null"]
    )
    assert config.flashu.schedule == [[4, 5.0], [8, 7.5]]
    assert config.manifest.columns == {"prompt": "caption"}
    assert config.sampling.time_shift is None


@pytest.mark.parametrize("word", ["off", "'off'", "Off", "false"])
def test_off_is_a_preset_though_yaml_takes_it_for_a_truth_value(written, word):
    assert read_config(None, [f"flashu.preset={word}"]).flashu.preset == "off"
    assert read_config(written(f"flashu: {{preset: {word}}}")).flashu.preset == "off"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sampling.num_image=2", "there is no setting sampling.num_image; did you mean sampling.num_images?"),
        ("samplin.seed=2", "there is no setting samplin; did you mean sampling?"),
        ("seed=2", "there is no setting seed; did you mean sampling.seed?"),
        ("cluster.num_inference_steps=2", "did you mean sampling.num_inference_steps?"),
        ("model.tokeniser=x", "did you mean model.tokenizer?"),
        ("zzz=1", "there is no setting zzz; there are: model.path, model.vae"),
        ("sampling.seed=many", "sampling.seed: Value 'many' of type 'str' could not be converted to Integer"),
        ("sampling.seed=true", "sampling.seed: Value 'True' of type 'bool' could not be converted to Integer"),
        ("output.quality=9.5", "output.quality: Value '9.5'"),
        ("output.path=null", "output.path: Incompatible value 'None'"),
        ("sampling=5", "sampling must be a mapping of num_inference_steps, guidance_scale"),
        ("flashu=few-steps", "solver_order, scores; did you mean flashu.preset?"),
        ("sampling.seed", "'sampling.seed' is no override; write section.key=value, as in sampling.seed=1"),
        ("sampling.seed=[1", "sampling.seed cannot be read"),
        ("sampling.seed=${nothing}", "Interpolation key 'nothing' not found"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(override, told):
    with pytest.raises(InputError) as error:
        read_config(None, [override])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sampling:\n  sed: 1\n", "there is no setting sampling.sed; did you mean sampling.seed?"),
        ("sampling:\n  seed: x\n", "sampling.seed: Value 'x'"),
        ("sampling:\n  seed: 1\n seed: 2\n", "cannot be read: line 3"),
        ("model: {path: a}\nmodel: {path: b}\n", "line 2: found duplicate key model"),
        ("- a\n- b\n", "must be a mapping of the sections model, flashu, sampling"),
        ("sampling: 5\n", "sampling must be a mapping of num_inference_steps"),
        ("1: 2\n", "there is no setting 1"),
        ("\0", "cannot be read"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_the_files_name(written, text, told):
    file = written(text)
    with pytest.raises(InputError) as error:
        read_config(file)
    assert told in str(error.value)
    assert str(error.value).startswith(file)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\xba\xad")
    with pytest.raises(InputError, match=r"config\.yaml cannot be read"):
        read_config(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize("name", ["no-such.yaml", "no/such/folder", "."])
def test_a_config_that_is_not_there_is_told_what_there_is(name):
    with pytest.raises(InputError) as error:
        read_config(name)
    assert str(error.value) == f"there is no config {name}; give a YAML file, or one of: {', '.join(BUILT_INS)}"


@pytest.mark.parametrize(
    "key", ["storage.aws_secret_access_key", "storage.secret_key", "model.hf_token", "storage.PASSWORD", "credentials"]
)
def test_a_secret_is_refused_and_not_repeated(written, key):
    section, _, name = key.rpartition(".")
    for source in ((None, [f"{key}=hunter2"]), (written(f"{section or 'x'}: {{{name}: hunter2}}"),)):
        with pytest.raises(InputError) as error:
            read_config(*source)
        assert "there is no setting" in str(error.value)
        assert "hunter2" not in str(error.value)
    with pytest.raises(InputError, match="credentials come from the environment, never from a config"):
        read_config(None, [f"{key}=hunter2"])
