"""The GPU benchmark's parts, in one process: what fails or has no time, and leaves the rest as it was."""

import json
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu import main
from gpu_arms import ARMS, SAME_PICTURES, Arm, Ours
from gpu_attempts import Attempts, Budget, OutOfTime, one_line, time_limit
from gpu_bench import Bench
from gpu_cold import empty_compile_caches
from gpu_report import compiling, mean_difference
from gpu_series import Series

from flashu.calibration import calibrate
from flashu.config import flashu_preset
from flashu.models import showo2
from flashu.models.attention import choice
from flashu.models.blocks import AS_THEY_ARE, Blocks
from flashu.models.graphs import Graphs
from flashu.models.patches import PatchProduct
from flashu.models.presets import PRESETS, VAE_PRESETS
from tests.bounds import LEVEL
from tests.recorded import Recording

TRY_OUT = ("--device", "cpu", "--preset", "embedded")


@pytest.fixture(scope="module")
def bench():
    config, settings = PRESETS["embedded"], flashu_preset("paper-1.5b")
    bench = Bench(config, VAE_PRESETS["embedded"], config.native_grid, settings, torch.device("cpu"), torch.float32)
    bench.scores = calibrate(bench.model, bench.prompts(1), tokenizer=bench.tokenizer, num_inference_steps=2)
    return bench


class Hungry(Ours):
    """Needs more memory than there is for every image but the first."""

    def generate(self, count, evaluations=None):
        torch.empty(2**48 * (count - 1), dtype=torch.uint8)
        return super().generate(count, evaluations=2)


def series_of(bench, *arms, batches=(1, 4, 8), budget_s=100):
    return Series(bench, arms, batches, Attempts(bench.device, Budget(budget_s)), 1)


def test_out_of_memory_ends_a_series_and_no_more(bench, monkeypatch):
    monkeypatch.setitem(ARMS, "hungry", Arm(Hungry))
    series = series_of(bench, "hungry", "ours-flashu")
    best = series.find_best("hungry")
    assert best.cell.batch == 1
    assert best.found_by == "out of memory at batch 4"
    assert series.measure("hungry", 8) is None
    assert series.attempts.left_out == {
        ("speed", "hungry", 4): "out of memory",
        ("speed", "hungry", 8): "batch 4 did not work",
    }
    assert series.measure("ours-flashu", 1).images_per_s > 0


def test_arm_in_float8_leaves_the_shared_weights_as_they_were(bench):
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    with ARMS["ours-flashu-float8"].on(bench) as way:
        assert bench.model.number_format == "float8"
        assert len(way.generate(1)) == 1
    assert bench.model.number_format == "float32"
    assert bench.model.acceleration is None
    after = bench.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_what_a_device_or_model_cannot_do_is_left_out_in_a_line(bench, monkeypatch, capsys):
    head = replace(bench.config.head, intermediate_size=328)
    monkeypatch.setattr(bench.model, "config", replace(bench.config, head=head))
    series = series_of(bench, "ours-flashu-float8")
    assert series.measure("ours-flashu-float8", 1) is None
    assert "multiples of 16" in series.attempts.left_out["speed", "ours-flashu-float8", 1]
    assert capsys.readouterr().err == ""
    assert bench.model.number_format == "float32"


def test_what_there_is_no_time_for_is_left_out_and_said(bench):
    series = series_of(bench, "ours-flashu", budget_s=3)
    assert series.measure("ours-flashu", 1)
    assert series.measure("ours-flashu", 1000) is None
    assert "no time" in series.attempts.left_out["speed", "ours-flashu", 1000]
    over = series_of(bench, "ours-flashu", budget_s=0)
    assert over.measure("ours-flashu", 1) is None
    assert over.cells == {}


class Uncompilable(Ours):
    def generate(self, count, evaluations=None):
        if self.compile_mode != "off":
            raise NotImplementedError("no such kernel")
        return super().generate(count, evaluations=2)


def test_what_does_not_compile_is_measured_uncompiled_and_said(bench, monkeypatch):
    monkeypatch.setitem(ARMS, "uncompilable", Arm(Uncompilable, options={"compile_mode": "auto"}))
    series = series_of(bench, "uncompilable", batches=(1, 2))
    assert series.find_best("uncompilable").is_known
    assert series.attempts.left_out == {("compiling", "uncompilable", 1): "NotImplementedError: no such kernel"}
    assert compiling(series) == {"blocks_compiled": False, "why_uncompiled": "NotImplementedError: no such kernel"}


def test_where_there_is_no_compiler_it_is_said_why(bench, monkeypatch):
    def compile_on_cuda(pipe, mode):
        warnings.warn("running uncompiled, as torch.compile does not work here: no Python.h", stacklevel=2)
        return pipe

    monkeypatch.setattr("gpu_arms.TextToImagePipeline.compile", compile_on_cuda)
    series = series_of(bench, "ours-flashu")
    assert series.measure("ours-flashu", 1)
    assert compiling(series)["why_uncompiled"].endswith("torch.compile does not work here: no Python.h")


@pytest.mark.parametrize("error", [AssertionError(), AssertionError("\n\nfrom user code:"), RuntimeError("a\nb")])
def test_a_line_of_a_failure_says_what_or_where(error):
    try:
        raise error
    except Exception as caught:
        line = one_line(caught)
    assert "\n" not in line
    where = f"raised in {Path(__file__).name}"
    assert line.startswith(type(error).__name__)
    assert line == "RuntimeError: a" or where in line or "from user code" in line


def test_natural_prompts_are_new_ones_in_every_batch_and_of_other_lengths(bench, monkeypatch):
    made = []
    with ARMS["ours-flashu-natural"].on(bench) as way:
        monkeypatch.setattr(way, "pipe", lambda prompts, **_: made.append(prompts))
        way.warm_up(8)
        for _ in range(way.batches(8)):
            way.generate(8)
    warm_up, *batches = made
    timed = [prompt for batch in batches for prompt in batch]
    assert len({len(prompt.split()) for prompt in timed}) == len(timed) == 48
    assert not set(timed) & set(warm_up)


def test_an_arm_without_cudnn_attention_leaves_the_switch_as_it_was(bench):
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with ARMS["ours-flashu-natural-no-cudnn"].on(bench):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("arm", [name for name, of in SAME_PICTURES.items() if "under" in ARMS[name].options])
def test_an_arm_that_switches_something_makes_the_same_picture_and_switches_it_back(bench, arm):
    switches = lambda: (choice(), PatchProduct.forward, Blocks.compile, showo2.HARDLY_LONGER)  # noqa: E731
    default, pictures = switches(), []
    for name in ("ours-flashu", arm):
        with ARMS[name].on(bench) as way:
            assert sum(now is not then for now, then in zip(switches(), default, strict=True)) == (name == arm)
            pictures.append(np.asarray(way.generate(1)[0], np.int16))
        assert switches() == default
    assert abs(pictures[0] - pictures[1]).max() <= LEVEL


def test_an_arm_that_captures_makes_the_same_picture_and_gives_its_memory_back(bench, monkeypatch):
    """By a stand-in for CUDA's graphs."""
    graphs = Graphs(Recording(), 2**40)
    captured = Blocks.through(lambda block: block).captured(graphs)
    monkeypatch.setattr(
        "flashu.models.blocks.compile_blocks", lambda mode, device: captured if mode == "graphs" else AS_THEY_ARE
    )
    series = series_of(bench, "ours-few-steps", "ours-few-steps-graphs")
    plain, cell = series.measure("ours-few-steps", 1), series.measure("ours-few-steps-graphs", 1)
    assert series.attempts.left_out == {}
    assert cell.captured > 20 > plain.captured == 0
    assert 0 < cell.captured_gib < 1
    assert graphs.count == graphs.bytes == 0
    assert mean_difference(*series.pictures.values()) <= LEVEL


class Breaking(Ours):
    def generate(self, count, evaluations=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_failures_lose_nothing_that_was_measured_before_or_can_be_after(monkeypatch, tmp_path, capsys):
    """Neither ordinary ones, here of the calibration, nor one that the device does not survive."""
    monkeypatch.setitem(ARMS, "breaking", Arm(Breaking, hazardous=True))
    monkeypatch.setattr("gpu_cold.calibrate", lambda *_, **__: torch.empty(2).reshape(3))
    file = tmp_path / "result.json"
    options = ("--arms", "breaking", "ours-flashu", "--batch-size", "1", "--repeats", "1", "--parts", "speed")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *TRY_OUT, *options, "--json", str(file)])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        main()
    result = json.loads(file.read_text())
    assert [run["arm"] for run in result["runs"]] == ["ours-flashu"]
    calibration, breaking = result["left_out"]
    assert "shape '[3]' is invalid" in calibration["why"]
    assert (breaking["arm"], breaking["batch_size"]) == ("breaking", 1)
    assert "the device failed" in breaking["why"]
    assert "\nbest of ours-flashu: " in capsys.readouterr().out


@pytest.mark.parametrize("arm", ["ours-flashu", "release-flashu"])
def test_arm_that_cannot_be_entered_leaves_what_is_shared_as_it_was(bench, monkeypatch, arm):
    def fail(*_):
        raise ValueError("not here")

    way, moves = ARMS[arm].on(bench), []
    monkeypatch.setattr(way.vae, "to", moves.append)
    monkeypatch.setattr("gpu_arms.TextToImagePipeline.compile", fail)
    monkeypatch.setattr(bench.release, "prune_ffns", fail)
    with pytest.raises(ValueError, match="not here"), way:
        pass
    assert moves == [bench.device, "cpu"]
    assert bench.model.acceleration is None


def test_cold_is_with_compile_caches_that_are_empty(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with empty_compile_caches():
        folders = [Path(os.environ[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
        folders[0].mkdir()
        assert not any(folder == tmp_path or list(folder.glob("*")) for folder in folders)
    assert not folders[0].exists()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    assert "TRITON_CACHE_DIR" not in os.environ


def test_time_limit_breaks_off_what_takes_too_long():
    start = time.perf_counter()
    with pytest.raises(OutOfTime), time_limit(0.1):
        time.sleep(20)
    assert time.perf_counter() - start < 10


def test_prompts_are_of_natural_length_and_the_same_in_every_batch(bench):
    lengths = bench.prompt_lengths(50)
    limit = bench.config.max_text_tokens(16)
    assert set(lengths) == {limit}, "the smallest model reads no longer ones"
    assert bench.prompts(8)[:3] == bench.prompts(3)
    ids = bench.tokenizer.encode_prompt(bench.prompts(1)[0], limit)
    assert len(ids.prefix) == limit + 2
    assert not ids.truncated
