"""`flashu plan`, `flashu calibrate` and `flashu analyze`: what they print, what they write, what they refuse."""

import json

import pytest
from PIL import Image

from flashu import WandaScores
from tests import command

SHORT = ("--steps", "3", "--device", "cpu")


@pytest.fixture
def flashu(monkeypatch, tmp_path):
    """The command, run in this process and `tmp_path`: its exit code, what it printed, what it complained of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    Image.effect_noise((60, 60), 90).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    (tmp_path / "cut.jsonl").write_text('{"image": "cut.png", "question": "What?"}')
    (tmp_path / "prompts.txt").write_text("a red circle\n\ntwo blue squares\n")

    def run(*arguments):
        outcome = command.flashu(*arguments)
        return outcome.code, outcome.out, outcome.err

    return run


def test_plan_prints_a_line_a_step_and_what_it_saves(flashu):
    code, out, _ = flashu("plan")
    lines = [line.split() for line in out.splitlines()]
    steps = [line for line in lines if line and line[0].isdecimal()]
    assert code == 0
    assert [int(line[0]) for line in steps] == list(range(1, 35))
    assert steps[10][1:] == ["pruned", "all,", "measured", "reuse", "7.5", "1", "5.370"]
    assert steps[5][1:5] == ["-", "-", "reuse", "7.5"]
    totals = {" ".join(line[:-3]): (float(line[-3]), line[-1]) for line in lines if "TFLOP" in line[:-1]}
    assert totals["this plan, with its VAE"][0] <= 120
    assert totals["stock model, 50 steps"] == (322.5, "2.74x")
    assert totals["the release with these settings"][0] == pytest.approx(279.7 + 0.8, abs=0.2)
    assert totals["the release's stock model, 50 steps"][0] == pytest.approx(523.2 + 0.8, abs=0.2)


def test_plan_of_other_steps_and_sizes(flashu):
    code, out, _ = flashu("plan", "--preset", "off", "--model", "embedded", "--steps", "5")
    assert code == 0
    assert sum(line.split()[0].isdecimal() for line in out.splitlines() if line.strip()) == 4


def test_calibrated_scores_go_into_a_picture(flashu, tmp_path):
    code, out, _ = flashu("calibrate", "-o", "new/scores.safetensors", "--prompts", "prompts.txt", *SHORT)
    assert code == 0
    assert "scores of 10 layers for generation, from 2 prompts (trajectories)" in out
    assert WandaScores.load(tmp_path / "new/scores.safetensors").method == "trajectories"
    arguments = ("--flashu", "fast", "--scores", "new/scores.safetensors", "--size", "64", "--device", "cpu")
    code, _, err = flashu("generate", "a red circle", "-o", "out.png", *arguments)
    assert code == 0, err
    with Image.open(tmp_path / "out.png") as picture:
        assert json.loads(picture.text["flashu"])["flashu"].startswith("FFN pruning r_p=0.3")


def test_scores_of_understanding_come_from_pairs_or_the_models_own_pictures(flashu, tmp_path):
    Image.effect_noise((60, 60), 90).save(tmp_path / "noise.png")
    (tmp_path / "pairs.jsonl").write_text('{"image": "noise.png", "question": "What is this?"}\n' * 2)
    arguments = ("calibrate", "-o", "und.safetensors", "--task", "understanding", *SHORT)
    code, out, err = flashu(*arguments, "--pairs", "pairs.jsonl")
    assert (code, err) == (0, "")
    assert "scores of 10 layers for understanding, from 2 questions" in out
    from_pairs = WandaScores.load(tmp_path / "und.safetensors")
    assert from_pairs.task == "understanding"
    assert len(from_pairs.layer_importances) == 10
    code, out, _ = flashu(*arguments, "--prompts", "prompts.txt")
    assert code == 0
    own = WandaScores.load(tmp_path / "und.safetensors")
    assert not (own.layer_importances == from_pairs.layer_importances).all()


def test_analysis_from_scores_to_the_papers_figure(flashu, tmp_path):
    options = ("--prompts", "prompts.txt", *SHORT)
    Image.new("L", (50, 80), 128).save(tmp_path / "grey.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "grey.png", "question": "What is this?"}) + "\n")
    assert flashu("analyze", "obd", *options)[0] == 0
    assert flashu("analyze", "obd", "--task", "understanding", "--pairs", "pairs.jsonl", *SHORT)[0] == 0
    scores = ["analysis/obd-generation.json", "analysis/obd-understanding.json"]
    code, out, _ = flashu("analyze", "compare", *scores)
    assert code == 0
    assert "of a layer's neurons serve both tasks" in out
    assert flashu("analyze", "activations", *options)[0] == 0
    assert sorted(file.name for file in (tmp_path / "analysis").iterdir()) == [
        "activations.json", "compare.json", "compare.png", "head-drift.png", "layers.png", "obd-generation.json",
        "obd-generation.png", "obd-understanding.json", "obd-understanding.png", "similarities.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan", "--preset", "warp"], "no FlashU preset 'warp'"),
        (["plan", "--model", "show-o3"], "no preset 'show-o3'"),
        (["plan", "--steps", "0"], "num_inference_steps is 0"),
        (["plan", "--prefix", "1000"], "a prefix of 1000 tokens"),
        (["plan", "--guidance", "nan"], "--guidance is nan"),
        (["plan", "--steps", "50"], "covers 35 steps, but 50 grid points take 49"),
        (["generate", "a", "--flashu", "warp"], "no FlashU preset 'warp'"),
        (["generate", "a", "--flashu", "fast", "--scores", "prompts.txt"], "not a file of Wanda scores"),
        (["generate", "a", "--flashu", "fast", "--scores", "none"], "none"),
        (["calibrate", "-o", "x.safetensors", "--method", "guess"], "no calibration method 'guess'"),
        (["calibrate", "-o", "x.safetensors", "--prompts", "none.txt"], "none.txt cannot be read"),
        (["generate", "a", "--scores", "prompts.txt"], "give --flashu too"),
        (["calibrate", "-o", "."], "-o . is a folder; name a file"),
        (["analyze", "activations", "--steps", "2"], "num_inference_steps is 2"),
        (["analyze", "activations", "--ratio", "1.5"], "skip_ratio is 1.5"),
        (["analyze", "obd", "--task", "understanding", "--pairs", "empty.jsonl"], "empty.jsonl holds no pairs"),
        (["analyze", "obd", "--task", "understanding", "--pairs", "cut.jsonl"], "cut.jsonl, line 1"),
        (["calibrate", "-o", "prompts.txt/x.safetensors"], "prompts.txt is a file, where a folder is needed"),
        (["analyze", "obd", "--task", "dreaming"], "--task dreaming: there are generation, understanding"),
        (["analyze", "obd", "--task", "understanding", "--pairs", "prompts.txt"], "prompts.txt, line 1"),
        (["analyze", "compare", "prompts.txt", "prompts.txt"], "cannot be read as JSON"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_one_line(flashu, arguments, told):
    code, out, err = flashu(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("flashu: ")
    assert told in err
    assert err.count("\n") == 1
