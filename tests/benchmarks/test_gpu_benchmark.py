"""The GPU benchmark, run as a user tries it out: on a CPU, with the smallest model, where there is no Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import main
from gpu_arms import ARMS, BASELINES, MAIN

pytestmark = pytest.mark.timeout(600)  # the first test's fixture may take as long as its budget
ON_CPU = [name for name, arm in ARMS.items() if "cpu" in arm.by_default]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRY_OUT = ("--device", "cpu", "--preset", "embedded")
# What a machine has that has torch, transformers and einops, and no more.
WITHOUT = """
import runpy, sys
for name in ("boto3", "diffusers", "jinja2", "omegaconf", "pyarrow", "ray", "rich", "typer"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, {folder!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments):
    code = WITHOUT.format(folder=str(BENCHMARKS))
    command = [sys.executable, "-c", code, str(BENCHMARKS / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One image at a time; how the best number is searched for is in test_gpu_series.py."""
    file = tmp_path_factory.mktemp("gpu") / "result.json"
    done = run(*TRY_OUT, "--budget-s", 280, "--repeats", 1, "--batch-size", 1, "--natural-prompts", 2, "--json", file)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_every_arm_is_measured(measured):
    result, _ = measured
    runs = {run["arm"]: run for run in result["runs"]}
    assert list(runs) == ON_CPU
    assert {run["batch_size"] for run in result["runs"]} == {1}
    assert len(runs["ours-flashu-natural"]["seconds_of_runs"]) == 2, "either of the two prompts once"
    assert result["left_out"] == []


def test_the_first_lines_say_whether_blocks_ran_compiled(measured):
    result, out = measured
    assert result["blocks_compiled"] is False
    assert out.splitlines()[1] == "blocks ran uncompiled: compile=auto compiles on CUDA only"
    assert list(result).index("why_uncompiled") < list(result).index("cold")


def test_speeds_are_those_of_the_times_and_operations(measured):
    """What is quicker is told by operations alone, as any arm may be disturbed on a busy machine."""
    result, _ = measured
    ceilings, by_arm = result["ceilings"], {run["arm"]: run for run in result["runs"]}
    for each in by_arm.values():
        assert each["images_per_s"] * each["seconds_per_image"] == pytest.approx(1)
        assert 0 < each["loop_seconds_per_image"] < each["seconds_per_image"]
        assert each["tflop_per_s"] == pytest.approx(each["tflop_per_image"] / each["seconds_per_image"])
        loop = each["loop_tflop_per_s"] * each["loop_seconds_per_image"]
        assert 0.5 * each["tflop_per_image"] < loop < each["tflop_per_image"], "the VAE comes after the loop"
        for share, rate in (("share_of_ceiling", "tflop_per_s"), ("loop_share_of_ceiling", "loop_tflop_per_s")):
            assert each[share] == pytest.approx(each[rate] / ceilings["matrix_tflop_per_s"])
            assert 0.001 < each[share] < 2
        for key, baseline in (("speed_up", "release"), ("speed_up_over_release_flashu", "release-flashu")):
            ratio = by_arm[baseline]["seconds_per_image"] / each["seconds_per_image"]
            assert each[key] == pytest.approx(ratio)
        assert each["peak_memory_gib"] > 0.05
        assert each["compiled"] is False
    tflop = {arm: each["tflop_per_image"] for arm, each in by_arm.items()}
    assert tflop["ours-few-steps"] < 0.4 * tflop["ours"]
    assert tflop["release"] > 2 * tflop["ours"]
    assert tflop["release-flashu"] > 2 * tflop["ours-flashu"]
    assert tflop["release"] > 6 * tflop["ours-flashu"], "7.0; seconds were 4.9 times as many"
    assert min(ceilings.values()) > 0


def test_best_of_each_arm_is_compared_with_the_best_of_both_baselines(measured):
    result, out = measured
    best = result["best"]
    assert best.keys() == set(ON_CPU)
    assert all(each["is_known"] for arm, each in best.items() if not ARMS[arm].aside)
    for key, baseline in (("speed_up", "release"), ("speed_up_over_release_flashu", "release-flashu")):
        ratio = best["ours-flashu"]["images_per_s"] / best[baseline]["images_per_s"]
        assert best["ours-flashu"][key] == pytest.approx(ratio)
        assert f"{ratio:.2f}x {baseline}'s best (batch {best[baseline]['batch_size']})" in out


def test_batches_back_to_back_are_measured_beside_one_at_a_time(measured):
    result, out = measured
    pair = result["back_to_back"]
    best = result["best"]["ours-flashu"]
    assert (pair["batch_size"], pair["one_at_a_time_images_per_s"]) == (best["batch_size"], best["images_per_s"])
    assert pair["batches"] > 1
    assert pair["images_per_s"] > 0
    assert f"batches back to back: {pair['images_per_s']:.3f} images/s of ours-flashu" in out


def test_arms_that_do_the_same_make_the_same_pictures(measured):
    difference = measured[0]["picture_difference"]
    assert difference.keys() == {"ours", "ours-flashu"}
    assert max(difference.values()) < 0.1


def test_parts_add_up_to_what_was_profiled(measured):
    result, _ = measured
    split_at = {(split["arm"], split["batch_size"]) for split in result["splits"]}
    assert split_at >= {(arm, 1) for arm in ON_CPU if not ARMS[arm].aside}
    assert split_at >= {(arm, result["best"][arm]["batch_size"]) for arm in MAIN if arm not in BASELINES}
    for split in result["splits"]:
        assert split["parts_s"].keys() == {"image path", "LLM", "head", "prefix, times", "VAE", "sampler, other"}
        assert all(seconds > 0 for seconds in split["parts_s"].values())
        whole, accelerated = split["profiled_s"], ARMS[split["arm"]].accelerated
        assert split["profiled_evaluations"] == 8 or accelerated
        once = split["parts_s"]["prefix, times"] + split["parts_s"]["VAE"]
        every_step = (whole - once) * (1 if accelerated else 49 / 8)
        assert sum(split["parts_s"].values()) == pytest.approx(once + every_step), "what is alike was run in part"
        assert split["parts_s"]["LLM"] == max(split["parts_s"].values())
        assert split["gpu_idle_s"] is None


def test_result_says_where_it_was_measured_and_how_a_worker_starts(measured):
    result, _ = measured
    for key in ("date", "torch", "transformers", "cpu", "threads", "dtype", "preset", "size", "prompt_tokens"):
        assert result[key], key
    assert result["cold"]["build_s"] > 0
    assert result["cold"]["calibrate_s"] > 0
    assert result["cold"]["first_image_s"] > 0
    assert result["cold"]["load_s"] > 0


def test_table_shows_every_run_and_split(measured):
    result, out = measured
    lines = out.splitlines()
    for arm in ON_CPU:
        of_arm = [line for line in lines if line.startswith(f"{arm} ")]
        assert len(of_arm) == sum(entry["arm"] == arm for entry in [*result["runs"], *result["splits"]])
    assert "speed-up" in out
    assert "first_image_s" in out


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")),
        ("--device", "cpu"),
        ("--device", "cpu", "--preset", "show-o2-7b"),
    ],
)
def test_without_a_gpu_it_refuses_in_a_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "CUDA" in message
    assert "--device cpu --preset embedded" in message
