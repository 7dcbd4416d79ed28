"""The quality benchmark, run as a user runs it, on a few prompts."""

import json

import pytest
from PIL import Image

from tests.command import benchmark


def run(*arguments):
    return benchmark("quality.py", "--batch-size", 3, *arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    file, figure = folder / "result.json", folder / "curve.png"
    done = run("--settings", "stock-8", "paper", "--prompts", 3, "--json", file, "--figure", figure)
    assert done.code == 0, done.err
    return file, figure, done.out


def test_reference_comes_first_and_equals_itself(measured):
    file, *_ = measured
    reference, *others = json.loads(file.read_text())["settings"]
    assert reference["name"] == "stock-50"
    assert reference["psnr_db"] is None
    assert reference["ssim"] == pytest.approx(1)
    assert reference["oracle_change"] == {"points": 0, "standard_error": 0}
    assert reference["flop_ratio"] == reference["speed_up"] == 1
    assert {entry["name"] for entry in others} == {"stock-8", "paper"}


def test_every_setting_is_scored_on_prompts_of_every_sort_and_told_apart_from_the_reference(measured):
    result = json.loads(measured[0].read_text())
    assert result["cpu"]
    assert 0 <= result["answers_right"] <= 100
    reference = result["settings"][0]
    for entry in result["settings"]:
        assert entry["prompts"] == 3
        for scores in (entry["oracle"], entry["self_answered"]):
            sorts = [scores[sort] for sort in ("single", "pair", "several")]
            assert scores["all"] == pytest.approx(sum(sorts) / 3, abs=0.01), "a prompt of each sort"
            assert all(0 <= score <= 100 for score in sorts)
        assert entry["oracle_change"]["points"] == pytest.approx(
            entry["oracle"]["all"] - reference["oracle"]["all"], abs=0.01
        )
        assert entry["statistics"]["broken"] == 0
        if entry is not reference:
            assert 5 < entry["psnr_db"] < 60
            assert 0 < entry["ssim"] < 1


def test_costs_fall_as_the_plans_say(measured):
    reference, *others = json.loads(measured[0].read_text())["settings"]
    few, paper = sorted(others, key=lambda entry: entry["steps"])
    assert (few["steps"], paper["steps"]) == (8, 35)
    assert few["flop_ratio"] == pytest.approx(reference["tflop_per_image"] / few["tflop_per_image"], rel=1e-3)
    assert 4 < few["flop_ratio"] < 7, "7 of 49 evaluations, and the VAE"
    assert 1.5 < paper["flop_ratio"] < few["flop_ratio"]
    for entry in (few, paper):
        ratio = reference["seconds_per_image"] / entry["seconds_per_image"]
        assert entry["speed_up"] == pytest.approx(ratio, rel=1e-3), "which is up to who else uses this machine"


def test_table_and_figure_show_the_settings(measured):
    _, figure, printed = measured
    assert all(name in printed for name in ("stock-50", "stock-8", "paper"))
    assert Image.open(figure).width > 1000


def test_check_repeats_a_result_and_names_what_differs(measured, tmp_path):
    result = json.loads(measured[0].read_text())
    result["settings"] = [entry for entry in result["settings"] if entry["name"].startswith("stock")]
    tampered = next(entry for entry in result["settings"] if entry["name"] == "stock-8")
    tampered["oracle"]["all"] += 5
    file = tmp_path / "tampered.json"
    file.write_text(json.dumps(result))
    done = run("--check", file)
    assert done.code == 1
    assert "stock-8: oracle score" in done.err
    assert "stock-50" not in done.err, "the other is repeated"


def test_unknown_setting_is_told_without_a_traceback():
    done = run("--settings", "stock-9")
    assert done.code == 2
    assert "stock-9" in done.err
    assert "Traceback" not in done.err
