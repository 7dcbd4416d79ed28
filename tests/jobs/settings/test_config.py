"""Configs of a run as a person writes them: what is read, and how mistakes are told."""

import pytest
import yaml

from flashu.errors import InputError
from jobs.driver.submit import settings_of
from jobs.settings.config import BUILT_IN, RunConfig, read_config

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
        ("sampling.steps=2", "did you mean sampling.num_inference_steps?"),
        ("sampling.image=2", "did you mean sampling.num_images?"),
        ("sampling.guidance=2", "did you mean sampling.guidance_scale?"),
        ("seed=2", "there is no setting seed; did you mean sampling.seed?"),
        ("cluster.num_inference_steps=2", "did you mean flashu.num_inference_steps or sampling.num_inference_steps?"),
        ("model.tokeniser=x", "did you mean model.tokenizer?"),
        ("zzz=1", "there is no setting zzz; there are: model.path, model.variant, model.vae"),
        ("sampling.seed=many", "sampling.seed is 'many'; it must be a whole number"),
        ("sampling.seed=true", "sampling.seed is 'true'; it must be a whole number"),
        ("output.quality=9.5", "output.quality is '9.5'; it must be a whole number"),
        ("output.path=null", "output.path is null; it must be a text; for that word itself: 'output.path=\"null\"'"),
        ("sampling=5", "sampling must be a mapping of num_inference_steps, guidance_scale"),
        ("flashu=few-steps", "scores, calibration; did you mean flashu.preset?"),
        ("sampling.seed", "'sampling.seed' is no override; write section.key=value, as in sampling.seed=1"),
        ("sampling.seed=[1", "sampling.seed is '[1'; it must be a whole number"),
        ("sampling.seed=1e3", "sampling.seed is '1e3'; it must be a whole number"),
        ("sampling.seed=1:30", "sampling.seed is '1:30'; it must be a whole number"),
        ("sampling.seed=", "sampling.seed is nothing; it must be a whole number"),
        ("sampling.guidance_scale=7,5", "sampling.guidance_scale is '7,5'; it must be a number, or null"),
        ("quality.vqa=maybe", "quality.vqa is 'maybe'; it must be true or false"),
        ("sampling.size=[512", "sampling.size is '[512', which cannot be read as YAML"),
        ("flashu.schedule=[[24,7.5]", "give a complete value, as in 'flashu.schedule=[[24,7.5],[11,10]]'"),
        (
            "manifest.columns=caption",
            "it must be our names of columns with theirs, as in manifest.columns.prompt=caption",
        ),
        ("manifest.columns=[a]", "manifest.columns is ['a']; it must be our names of columns with theirs"),
        ("sampling.seed.x=1", "sampling.seed is {'x': '1'}; it must be a whole number"),
        ("sampling.negative_prompt=???", "sampling.negative_prompt is ???, which cannot be a value"),
        ("sampling.seed=${nothing}", "sampling.seed holds ${…}, which is not filled in"),
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
        ("sampling:\n  seed: x\n", ", line 2: sampling.seed is 'x'; it must be a whole number"),
        ("sampling:\n  seed: 1\n seed: 2\n", "cannot be read: line 3"),
        ("model: {path: a}\nmodel: {path: b}\n", "line 2: found duplicate key model"),
        ("- a\n- b\n", "must be a mapping of the sections model, flashu, sampling"),
        ("sampling: 5\n", "sampling must be a mapping of num_inference_steps"),
        ("1: 2\n", "there is no setting 1"),
        ("just words\n", "must be a mapping of the sections model, flashu"),
        ("sampling.seed: 1\n", ", line 1: in a file, sampling.seed is written as seed: in the mapping sampling:"),
        ("sampling:\n\tseed: 1\n", "line 2: found character '\\t' that cannot start any token; indent with spaces"),
        ("sampling:\n  negative_prompt: a, b: c\n", "line 2: mapping values are not allowed here; a text with ': '"),
        ("sampling:\n  negative_prompt: @home\n", "that begins with one of []{},&*!|>'\"%@`, goes in quotes"),
        ("sampling:\n  negative_prompt: 'tis\n", "line 2: a quote is opened there and not closed"),
        (
            "sampling:\n  negative_prompt: [a, b]\n",
            ', line 2: sampling.negative_prompt must be a text; put it in quotes, as in negative_prompt: "[a, b]"',
        ),
        ("sampling:\n  seed: [1]\n", ", line 2: sampling.seed is [1]; it must be a whole number"),
        ("sampling:\n  <<: {negative_prompt: no}\n", "sampling.negative_prompt is False to YAML; it must be a text"),
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


HOSTILE = (
    "a, b: c", "[blurry]", "{x", "# none", "*a", "&a b", "!tag", "%x", "@x", "`x`", "- a", "? a", "| a", "a #b", "a,",
    "yes", "no", "Off", "1e3", "010", "0x10", "12:30", "2024-01-01", ".inf", '"a', '"a" and "b"', "'tis", "it's", "k=v",
    "two\nlines", "\x7f", "$HOME", "🦊: ü", "{}", "[]", "true", "<<",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_on_the_command_line_is_taken_as_it_stands(text):
    keys = ("sampling.negative_prompt", "manifest.columns.prompt", "model.vae")
    config = read_config(None, [f"{key}={text}" for key in keys])
    assert (config.sampling.negative_prompt, config.manifest.columns, config.model.vae) == (
        text,
        {"prompt": text},
        text,
    )


def test_quotes_around_a_text_are_yamls_and_null_is_a_word_in_quotes_only():
    for quoted in ("'no: yes'", '"no: yes"'):
        assert read_config(None, [f"sampling.negative_prompt={quoted}"]).sampling.negative_prompt == "no: yes"
    assert read_config(None, ["model.vae=null"]).model.vae is None
    assert read_config(None, ['model.vae="null"']).model.vae == "null"
    assert read_config(None, ["model.vae="]).model.vae is None
    assert read_config(None, ["sampling.negative_prompt= "]).sampling.negative_prompt == ""


TOLD = ("a, b: c", "[x", "no", "010", '"a" "b"', "'tis", "\n", "\x7f", "\x00\x85\ud7ff", "null", "~", "", " ")


@pytest.mark.parametrize("text", TOLD)
def test_what_a_submitted_run_is_told_is_what_was_told(text):
    given = RunConfig()
    given.sampling.negative_prompt, given.model.tokenizer, given.manifest.columns = text, text, {"prompt": text}
    given.sampling.seed, given.cluster.hedge, given.flashu.schedule = 10, False, [[4, 5.0]]
    assert read_config("default", settings_of(given)) == given


@pytest.mark.parametrize("text", ["no", "Off", "1e3", "010", "2024-01-01", "12:30", "5"])
def test_a_plain_word_in_a_file_is_a_text_where_a_text_is_wanted(written, text):
    config = read_config(written(f"sampling:\n  negative_prompt: {text}\nmanifest: {{columns: {{prompt: {text}}}}}\n"))
    assert config.sampling.negative_prompt == config.manifest.columns["prompt"] == text


def test_a_number_is_what_it_looks_like(written):
    """Not eight, nor ninety, as YAML has it."""
    assert read_config(None, ["sampling.seed=010"]).sampling.seed == 10
    assert read_config(written("sampling: {seed: 010}")).sampling.seed == 10
    assert read_config(None, ["sampling.guidance_scale=1e1"]).sampling.guidance_scale == 10.0
    assert read_config(None, ["sampling.seed =5"]).sampling.seed == 5


def test_a_section_with_nothing_in_it_says_nothing(written):
    assert read_config(written("sampling:\nmodel:\n  # path: x\n")) == RunConfig()


@pytest.mark.parametrize(
    "holder", ["sampling.negative_prompt", "output.path", "manifest.columns.prompt", "cluster.workers"]
)
def test_nothing_is_filled_in_from_the_environment(monkeypatch, written, holder):
    monkeypatch.setenv("A_SECRET", "hunter2")
    section, _, key = holder.partition(".")
    key, _, column = key.partition(".")
    of_file = "{prompt: '${oc.env:A_SECRET}'}" if column else "'${oc.env:A_SECRET}'"
    file = written(f"{section}:\n  {key}: {of_file}\n")
    for source in ((None, [f"{holder}=${{oc.env:A_SECRET}}"]), (file,)):
        with pytest.raises(InputError, match="which is not filled in, since it may stand for a secret") as error:
            read_config(*source)
        assert holder in str(error.value)
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("sampling.seed= 5", "sampling.seed= and its value are written without a space between them"),
        ("sampling.seed = 5", "a setting is written without spaces around its ="),
        ("sampling.seed =5", "a setting is written without spaces around its ="),
        (
            "--sampling.seed=5",
            "--sampling.seed is no option; settings have no dashes before them",
        ),
        ("sampling.seed=5 p.parquet", "'p.parquet' is no override; did you mean manifest.path=p.parquet?"),
        ("=5", "a setting is written without spaces around its ="),
        ("sampling.negative_prompt=a, b: c", "quote the whole: 'sampling.negative_prompt=a, b: c'"),
        ("sampling.negative_prompt=two words sampling.seed=5", "quote the whole: 'sampling.negative_prompt=two words'"),
        ("flashu.schedule=[[24, 7.5]]", "quote the whole: 'flashu.schedule=[[24, 7.5]]'"),
    ],
)
def test_a_setting_that_the_shell_took_apart_is_told_how_to_be_quoted(words, told):
    with pytest.raises(InputError) as error:
        read_config(None, words.split())
    assert told in str(error.value)


@pytest.mark.parametrize("words", ["storage.secret_key= hunter2", "storage.secret_key=hunter2 more"])
def test_a_secret_that_the_shell_took_apart_is_not_repeated(words):
    with pytest.raises(InputError) as error:
        read_config(None, words.split())
    assert "hunter2" not in str(error.value)


def test_a_setting_before_the_config_is_told():
    with pytest.raises(InputError, match=r"the config comes before the settings, as in: default 'output\.path=a b'"):
        read_config("output.path=a b")
    with pytest.raises(InputError, match=r"p\.parquet is no config; name one, and the manifest in it"):
        read_config("p.parquet")


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
