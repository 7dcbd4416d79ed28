"""Real sizes at a small one: a checkpoint laid out as the release is, and figures of all that is done with it."""

import json

import pytest
import torch

from flashu.models import Showo2Qwen2_5
from flashu.pretrained import EMBEDDING, HEAD
from tests.command import benchmark, names

SHARD_BYTES = 3_000_000
SHARDS = [f"pytorch_model-{number:05d}-of-00004.bin" for number in range(1, 5)]


def run(folder, *arguments):
    file = folder / "result.json"
    options = ("--preset", "embedded", "--folder", folder, "--shard-size", f"{SHARD_BYTES // 10**6}MB", "--json", file)
    outcome = benchmark("real_sizes.py", *options, *arguments)
    return outcome, json.loads(file.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real_sizes")
    outcome, result = run(folder, "--here")
    assert outcome.code == 0, outcome
    return folder / "embedded" / "released", outcome, result


def test_checkpoint_is_sharded_as_the_release_and_loads(made):
    released, _, _ = made
    index = "diffusion_pytorch_model.bin.index.json"
    assert names(released) == ["config.json", index, *SHARDS, "tokenizer", "vae"]
    weight_map = json.loads((released / index).read_text())["weight_map"]
    model = Showo2Qwen2_5.from_pretrained(released)
    assert model.number_format == "bfloat16"
    assert set(weight_map) == set(model.state_dict())
    assert sorted(set(weight_map.values())) == SHARDS
    for name in SHARDS:
        shard = torch.load(released / name)
        held = {tensor.data_ptr(): tensor.nbytes for tensor in shard.values()}
        assert sum(held.values()) <= SHARD_BYTES
        if EMBEDDING in shard:
            assert shard[HEAD].data_ptr() == shard[EMBEDDING].data_ptr(), "a tied head is stored once"


def test_every_step_has_its_figures(made):
    _, outcome, result = made
    steps = result["steps"]
    assert list(steps) == ["make", "load", "convert", "setup", "setup_converted", "setup_flashu", "evaluate"]
    for name, figures in steps.items():
        assert figures["seconds"] > 0, name
        assert figures["peak_rss_gib"] > figures["peak_anonymous_gib"] > 0, name
        assert f"{name} " in outcome.out
    assert steps["make"]["shards"] == len(SHARDS)
    assert steps["setup"]["identity"] == steps["setup_converted"]["identity"]
    assert steps["setup_flashu"]["identity"].startswith(steps["setup"]["identity"] + ", scores ")
    assert {"date", "cpu", "python", "torch"} <= set(result)


def test_step_that_fails_is_told(made):
    released, _, _ = made
    (released / SHARDS[0]).rename(released / "elsewhere")
    try:
        outcome, result = run(released.parent.parent, "--steps", "load")
    finally:
        (released / "elsewhere").rename(released / SHARDS[0])
    assert outcome.code == 1
    (step,) = result["steps"].items()
    assert step[0] == "load", "and none is made anew"
    assert SHARDS[0] in step[1]["failed"]
    assert str(released.parent) not in step[1]["failed"]
