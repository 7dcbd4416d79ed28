"""The `flashu` command as its user meets it: what it prints, what it writes, and how it refuses."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open

from tests import command, fakes
from tests.command import assert_refused, names

MODULE = [sys.executable, "-m", "jobs"]
QUICK = ("--steps", "2", "--size", "64", "--device", "cpu")


@pytest.fixture
def flashu(monkeypatch, tmp_path):
    """The command, run in this process and `tmp_path`, with no way to the hub. Any error but an exit gets through."""
    monkeypatch.chdir(tmp_path)
    return command.flashu


@pytest.fixture
def generate(flashu):
    """`flashu generate` that succeeds."""

    def run(*arguments):
        outcome = flashu("generate", *QUICK, *arguments)
        assert outcome.code == 0, outcome.err
        return outcome

    return run


def info(file):
    return json.loads(Image.open(file).text["flashu"])


# ----------------------------------------------------------------------------------------------------------- help


def test_help_answers_in_under_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([*MODULE, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert "generate" in done.stdout
    assert min(seconds) < 1


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["convert", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        f"import atexit, sys; sys.argv = {['flashu', *arguments]};"
        "atexit.register(lambda: print('loaded:', {'torch', 'numpy', 'PIL', 'huggingface_hub'} & {*sys.modules}));"
        "from jobs.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loaded: set()" in done.stdout


def test_every_option_of_generate_is_explained(flashu):
    text = flashu("generate", "--help").out
    for option in ("--output", "--model", "--vae", "--tokenizer", "--seed", "--steps", "--guidance", "--negative"):
        assert option in text
    for option in ("--size", "--batch-size", "--device", "--dtype"):
        assert option in text


# ------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_of_the_models_own_size_is_written(flashu, tmp_path):
    outcome = flashu("generate", "a red circle", "--steps", "3", "-o", tmp_path / "out.png")
    assert outcome.code == 0, outcome.err
    picture = Image.open(tmp_path / "out.png")
    picture.load()
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 64))
    assert outcome.out.startswith("1 image in ")
    assert outcome.out.endswith(f"{tmp_path / 'out.png'}\n")


def test_a_png_carries_prompt_seed_and_settings(generate, tmp_path):
    prompt = 'a "red" circle, 赤い円 🔴\nand a second line'
    generate(prompt, "--seed", 7, "--guidance", 3, "--negative", "blue", "-o", tmp_path / "out.png")
    assert info(tmp_path / "out.png") == {
        "prompt": prompt,
        "negative_prompt": "blue",
        "seed": 7,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "time_shift": 3.0,
        "flashu": None,
        "truncated": False,
    }


def test_the_same_seed_makes_the_same_file_and_another_does_not(generate, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        generate("a red circle", "--seed", seed, "-o", tmp_path / f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("name", "form"),
    [("out.jpg", "JPEG"), ("out.jpeg", "JPEG"), ("OUT.JPG", "JPEG"), ("out.webp", "WEBP"), ("o.PNG", "PNG")],
)
def test_the_suffix_chooses_the_format(generate, tmp_path, name, form):
    generate("a red circle", "-o", tmp_path / name)
    picture = Image.open(tmp_path / name)
    assert (picture.format, picture.size) == (form, (64, 64))


@pytest.mark.parametrize(("size", "width", "height"), [("64", 64, 64), ("96x64", 96, 64), ("64X96", 64, 96)])
def test_size_is_a_side_or_width_by_height(generate, tmp_path, size, width, height):
    generate("a red circle", "--size", size, "-o", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (width, height)


def test_a_size_far_from_the_models_own_is_told_before_the_picture_is_made(generate, tmp_path):
    outcome = generate("a red circle", "--size", "144", "-o", tmp_path / "out.png")
    assert outcome.err.startswith(
        "flashu: warning: an image of 144x144 has 5 times the pixels of 64x64, which the model was made for: about 0."
    )
    assert Image.open(tmp_path / "out.png").size == (144, 144)


def test_several_prompts_fill_a_folder_in_order(generate, tmp_path):
    folder = tmp_path / "not" / "yet" / "there"
    outcome = generate("a red circle", "two blue squares", "a star", "--seed", 40, "--batch-size", 2, "-o", folder)
    assert names(folder) == ["00000.png", "00001.png", "00002.png"]
    assert [info(folder / name)["prompt"] for name in names(folder)] == ["a red circle", "two blue squares", "a star"]
    assert [info(folder / name)["seed"] for name in names(folder)] == [40, 41, 42]
    assert outcome.out.startswith("3 images in ")


def test_a_second_run_goes_on_counting_and_overwrites_nothing(generate, tmp_path):
    generate("a red circle", "a star", "-o", tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    generate("two blue squares", "-o", tmp_path)
    assert names(tmp_path) == ["00000.png", "00001.png", "00002.png"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert info(tmp_path / "00002.png")["prompt"] == "two blue squares"


def test_counting_goes_on_after_the_highest_number_of_any_format(generate, tmp_path):
    for name in ("00007.jpg", "3.png", "notes.txt", "00009-draft.png"):
        (tmp_path / name).touch()
    generate("a red circle", "-o", tmp_path)
    assert "00008.png" in names(tmp_path)


def test_a_folder_with_a_dot_in_its_name_is_a_folder(generate, tmp_path):
    (tmp_path / "run.v1.png").mkdir()
    generate("a red circle", "-o", tmp_path / "run.v1.png")
    assert names(tmp_path / "run.v1.png") == ["00000.png"]


@pytest.mark.parametrize(
    "prompt",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a\nb",
        "🟥🟦",
        "<script>alert(1)</script>",
        "",
        "-o",
        "$(touch pwned)",
        "%s%n{0}",
    ],
)
def test_a_prompt_is_never_a_path(flashu, tmp_path, prompt):
    outcome = flashu("generate", *QUICK, "-o", "pictures", "--", prompt)
    assert outcome.code == 0, outcome.err
    assert names(tmp_path) == ["pictures"]
    assert names(tmp_path / "pictures") == ["00000.png"]
    assert info(tmp_path / "pictures" / "00000.png")["prompt"] == prompt


def test_a_prompt_too_long_is_told_and_marked(generate, tmp_path):
    outcome = generate("a red circle " * 200, "-o", tmp_path / "out.png")
    assert "flashu: warning: 1 of 1 prompts are longer than the 60 tokens that fit and were cut" in outcome.err
    assert info(tmp_path / "out.png")["truncated"] is True


# -------------------------------------------------------------------------------------------------------- convert


@pytest.fixture
def release(tmp_path):
    """A release folder with pickled weights, the released VAE and a tokenizer."""
    folder = fakes.write_whole_folder(tmp_path / "release", layout="sharded bin")
    fakes.write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_converted_folder_draws_what_its_source_drew(flashu, generate, release, tmp_path, dtype):
    """But for rounding: weights that are mapped from another file begin elsewhere in memory, and sum up otherwise."""
    generate("a red circle", "--model", release, "--dtype", dtype, "-o", tmp_path / "before.png")
    outcome = flashu("convert", release, tmp_path / "converted", "--dtype", dtype)
    assert outcome.code == 0, outcome.err
    assert str(tmp_path / "converted") in outcome.out
    release.rename(tmp_path / "gone")  # nothing of it is needed any more
    generate("a red circle", "--model", tmp_path / "converted", "--dtype", dtype, "-o", tmp_path / "after.png")
    before, after = (Image.open(tmp_path / name) for name in ("before.png", "after.png"))
    assert max(high for _, high in ImageChops.difference(before, after).getextrema()) <= 1
    assert before.text == after.text


def test_a_converted_folder_holds_safetensors_in_bfloat16_and_no_pickle(flashu, release, tmp_path):
    flashu("convert", release, tmp_path / "converted")
    files = {file.relative_to(tmp_path / "converted").as_posix() for file in (tmp_path / "converted").rglob("*.*")}
    assert files == {
        "config.json",
        "model.safetensors",
        "vae/config.json",
        "vae/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    for name in ("model.safetensors", "vae/model.safetensors"):
        with safe_open(tmp_path / "converted" / name, framework="pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_a_folder_in_the_releases_layout_draws_what_its_source_drew(flashu, generate, release, tmp_path):
    """And has the names that the released code looks for, with the VAE's own file, video weights and all."""
    generate("a red circle", "--model", release, "-o", tmp_path / "before.png")
    outcome = flashu("convert", release, tmp_path / "back", "--layout", "release", "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    assert "released code cannot load this model: it builds heads of hidden size 2048, not 64" in outcome.out
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "Wan2.1_VAE.pth",
        "config.json",
        "pytorch_model.bin",
        "tokenizer",
    ]
    assert (tmp_path / "back" / "Wan2.1_VAE.pth").read_bytes() == (release / "Wan2.1_VAE.pth").read_bytes()
    generate("a red circle", "--model", tmp_path / "back", "-o", tmp_path / "after.png")
    before, after = (Image.open(tmp_path / name) for name in ("before.png", "after.png"))
    assert max(high for _, high in ImageChops.difference(before, after).getextrema()) <= 1


def test_a_vae_kept_for_images_alone_is_told_not_to_be_the_releases(flashu, tmp_path):
    outcome = flashu("convert", "embedded", tmp_path / "back", "--layout", "release")
    assert outcome.code == 0, outcome.err
    assert "the model names no LLM" in outcome.out
    assert "scripts want Wan2.1_VAE.pth too" in outcome.out
    assert_refused(flashu("convert", "embedded", tmp_path / "x", "--layout", "gguf"), "there are safetensors, release")


def test_a_variant_that_is_named_is_what_draws(flashu, generate, release, tmp_path):
    generate("a red circle", "--model", release, "-o", tmp_path / "plain.png")
    fakes.write_weights(release, fakes.weights(seed=3), "variant bin")
    generate("a red circle", "--model", release, "-o", tmp_path / "still plain.png")
    generate("a red circle", "--model", release, "--variant", "bf16", "-o", tmp_path / "bf16.png")
    plain, still, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("plain", "still plain", "bf16"))
    assert plain == still != other
    told = "has no variant 'ema'; it has bf16"
    assert_refused(flashu("convert", release, tmp_path / "x", "--variant", "ema"), told)
    assert_refused(flashu("ask", tmp_path / "bf16.png", "What?", "--model", release, "--variant", "ema"), told)


def test_a_size_that_the_hq_model_was_not_made_for_is_told_unless_it_was_asked_for(flashu, release, tmp_path):
    hq = release.rename(tmp_path / "show-o2-1.5B-HQ")
    told = f"flashu: warning: {hq} is made for 512x512 and 1024x1024 pixels, but its config says 64 a side"
    command = ("generate", "a red circle", "--steps", "3", "--model", hq, "-o")
    assert told in flashu(*command, tmp_path / "out.png").err
    assert "made for" not in flashu(*command, tmp_path / "asked.png", "--size", "64").err
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "asked.png").read_bytes()


def test_the_built_in_model_can_be_converted_too(flashu, generate, tmp_path):
    flashu("convert", "embedded", tmp_path / "converted", "--dtype", "float32")
    generate("a red circle", "-o", tmp_path / "built-in.png")
    generate("a red circle", "--model", tmp_path / "converted", "-o", tmp_path / "converted.png")
    assert (tmp_path / "built-in.png").read_bytes() == (tmp_path / "converted.png").read_bytes()


def test_float8_draws_and_is_not_stored(flashu, generate, tmp_path):
    generate("a red circle", "--dtype", "float8", "-o", tmp_path / "low.png")
    generate("a red circle", "--dtype", "bfloat16", "-o", tmp_path / "high.png")
    assert (tmp_path / "low.png").read_bytes() != (tmp_path / "high.png").read_bytes()
    assert_refused(flashu("convert", "embedded", tmp_path / "stored", "--dtype", "float8"), "store bfloat16")


def test_converting_twice_writes_the_same_files(flashu, release, tmp_path):
    for name in ("one", "two"):
        assert flashu("convert", release, tmp_path / name).code == 0
    for file in (tmp_path / "one").rglob("*.*"):
        assert (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("existing", ["a file", "an empty folder", "a full folder"])
def test_an_existing_destination_is_refused_and_left_alone(flashu, release, tmp_path, existing):
    destination = tmp_path / "converted"
    if existing == "a file":
        destination.write_text("mine")
    else:
        destination.mkdir()
        if existing == "a full folder":
            (destination / "mine.txt").write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.glob("converted/*")}
    assert_refused(flashu("convert", release, destination), destination, "exists already")
    assert {file: file.read_bytes() for file in tmp_path.glob("converted/*")} == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("--vae", "no-such-vae"), ("--tokenizer", "no-such-tokenizer"), ("--dtype", "int7")],
)
def test_a_conversion_that_fails_leaves_nothing_behind(flashu, release, tmp_path, option, value):
    assert_refused(flashu("convert", release, tmp_path / "converted", option, value), value)
    assert names(tmp_path) == ["release"]


def test_a_conversion_that_fills_the_disk_leaves_nothing_behind(flashu, release, tmp_path):
    resource = pytest.importorskip("resource")  # a limit on file sizes stands in for a full disk
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        outcome = flashu("convert", release, tmp_path / "converted", "--dtype", "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(outcome, tmp_path / "converted", "cannot be written")
    assert names(tmp_path) == ["release"]


def test_a_destination_under_a_file_is_refused(flashu, release, tmp_path):
    (tmp_path / "file").touch()
    assert_refused(flashu("convert", release, tmp_path / "file" / "converted"), tmp_path / "file")


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "/no/such/folder"], "no such checkpoint folder: /no/such/folder"),
        (["--model", "no-such-folder"], "no such checkpoint folder: no-such-folder"),
        (["--model", "nobody/nothing"], "'nobody/nothing' is neither a local folder nor a hub id"),
        (["--model", __file__], "is a file; give the checkpoint's folder"),
        (["--vae", "/no/such/vae.pth"], "/no/such/vae.pth"),
        (["--vae", __file__], __file__),
        (["--tokenizer", "/no/such/tokenizer"], "/no/such/tokenizer"),
        (["--steps", "1"], "--steps is 1; it must be a whole number, at least 2"),
        (["--steps", "-5"], "--steps is -5"),
        (["--guidance", "-1"], "--guidance is -1.0"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--guidance", "inf"], "--guidance is inf"),
        (["--size", "100"], "next to 100 are 96 and 112"),
        (["--size", "0"], "image size 0x0"),
        (["--size", "abc"], "--size abc: give pixels per side (432), or WIDTHxHEIGHT (512x384)"),
        (["--size", "64x"], "--size 64x: give pixels per side"),
        (["--size", "64x64x64"], "--size 64x64x64: give pixels per side"),
        (["--size", "-64"], "--size -64: give pixels per side"),
        (["--size", ""], "give pixels per side"),
        (["--device", "banana"], "unknown device 'banana'; there is: cpu"),
        (["--device", "meta"], "device 'meta' is not supported; there is: cpu"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there; there is: cpu"),
        (["--dtype", "int7"], "dtype int7 is not supported; choose one of: bfloat16, float32, float8"),
        (["--batch-size", "0"], "--batch-size is 0; it must be a whole number, at least 1"),
        (["--seed", "-1"], "from 0 to 2**64 - 1"),
        (["--seed", "18446744073709551616"], "from 0 to 2**64 - 1"),
        (["-o", "out.gif"], "cannot write .gif files; use .png, .jpg, .jpeg, .webp, or a folder"),
        (["-o", "out"], None),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_one_line(flashu, tmp_path, arguments, told):
    if told is None:
        (tmp_path / arguments[1]).touch()
        told = "out is a file, not a folder"
    assert_refused(flashu("generate", "a red circle", "--steps", "2", *arguments), told)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_where_there_is_none_is_told_what_there_is(flashu):
    assert_refused(flashu("generate", "a", "--device", "cuda"), "device 'cuda' is not there; there is: cpu")


def test_two_prompts_do_not_fit_into_one_file(flashu, tmp_path):
    outcome = flashu("generate", "a red circle", "a star", "-o", tmp_path / "out.png")
    assert_refused(outcome, "2 prompts make 2 images; give a folder instead of a file")
    assert names(tmp_path) == []


@pytest.mark.parametrize("output", ["file/out.png", "file/deeper/out.png", "file/folder"])
def test_an_output_under_a_file_is_refused(flashu, tmp_path, output):
    (tmp_path / "file").touch()
    assert_refused(
        flashu("generate", "a", *QUICK, "-o", tmp_path / output), tmp_path / output, "is a file, not a folder"
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("output", ["out.png", "deeper/out.png", ""])
def test_an_output_in_a_folder_that_may_not_be_written_is_refused(flashu, tmp_path, output):
    tmp_path.chmod(0o555)
    assert_refused(flashu("generate", "a", *QUICK, "-o", tmp_path / output), "Permission denied")
    tmp_path.chmod(0o755)


def test_a_picture_that_cannot_be_written_is_named(flashu, tmp_path):
    (tmp_path / "out.png").symlink_to(tmp_path / "no" / "such" / "folder.png")
    outcome = flashu("generate", "a", *QUICK, "-o", tmp_path / "out.png")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].endswith(f"{tmp_path / 'out.png'} cannot be written: No such file or directory")


def test_a_prompt_that_is_no_text_is_refused(flashu, tmp_path):
    undecodable = b"caf\xe9".decode(errors="surrogateescape")  # how Python passes on such a byte of a command line
    assert_refused(flashu("generate", undecodable, *QUICK, "-o", tmp_path / "out.png"), r"caf\udce9 is no text")


@pytest.mark.parametrize("size", ["160000000", "16000000000"])
def test_a_size_beyond_all_memory_is_told_in_one_line(flashu, tmp_path, size):
    outcome = flashu("generate", "a", *QUICK, "--size", size, "-o", tmp_path / "out.png")
    assert outcome.code == 1
    assert f"flashu: out of memory on cpu with 1 images of {size}x{size}" in outcome.err.splitlines()[-1]


def test_a_refusal_in_a_process_of_its_own_has_no_traceback(tmp_path):
    done = subprocess.run(
        [*MODULE, "generate", "a", "--size", "abc"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "flashu: --size abc: give pixels per side (432), or WIDTHxHEIGHT (512x384)\n"
    assert names(tmp_path) == []


@pytest.mark.parametrize("output", ["show-o2-1.5B", "dots.v2/", "pictures.png/"])
def test_a_folder_may_have_dots_in_its_name(generate, tmp_path, output):
    generate("a", "-o", output)
    assert (tmp_path / output / "00000.png").is_file()


def test_a_run_that_fails_leaves_no_folder_behind(flashu, tmp_path):
    assert_refused(flashu("generate", "a", "--model", "/no/such/folder", "-o", "new/folder"), "/no/such/folder")
    assert names(tmp_path) == []


def test_flashu_settings_are_in_the_picture(generate, tmp_path):
    generate("a", "--flashu", "off", "-o", tmp_path / "off.png")
    assert info(tmp_path / "off.png")["flashu"] == "off"


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "a", "--steps", "many"], ["paint"], ["convert", "a"]])
def test_a_command_line_that_does_not_parse_shows_the_usage(flashu, arguments):
    outcome = flashu(*arguments)
    assert outcome.code == 2
    assert "Usage: " in outcome.err
