"""Captured calls: the numbers of the calls themselves, whatever was given in between. On a GPU: `test_devices.py`."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from flashu import FlashUConfig, TextToImagePipeline, apply_flashu_patch, remove_flashu_patch, sampler
from flashu.acceleration.plan import make_plan
from flashu.models.blocks import AS_THEY_ARE, Blocks
from flashu.models.graphs import Graphs
from tests.bounds import LEVEL, TRAJECTORY
from tests.conftest import GOLDEN
from tests.recorded import record
from tests.reference import GoldenModel, relative_error


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@pytest.fixture
def graphs():
    return Graphs(lambda: record, most_bytes=2**30)


def layer(linear, x, pair, scale, extra=None):
    x = x + scale * torch.tanh(linear(x)) * pair.left
    return x, pair.right + x.sum(), extra


def given(seed, rows=2):
    torch.manual_seed(seed)
    return torch.randn(rows, 3, 4), Pair(torch.randn(rows, 3, 4), torch.randn(4))


@torch.no_grad()
def test_a_captured_call_is_the_call(graphs):
    linear = nn.Linear(4, 4)
    for seed in range(5):
        for scale in (1.0, 2.0):  # no tensor, so another graph
            x, pair = given(seed)
            made, expected = graphs(layer, linear, x, pair, scale), layer(linear, x, pair, scale)
            assert made[2] is None
            assert made[0].equal(expected[0])
            assert made[1].equal(expected[1])
    assert graphs.count == graphs.captures == 2


@torch.no_grad()
def test_inputs_are_read_anew_where_they_changed(graphs):
    """The same tensor with other contents, and another tensor with the contents of one before it."""
    linear, (x, pair) = nn.Linear(4, 4), given(0)
    for step in range(6):
        if step % 2:
            x.mul_(1.5)
            pair = Pair(pair.left.clone(), pair.right)
        assert graphs(layer, linear, x, pair, 1.0)[1].equal(layer(linear, x, pair, 1.0)[1])


@torch.no_grad()
def test_what_one_call_makes_another_reads(graphs):
    """Whose memory is the same at each replay, with other numbers in it."""
    linear = nn.Linear(4, 4)
    for seed in range(5):
        x, pair = given(seed)
        first = graphs(layer, linear, x, pair, 1.0)[0]
        second = graphs(layer, linear, first, pair, 2.0)[0]
        expected = layer(linear, layer(linear, x, pair, 1.0)[0], pair, 2.0)[0]
        assert second.equal(expected)


@torch.no_grad()
def test_one_tensor_in_two_places_may_be_two_later(graphs):
    def add(x, y):
        return x + 2 * y

    x, y = torch.randn(2, 3)
    for _ in range(3):
        assert graphs(add, x, x).equal(3 * x)
    assert graphs(add, x, y).equal(x + 2 * y)
    assert graphs.count == 1


@torch.no_grad()
def test_layers_that_stream_run_in_place_and_may_be_left_out(graphs):
    layers = [nn.Linear(4, 4) for _ in range(5)]
    for seed, left_out in enumerate([(), (), (1, 3), (0, 4), (2,), ()]):
        x, pair = given(seed)
        stream, expected, own = x, x, []
        for number, linear in enumerate(layers):
            if number in left_out:
                continue
            stream, more, _ = graphs.stream(layer, linear, stream, pair, 0.5)
            expected, right, _ = layer(linear, expected, pair, 0.5)
            own.append((more, right))
        assert stream.equal(expected)
        assert all(one.equal(other) for one, other in own), "each layer's own are kept apart"
        assert x.equal(given(seed)[0]), "and the caller's tensor is not written to"
    assert graphs.count == 5


@torch.no_grad()
def test_weights_that_lie_elsewhere_are_seen(graphs):
    linear, (x, pair) = nn.Linear(4, 4), given(0)
    for change in (None, None, "in place", "moved", None):
        if change == "in place":
            linear.weight.mul_(2)
        if change == "moved":
            linear.weight.data = linear.weight.flip(0)
        graphs.watch(linear)
        assert graphs(layer, linear, x, pair, 1.0)[0].equal(layer(linear, x, pair, 1.0)[0])
    assert graphs.captures == 2


@torch.no_grad()
def test_memory_is_bounded(graphs, caplog):
    graphs, linear, (x, pair) = Graphs(lambda: record, most_bytes=10_000), nn.Linear(4, 4), given(0)
    sizes = []
    for scale in range(200):
        for _ in range(3):
            assert graphs(layer, linear, x, pair, scale)[0].equal(layer(linear, x, pair, scale)[0])
        sizes.append(graphs.bytes)
    one = sizes[0]
    assert 100 < one < 2_000
    assert max(sizes) < 10_000 + one
    assert 20 < graphs.captures < 200, "it ends, where graphs would be made over and over"
    assert caplog.text.count("no more CUDA graphs") == 1


@torch.no_grad()
def test_where_capturing_fails_calls_are_made_as_they_are(graphs, caplog):
    def reads(x):
        return x * x.sum().item()

    x = torch.randn(3)
    for _ in range(4):
        assert graphs(reads, x).equal(reads(x))
    assert caplog.text.count("capturing failed") == 1
    assert "is not permitted while a call is captured" in caplog.text
    assert graphs.count == 0


@torch.no_grad()
def test_out_of_memory_is_the_callers(graphs):
    def capture(work):
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = Graphs(lambda: capture, 2**30)
    graphs(torch.neg, torch.ones(2))
    with pytest.raises(torch.OutOfMemoryError):
        graphs(torch.neg, torch.ones(2))
    assert graphs(torch.neg, torch.ones(2)).equal(-torch.ones(2)), "it was forgotten that it was seen"


SKIPS = FlashUConfig(r_p=0.4, r_LS=0.34, T_LS=4, T_cache=2, tau=3, schedule=((7, 5.0), (5, 7.5)))
PHASES = FlashUConfig(r_p=0.4, r_LS=0.34, T_LS=3, T_cache=2, tau=2, schedule=((4, 5.0), (3, 1.0), (3, 7.5)))
SECOND_ORDER = FlashUConfig(
    r_p=0, r_LS=0, T_LS=None, T_cache=None, tau=0, schedule=None, solver_order=2, num_inference_steps=6
)


@torch.no_grad()
@pytest.mark.parametrize("batches", [[[0], [1], [0], [1]], [[0, 1], [1, 0], [1], [0, 1]]], ids=["ones", "pairs"])
@pytest.mark.parametrize("settings", [None, SKIPS, PHASES, SECOND_ORDER], ids=["off", "skips", "phases", "order 2"])
def test_captured_runs_are_runs(settings, batches):
    """Of prompts of two lengths: all steps' states, though each call writes over what the one before it made."""
    golden = GoldenModel(GOLDEN / "tiny")
    plan = make_plan(None, 5, 5.0)
    if settings:
        apply_flashu_patch(golden.model, settings, scores=golden.scores())
        plan = golden.model.acceleration.plan(settings.total_steps, 5.0)
    graphs = Graphs(lambda: record, 2**30)
    captured = Blocks.through(lambda block: block).captured(graphs)
    points, counts = sampler.time_grid(plan.num_inference_steps), []
    for number, prompts in enumerate(batches):
        noise, rows = torch.randn(len(prompts), *golden.expected["noise"].shape[1:]), golden.prompt_tokens(prompts)
        expected = list(sampler.trajectory(golden.model, noise, rows, points, plan))
        states = list(sampler.trajectory(golden.model, noise, rows, points, plan, captured))
        for state, plain in zip(states, expected, strict=True):
            assert relative_error(state, plain) < TRAJECTORY, number
        counts.append(graphs.captures)
    assert 10 < counts[-1] < 200
    assert counts[-1] == counts[-2], "what came twice is not captured again"


@torch.no_grad()
def test_pictures_of_a_pipeline_whose_settings_change_in_between():
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    settings = FlashUConfig(r_p=0.3, r_LS=0.3, T_LS=3, T_cache=2, tau=2, schedule=None, num_inference_steps=7)

    def pictures(blocks):
        pipe.blocks = blocks
        made = []
        for patch in (False, True, False, True):
            (apply_flashu_patch if patch else remove_flashu_patch)(pipe.model, *([settings] if patch else []))
            for prompts in (["a red circle"], ["a blue square above a green star", "a red circle"]):
                made += pipe(prompts, seeds=3, num_inference_steps=7, batch_size=2)
        remove_flashu_patch(pipe.model)
        return np.stack([np.asarray(picture).astype(int) for picture in made])

    plain = Blocks.through(lambda block: block)
    graphs = Graphs(lambda: record, 2**30)
    assert np.abs(pictures(plain.captured(graphs)) - pictures(AS_THEY_ARE)).max() <= LEVEL
    assert graphs.captures > 50


def test_large_batches_are_not_captured(monkeypatch):
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    graphs = Graphs(lambda: record, 2**30)
    pipe.blocks = Blocks.through(lambda block: block).captured(graphs)
    height, width = pipe.model.config.native_grid
    monkeypatch.setattr("flashu.models.blocks.MOST_POSITIONS", 2 * 2 * (1 + height * width))
    pipe(["a red circle"] * 3, num_inference_steps=3, batch_size=3)
    assert graphs.captures == 0
    pipe(["a red circle"] * 2, num_inference_steps=3, batch_size=2)
    assert graphs.captures > 10
