"""The published code's numbers on every device that is here, in both number formats, as they are and compiled.

On a CPU, float32 as it is stands in `test_parity.py`, and a compiled layer in `test_blocks.py`; what differs on a GPU
(joined projections, other attention kernels, a stream for the VAE) is seen where there is one. Bounds: tests/bounds.py.
"""

import pytest
import torch

from flashu import FlashUConfig, apply_flashu_patch, sampler
from flashu.acceleration.plan import make_plan
from flashu.devices import is_device_error, is_out_of_memory, resolve_device
from flashu.models.blocks import AS_THEY_ARE, compile_blocks
from tests.bounds import OF_DECODING, OF_EVALUATION, OF_TRAJECTORY
from tests.conftest import GOLDEN
from tests.reference import GoldenModel, load_vae, relative_error

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def ways():
    """Folder, device, number format, and how blocks are compiled: that takes half a minute, so of one folder only."""
    for folder in ("tiny", "tiny_hq"):
        yield pytest.param(GOLDEN / folder, "cpu", torch.bfloat16, "off", id=f"{folder}-cpu-bfloat16")
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{folder}-cuda-{str(dtype).removeprefix('torch.')}"
            yield pytest.param(GOLDEN / folder, "cuda", dtype, "off", id=name, marks=CUDA)
            for mode in ("auto", "graphs") if folder == "tiny" else ():
                yield pytest.param(GOLDEN / folder, "cuda", dtype, mode, id=f"{name}-{mode}", marks=CUDA)


WAYS = list(ways())
HEAD_CACHE = {"r_p": 0.2, "T_LS": None, "schedule": None}  # skipped layers depend on near ties, so on rounding


@pytest.fixture(autouse=True)
def full_float32():
    """GPUs may round float32 convolutions to fewer bits unless told not to."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def blocks_for(device, mode):
    blocks = compile_blocks(mode, torch.device(device))
    assert (blocks is AS_THEY_ARE) == (mode == "off"), "it cannot compile"
    return blocks


def trajectory(*run, blocks):
    """All states of a run: where calls are captured, of one that replays what those before it captured."""
    if blocks.graphs:
        for _ in range(2):
            list(sampler.trajectory(*run, blocks))
        assert blocks.graphs.count > 10
    return list(sampler.trajectory(*run, blocks))


@torch.no_grad()
@pytest.mark.parametrize(("folder", "device", "dtype", "mode"), WAYS)
def test_one_evaluation_and_a_guided_trajectory(folder, device, dtype, mode):
    golden, blocks = GoldenModel(folder, device, dtype), blocks_for(device, mode)
    model, expected = golden.model, golden.expected
    time = model.embed_times(expected["step_t"]).at(0)
    with blocks.compiling():
        prefix = model.encode_prefix(golden.rows + golden.null_rows, golden.grid, guided=True, blocks=blocks)
        velocity = model.velocity(expected["noise"], time, prefix).float()
    wanted = torch.cat((expected["step_velocity_cond"], expected["step_velocity_uncond"]))
    assert relative_error(velocity, wanted) < OF_EVALUATION[dtype]

    plan = make_plan(None, golden.meta["num_inference_steps"], golden.meta["guidance_scale"])
    points = sampler.time_grid(plan.num_inference_steps, golden.meta["time_shifting_factor"])
    rows = golden.prompt_tokens(range(len(golden.rows)))
    states = trajectory(model, expected["noise"], rows, points, plan, blocks=blocks)
    for state, reference in zip(states, expected["sample_base_trajectory"], strict=True):
        assert relative_error(state, reference) < OF_TRAJECTORY[dtype]


@pytest.mark.parametrize(("folder", "device", "dtype", "mode"), WAYS)
def test_flashu_is_that_of_the_cpu_in_float32(folder, device, dtype, mode):
    def last(device, dtype, mode):
        golden, blocks = GoldenModel(folder, device, dtype), blocks_for(device, mode)
        config = FlashUConfig(**HEAD_CACHE, tau=3, T_cache=2, num_inference_steps=9)
        apply_flashu_patch(golden.model, config, scores=scores)
        plan = golden.model.acceleration.plan(config.total_steps, golden.meta["guidance_scale"])
        rows, points = golden.prompt_tokens(range(len(golden.rows))), sampler.time_grid(config.total_steps)
        *_, state = trajectory(golden.model, golden.expected["noise"], rows, points, plan, blocks=blocks)
        return state.cpu()

    scores = GoldenModel(folder).scores()
    assert relative_error(last(device, dtype, mode), last("cpu", torch.float32, "off")) < OF_TRAJECTORY[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_vae(device, dtype):
    vae, expected = load_vae(GOLDEN / "vae_tiny", device)
    decoded = vae.to(dtype).decode(expected["latents"]).float()
    assert relative_error(decoded, expected["decoded"]) < OF_DECODING[dtype]


def test_a_gpu_goes_by_its_number(monkeypatch):
    """As `torch.cuda.set_device` wants it, and as tensors say where they are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device(None) == resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("message", "memory", "broken"),
    [
        ("backend='inductor' raised:\nCUDA out of memory. Tried to allocate 2.00 GiB", True, False),
        ("CUDA error: out of memory", True, False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True, False),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`", False, False),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", False, False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False, True),
        ("CUDA error: an illegal memory access was encountered", False, True),
        ("CUDA error: device-side assert triggered", False, True),
        ("expected a tensor", False, False),
    ],
)
def test_which_errors_a_process_recovers_from(message, memory, broken):
    error = RuntimeError(message)
    assert (is_out_of_memory(error), is_device_error(error)) == (memory, broken)
