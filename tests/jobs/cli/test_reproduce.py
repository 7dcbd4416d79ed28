"""`flashu reproduce`: settings with where they are from, runs to the end on the built-in model, and what is refused."""

import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
from PIL import Image
from safetensors.torch import load_file

from cluster.open_storage import open_storage
from cluster.storage import S3Options
from flashu import InputError, TextToImagePipeline
from flashu.calibration import calibrate
from flashu.config import flashu_preset
from jobs.scoring.geneval import read_scores
from jobs.scoring.published import FIGURES, MODELS, UNLIKE, released_settings
from jobs.scoring.understanding import _agree, read_questions
from jobs.settings.config import FlashUSection, ModelSection, built_in_configs
from jobs.worker.model import load
from manifests.errors import ManifestError
from tests import fakes
from tests.command import assert_refused, flashu

RELEASED = "showlab/show-o2-1.5B"
QUICK = ("sampling.num_images=2", "sampling.num_inference_steps=12", "flashu.tau=3", "cluster.workers=1")
REWRITTEN = (  # as Show-o2's file: the evaluator's line, with a prompt that was made longer
    {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite. It is high up."},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups. Both are blue."},
)


def test_every_built_in_benchmark_config_says_where_each_value_is_from():
    for name, file in built_in_configs().items():
        if not name.startswith(("dpg-", "geneval-")):
            continue
        told = [each.name for each in released_settings(file)]
        text = file.read_text(encoding="utf-8")
        values = re.findall(r"^  \w+: .+$", text.partition("cluster:")[0], re.MULTILINE)
        assert len(told) == len(values) >= 9, name
        benchmark, _, model = name.partition("-")
        assert model in MODELS
        assert any(figure.measured == "speed_up" for figure in FIGURES[benchmark, model]), name
        assert len(UNLIKE[benchmark]) >= 3


def test_a_dry_run_prints_each_value_and_where_the_release_sets_it(tmp_path):
    command = ("reproduce", "dpg", "--model", RELEASED, "--questions", "q.csv", "-o", tmp_path / "out", "--dry-run")
    outcome = flashu(*command)
    assert outcome.code == 0, outcome.err
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert "sampling.guidance_scale 10 S evaluation/sample_dpg.sh; FlashU's schedule is 0.75 and 1 times it" in lines
    assert "baseline: 50 points, guidance 10" in lines
    assert any(line.startswith("flashu: 35 points") and line.endswith("guidance 24x7.5, 11x10") for line in lines)
    assert "NOT" not in outcome.out
    changed = flashu(*command, "sampling.guidance_scale=5", "output.image_format=webp").out
    assert "- sampling.guidance_scale: 10 there, 5 here" in changed
    assert "- output.image_format: png there, webp here" in changed
    assert "guidance 24x3.75, 11x5" in changed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["dpg-show-o2-1.5b", "dpg-show-o2-7b"])
def test_flashu_dpg_says_where_the_settings_of_a_built_in_config_are_from(config, tmp_path):
    settings = ("questions=/no/such.csv", f"output.path={tmp_path / 'out'}")
    outcome = flashu("dpg", config, *settings, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert re.search(r"sampling.num_inference_steps +50 +S evaluation/sample_dpg.sh", outcome.out)
    assert "guidance 24x7.5, 11x10" in outcome.out
    assert_refused(flashu("dpg", config, *settings), "/no/such.csv cannot be read")


def test_genevals_images_are_made_by_both_arms_and_its_results_read(cluster, tmp_path):
    prompts, out = tmp_path / "rewritten.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in REWRITTEN))
    command = ("reproduce", "geneval", "--prompts", prompts, "-o", out, *QUICK, cluster)
    outcome = flashu(*command)
    assert outcome.code == 0, outcome
    for arm in ("baseline", "flashu"):
        for number, line in enumerate(REWRITTEN):
            folder = out / "samples" / arm / f"{number:05d}"
            assert json.loads((folder / "metadata.jsonl").read_text()) == line
            assert [Image.open(file).size for file in sorted((folder / "samples").iterdir())] == [(64, 64)] * 2
        samples, results = out / "samples" / arm, out / f"{arm}.jsonl"
        assert f"evaluate_images.py {samples} --outfile {results}" in outcome.out
    pictures = [(out / "samples" / arm / "00001/samples/0000.png").read_bytes() for arm in ("baseline", "flashu")]
    assert pictures[0] != pictures[1]
    assert re.search(r"GenEval score, baseline +0\.73 +not measured +Show-o2", outcome.out)

    for arm, right in (("baseline", [1, 1, 1, 0]), ("flashu", [1, 1, 0, 0])):
        rows = [{"tag": tag, "correct": bool(ok)} for tag, ok in zip(["a", "a", "b", "b"], right, strict=True)]
        (out / f"{arm}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = flashu(*command)
    assert again.code == 0, again
    assert "baseline: a 1.00, b 0.50, overall 0.75" in again.out
    assert re.search(r"GenEval score, baseline +0\.73 +0\.75 +Show-o2", again.out)

    prompts.write_text(json.dumps(REWRITTEN[0]) + "\n")
    assert_refused(flashu(*command), f"holds other prompts than {prompts}")


def test_the_evaluators_scores_are_means_of_its_tags(tmp_path):
    results = tmp_path / "results.jsonl"
    rows = [{"tag": "many", "correct": True}] * 8 + [{"tag": "few", "correct": False}, {"tag": "few", "correct": True}]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_scores(results, 10) == {"few": 0.5, "many": 1.0, "overall": 0.75}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is of 0 images, and there are 2"),
        ("{", "not valid JSON"),
        ("[1]\n", ":1: not a line of"),
        ('{"tag": "a"}\n', ":1: not a line of"),
        ('{"tag": "a", "correct": "false"}\n', ":1: not a line of"),
        ('{"tag": "a", "correct": true}\n', "is of 1 images, and there are 2; remove it, and run the evaluator again"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, content, told):
    results = tmp_path / "results.jsonl"
    results.write_text(content)
    with pytest.raises((InputError, ManifestError)) as raised:
        read_scores(results, 2)
    assert told in str(raised.value)


def test_answers_with_and_without_flashu_stand_beside_each_other(tmp_path):
    for name, colour in (("red", (220, 40, 40)), ("blue", (40, 40, 220))):
        Image.new("RGB", (90, 64), colour).save(tmp_path / f"{name}.png")
    lines = [
        {"image": "red.png", "question": "What colour is the background?", "answer": "red"},
        {"image": "blue.png", "question": "Is the background blue?", "answer": "yes"},
        {"image": "red.png", "question": "Is there a circle?"},
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    outcome = flashu("reproduce", "understanding", "--questions", questions, "-o", out, "answering.max_new_tokens=8")
    assert outcome.code == 0, outcome
    result = json.loads((out / "understanding.json").read_text())
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    asked = Counter()
    for row in result["answers"]:
        expected = pipe.answer(row["image"], row["question"], max_new_tokens=8)
        assert row["baseline"] == expected, row
        asked[row["question"], row["answer"]] += 1
    assert asked == Counter((line["question"], line.get("answer")) for line in lines)
    baseline, accelerated = (result["arms"][arm] for arm in ("baseline", "flashu"))
    known = [(row["baseline"].strip(" .").casefold(), row["answer"]) for row in result["answers"] if row["answer"]]
    assert baseline["right"] == sum(said == answer for said, answer in known) / 2
    assert baseline["tflop_per_answer"] > accelerated["tflop_per_answer"] > 0
    assert f"{baseline['seconds_per_answer'] / accelerated['seconds_per_answer']:.2f}x" in outcome.out
    assert "und_r_p=0.2" in accelerated["settings"]
    assert "- model.dtype: float32 there, null here" in outcome.out

    half = json.loads((out / "understanding.json").read_text())
    del half["arms"]["flashu"]
    for row in half["answers"]:
        row["baseline"], row["flashu"] = "as it was", None
    (out / "understanding.json").write_text(json.dumps(half))
    again = flashu("reproduce", "understanding", "--questions", questions, "-o", out, "answering.max_new_tokens=8")
    assert again.code == 0, again
    resumed = json.loads((out / "understanding.json").read_text())["answers"]
    assert [row["baseline"] for row in resumed] == ["as it was"] * 3, "that arm was done"
    assert [row["flashu"] for row in resumed] == [row["flashu"] for row in result["answers"]]
    other = flashu("reproduce", "understanding", "--questions", questions, "-o", out)
    assert_refused(other, "holds answers that were given with other settings")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], " holds no questions"),
        (["{"], ":1: not valid JSON"),
        (["[1]"], ":1: needs"),
        (['{"image": "x.png"}'], ":1: needs"),
        (['{"image": "x.png", "question": ""}'], ":1: needs"),
        (['{"image": "x.png", "question": "Is it?", "answer": ""}'], ":1: needs"),
        (['{"image": "x.png", "question": "Is it?", "answer": 3}'], ":1: needs"),
        (["", '{"image": "x.png", "question": "Is it?"}'], ":2: there is no image"),
    ],
)
def test_questions_that_cannot_be_asked_are_told_with_their_line(tmp_path, lines, told):
    questions = tmp_path / "q.jsonl"
    questions.write_text("\n".join(lines))
    outcome = flashu("reproduce", "understanding", "--questions", questions, "-o", tmp_path / "out")
    assert_refused(outcome, f"{questions}{told}")
    assert not (tmp_path / "out").exists()


def test_questions_with_odd_ends_of_lines_in_them_are_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    row = {"image": "x.png", "question": "one\u2028line\u0085still", "answer": "yes"}
    (tmp_path / "q.jsonl").write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    (question,) = read_questions(tmp_path / "q.jsonl")
    assert (question.text, question.answer) == (row["question"], "yes")


@pytest.mark.parametrize(
    ("said", "expected", "agree"),
    [
        ("Yes, it is.", "yes", True),
        ("No", "no.", True),
        ("Yes", "no", False),
        ("No parking.", "No smoking", False),
        ("Yes", "yes bank", False),
        ("A red circle.", "a red circle", True),
        ("red", "a red circle", False),
    ],
)
def test_an_answer_is_right_by_its_words_or_by_its_yes_or_no(said, expected, agree):
    assert _agree(said, expected) == agree


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("answering.images_at_once=0",), "answering.images_at_once is 0"),
        (("answering.max_new_tokens=0",), "answering.max_new_tokens is 0"),
        (("flashu.und_tok_layer=40",), "und_tok_layer is 40"),
        (("flashu.und_r_p=2",), "und_r_p is 2"),
        (("flashu.scores=/no/such",), "/no/such"),
        (("-o", "s3://bucket/x"), "output is s3://bucket/x; questions are answered on this machine"),
        (("--questions", "s3://bucket/q.jsonl"), "questions is s3://bucket/q.jsonl"),
        (("-o", "/proc/nope"), "/proc/nope/understanding.json cannot be written"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is_answered(overrides, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = flashu("reproduce", "understanding", *overrides)
    assert outcome.code == 2, outcome
    assert told in outcome.err
    assert " TFLOP an answer" not in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("geneval",), "prompts is not set"),
        (("geneval", "--prompts", "p.jsonl", "manifest.path=demo"), "manifest.path is not for GenEval"),
        (("dpg", "--model", "/a/folder"), "its name does not say which released model it is of; add --like"),
        (("dpg", "--model", "/a/folder", "--like", "show-o3"), "--like show-o3: there are show-o2-1.5b, show-o2-7b"),
        (("dpg", "--model", "showlab/show-o2-1.5B-HQ"), "nothing is published of show-o2-1.5b-hq on dpg"),
        (("understanding", "--model", RELEASED), "questions is not set"),
        (("dpg", "sampling.sead=1"), "did you mean sampling.seed?"),
        (("dpg", "model.path=/a/folder"), "give model.path as --model"),
        (("dpg", "arms=both"), "arms is 'both'"),
        (("dpg", "arms=both", "--dry-run"), "arms is 'both'"),
    ],
)
def test_what_cannot_be_reproduced_is_told_before_anything_is_made(command, told, tmp_path):
    outcome = flashu("reproduce", *command, "-o", tmp_path / "out")
    assert_refused(outcome, told)
    assert not (tmp_path / "out").exists()


def test_a_worker_says_that_the_head_is_the_checkpoints_own(tmp_path):
    untied = replace(fakes.CONFIG, llm=replace(fakes.LLM, tie_word_embeddings=False))
    for name, tensors in (("apart", fakes.weights(untied)), ("tied", fakes.weights())):
        folder = fakes.write_whole_folder(tmp_path / name, tensors=tensors)
        fakes.write_tokenizer(folder)
        with nullcontext() if name == "tied" else pytest.warns(UserWarning, match="head that differs"):
            model = load(ModelSection(str(folder)), FlashUSection("off"), None, None, S3Options(), "cpu")
        assert (", with a head of its own, VAE " in model.identity) == (name == "apart")


def test_calibration_as_the_release_does_it_is_one_forward_of_the_first_prompt(tmp_path):
    run = open_storage(str(tmp_path / "run"), S3Options())
    section = FlashUSection(preset="embedded", calibration="release")
    load(ModelSection(), section, flashu_preset("embedded"), run, S3Options(), "cpu", lambda: "two blue squares")
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    expected = calibrate(pipe.model, ["two blue squares"], tokenizer=pipe.tokenizer, method="tokens")
    expected.save(tmp_path / "expected.safetensors")
    found, wanted = load_file(tmp_path / "run" / "scores.safetensors"), load_file(tmp_path / "expected.safetensors")
    assert found.keys() == wanted.keys()
    assert all((found[name] == tensor).all() for name, tensor in wanted.items())
