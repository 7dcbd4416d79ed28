"""Compiled blocks: the same numbers, and a line where nothing can be compiled."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from graphs import graphs_compiled

from flashu import FlashUConfig, InputError, apply_flashu_patch, sampler
from flashu.models.blocks import AS_THEY_ARE, compile_blocks
from flashu.models.qwen2 import DecoderLayer
from tests.bounds import TRAJECTORY
from tests.command import assert_refused, flashu
from tests.conftest import GOLDEN
from tests.reference import GoldenModel, relative_error

GENERATE = "generate", "a red circle", "--compile", "max", "--steps", "2", "--device", "cpu", "-o"


@pytest.mark.slow
def test_compiled_by_inductor_a_trajectory_is_the_same_to_rounding():
    """The LLM's layers over one image's tokens, pruned: C++ takes over a second a kernel.

    That any way of calling any block is traced right is shown in `tests/jobs/worker/test_warm_up.py`.
    """
    torch._dynamo.reset()
    golden = GoldenModel(GOLDEN / "tiny")
    settings = FlashUConfig(r_p=0.4, r_LS=0.0, T_LS=4, T_cache=2, tau=0, schedule=None, num_inference_steps=4)
    apply_flashu_patch(golden.model, settings, scores=golden.scores())
    plan = golden.model.acceleration.plan(settings.total_steps, 5.0)
    noise, rows = golden.expected["noise"][:1], golden.prompt_tokens([0])
    points, before = sampler.time_grid(plan.num_inference_steps), graphs_compiled()
    *_, plain = sampler.trajectory(golden.model, noise, rows, points, plan)
    compiled = torch.compile(DecoderLayer.forward)

    def run_layer(layer, x, rotary, past=None, *more):
        forward = DecoderLayer.forward if past is None else compiled  # a text has no past
        return forward(layer, x, rotary, past, *more)

    blocks = replace(AS_THEY_ARE, llm_layer=run_layer, compiler=lambda function: function)
    # To find out which instructions the C++ compiler knows takes as long as the kernels do.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True, "cpp.simdlen": 256}):
        *_, fast = sampler.trajectory(golden.model, noise, rows, points, plan, blocks)
    torch._inductor.cpu_vec_isa.valid_vec_isa_list.cache_clear()  # which remembers what was not looked at
    assert relative_error(fast, plain) < TRAJECTORY
    assert graphs_compiled() == before + 1


def test_modes():
    cpu = torch.device("cpu")
    assert compile_blocks("auto", cpu) is compile_blocks("off", cpu) is AS_THEY_ARE
    with pytest.raises(InputError, match="compile is 'fast'; choose one of: auto, off, max, graphs"):
        compile_blocks("fast", cpu)


def test_where_compiled_code_cannot_be_kept_max_says_so_in_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "below")}
    command = [sys.executable, "-m", "jobs", *GENERATE, str(tmp_path / "a.png")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 2
    assert "compile=max, but torch.compile does not work here" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "a.png").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, as Python does outside of tests
def test_without_a_compiler_max_says_so_in_a_line(tmp_path, monkeypatch, capfd):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):  # which is what CXX sets
        outcome = flashu(*GENERATE, tmp_path / "a.png")
    assert_refused(outcome, "compile=max, but torch.compile does not work here")
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "a.png").exists()
