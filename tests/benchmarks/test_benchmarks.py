"""The measuring scripts, run as a user runs them: what they count, and that they measure at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_stock_image_takes_far_fewer_operations_than_the_release():
    """The release takes 523.2 TFLOP (10.68 an evaluation) for this image, and 2.0 for a 3-D VAE decode."""
    result = json.loads(run("flops.py", "--preset", "show-o2-1.5b", "--steps", 50, "--no-flashu", "--json"))
    assert result["tflop_per_image"] <= 330
    assert result["tflop_per_evaluation"] <= 6.6
    assert result["parts"]["VAE decode"] <= 0.8
    assert sum(result["parts"].values()) == pytest.approx(result["tflop_per_image"])


def test_multiplied_count_equals_the_count_of_every_step():
    few, all_steps = (
        json.loads(run("flops.py", "--preset", "embedded", "--steps", 7, "--json", *flags))
        for flags in ([], ["--every-step"])
    )
    assert few["parts"] == pytest.approx(all_steps["parts"], rel=1e-12)


def test_generate_reports_throughput_and_memory(tmp_path):
    file = tmp_path / "result.json"
    run("generate.py", "--preset", "embedded", "--batch-size", 1, 2, "--steps", 3, "--device", "cpu", "--json", file)
    result = json.loads(file.read_text())
    assert [entry["batch_size"] for entry in result["runs"]] == [1, 2]
    assert all(entry["images_per_s"] > 0 and entry["evaluation_s"] > 0 for entry in result["runs"])
    assert result["peak_memory_gib"] > 0
    assert result["cpu"]
    assert result["torch"]
