"""What a batch dispatches to a device that is not there: operators, waits, and calls of compiled blocks."""

import json
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from dispatched import CALL, CAPTURED, COMPILED, OPERATOR, UNCOMPILED, WAIT, WAYS, Launches
from launches import count_launches
from time_split import OTHER
from torch import nn

from flashu.acceleration.applied import Acceleration
from flashu.config import FLASHU_PRESETS, FlashUConfig
from flashu.models.blocks import AS_THEY_ARE
from flashu.models.presets import preset
from tests.command import benchmark


@torch.no_grad()
def names(work, kind=OPERATOR):
    """How often each operator is dispatched, or waited for."""
    with Launches() as launches:
        work()
    return launches.by(lambda event: event.name, kind)


def on_device(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_operators_are_those_that_launch_something():
    x, linear = on_device(2, 3, 8), nn.Linear(8, 4, device="meta")

    def work():
        y = (torch.empty_like(x) + 1).view(6, 8)[2:]  # memory set aside, and views, launch nothing
        y.mul_(2)
        y = linear(torch.cat((y, y)).t().contiguous().reshape(8, 8))
        y = y.to(torch.float32) + torch.arange(8, device="meta")[:, None]
        y[:0] * 2  # of no elements
        torch.ones(3) + 1  # of the host
        y.expand(2, -1, -1).transpose(1, 2).flatten()  # copies, as no view can

    assert names(work) == {"add": 2, "mul_": 1, "cat": 1, "clone": 2, "addmm": 1, "arange": 1}
    assert names(work, WAIT) == {}


@pytest.mark.parametrize(("masked", "heads"), [(False, 4), (True, 4), (False, 2)])
def test_attention_is_one_operator(masked, heads):
    query, key = on_device(2, 4, 5, 8, dtype=torch.bfloat16), on_device(2, heads, 7, 8, dtype=torch.bfloat16)
    mask = on_device(2, 1, 1, 7, dtype=torch.bool) if masked else None

    def work():
        out = F.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=heads != 4)
        assert out.shape == query.shape

    assert names(work) == {"scaled_dot_product_attention": 1}


def test_norms_are_one_operator():
    x = on_device(2, 5, 8, dtype=torch.bfloat16)
    rms, layer = (kind(8, device="meta", dtype=torch.bfloat16) for kind in (nn.RMSNorm, nn.LayerNorm))
    assert names(lambda: layer(rms(x))) == {"rms_norm": 1, "native_layer_norm": 1}


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda: torch.tensor([1, 2], device="meta"), {"tensor": 1}),
        (lambda: torch.as_tensor([1, 2], device="meta"), {"as_tensor": 1}),
        (lambda: on_device(3).new_tensor([1.0]), {"new_tensor": 1}),
        (lambda: torch.ones(3).to("meta"), {"_to_copy": 1}),
        (lambda: torch.tensor(1.0).to("meta"), {"_to_copy": 1}),
        (lambda: on_device(3).copy_(torch.ones(3)), {"copy_": 1}),
        (lambda: on_device(3)[torch.ones(2, dtype=torch.long)], {"index": 1}),
        (lambda: on_device(3)[[0, 1]], {"index": 1}),
        (lambda: on_device(2, 3)[:, [0, 1]], {"index": 1}),
        # These do not:
        (lambda: torch.tensor([], device="meta"), {}),
        (lambda: torch.tensor([1, 2]), {}),
        (lambda: torch.full((2,), 1.0, device="meta"), {}),
        (lambda: torch.arange(2, device="meta"), {}),
        (lambda: torch.ones(3).to("meta", non_blocking=True), {}),
        (lambda: on_device(3).copy_(torch.ones(3), non_blocking=True), {}),
        (lambda: on_device(3).copy_(torch.ones(3), True), {}),
        (lambda: on_device(3) * torch.tensor(2.0), {}),
        (lambda: on_device(3)[1:][on_device(2, dtype=torch.long)], {}),
    ],
)
def test_the_host_waits_for_numbers_that_it_sends_blocking(work, waits):
    assert names(work, WAIT) == waits


def test_what_is_sent_is_an_operator_too():
    for work in (lambda: torch.tensor([1, 2], device="meta"), lambda: torch.ones(2).to("meta", non_blocking=True)):
        assert sum(names(work).values()) == 1


def test_reading_the_device_cannot_be_missed():
    for read in (torch.Tensor.tolist, torch.Tensor.nonzero, lambda x: x[0].item(), lambda x: x[x > 0]):
        with pytest.raises((NotImplementedError, RuntimeError)):
            names(lambda read=read: read(on_device(3)))


def counted(settings, way=UNCOMPILED):
    config, vae = preset("embedded")
    plan = Acceleration.of(settings, config.llm).plan(settings.total_steps, 5.0)
    return count_launches(config, vae, plan, way=way)


def test_blocks_that_are_dispatched_once_count_as_if_each_time(monkeypatch):
    """With settings that skip layers, measure them, and run a part of their neurons."""
    settings = FlashUConfig(r_p=0.3, r_LS=0.3, T_LS=3, T_cache=2, tau=2, schedule=[(2, 3.0), (2, 1.0), (4, 6.0)])
    remembered = counted(settings)
    monkeypatch.setattr(Launches, "blocks", lambda self, way: AS_THEY_ARE)
    assert counted(settings).events == remembered.events


def test_every_call_of_a_block_is_one_where_blocks_are_compiled():
    """13 steps of the built-in model: 3 vision layers, 10 of the LLM, 3 head blocks. Both rows of its text are run
    through at once, the head's last block for its keys and values only."""
    launches = counted(FLASHU_PRESETS["few-steps"], COMPILED)
    assert launches.by(lambda event: event.name, CALL) == {
        "llm_layer": 13 * 10 + 10, "vision_layer": 13 * 3, "head_block": 13 * 3, "head_text_block": 2,
        "fused": 13, "advance": 13,
    }  # fmt: skip
    parts = {"LLM", "image path", "head", "prefix", OTHER}
    assert set(launches.by(lambda event: event.part, CALL)) == parts
    blocks = Launches().blocks(COMPILED)
    calls = {field.name: getattr(blocks, field.name) for field in fields(blocks)}
    plain = [name for name, call in calls.items() if callable(call) and call == getattr(AS_THEY_ARE, name)]
    assert plain == []


def test_a_captured_image_is_graphs_and_what_they_are_given():
    """Each step of these alike: the image path, 10 layers, the head, and its end."""
    launches = counted(FLASHU_PRESETS["few-steps"], CAPTURED)
    assert launches.by(lambda event: event.name, CALL) == {"graph": 13 * 13 + 10 + 1}
    per_step = launches.by(lambda event: event.step, OPERATOR, CALL)
    assert per_step[5] == per_step[6] < 25


def test_the_script_counts_three_settings(tmp_path):
    file = tmp_path / "result.json"
    outcome = benchmark("launches.py", "--preset", "embedded", "--images", 2, "--json", file)
    assert outcome.code == 0, outcome
    result = json.loads(file.read_text())
    assert result["images"] == 2
    assert result["command"].startswith("python benchmarks/launches.py --preset embedded --images 2 --json ")
    assert [each["evaluations"] for each in result["counts"]] == [49, 34, 13]
    for each in result["counts"]:
        uncompiled, compiled, captured = (each[way] for way in WAYS)
        assert 0 < compiled["together"] < uncompiled["together"] / 3
        assert 0 < captured["together"] < compiled["together"]
        assert captured["calls"].keys() == {"graph"}
        for way in (uncompiled, compiled, captured):
            operators = sum(way["operators"].values())
            assert operators == sum(way["operators_by_name"].values()) == sum(way["operators_by_place"].values())
            assert way["together"] == operators + sum(way["calls"].values())
            assert way["together"] == sum(way["per_step"]) + way["operators"]["VAE"]
        assert all(place.startswith("flashu/") for place in uncompiled["operators_by_place"])
        assert f"{uncompiled['together']:,}" in outcome.out
    measured = [sum(each["waits_after_measuring"].values()) for each in result["counts"]]
    assert measured == [0, 2, 0]


def test_a_batch_of_none_is_refused():
    refused = benchmark("launches.py", "--images", 0)
    assert refused.code == 2
    assert "a batch has one at least" in refused.err
