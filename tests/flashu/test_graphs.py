"""Captured calls: the numbers of the calls themselves, whatever was given in between. On a GPU: `test_devices.py`."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from flashu import FlashUConfig, TextToImagePipeline, apply_flashu_patch, remove_flashu_patch, sampler
from flashu.acceleration import layer_skipping
from flashu.acceleration.plan import make_plan
from flashu.models.blocks import AS_THEY_ARE, Blocks
from flashu.models.graphs import Graphs
from flashu.models.qwen2 import Subnetwork
from tests.bounds import EVALUATION, LEVEL, TRAJECTORY
from tests.conftest import GOLDEN
from tests.recorded import Recording
from tests.reference import GoldenModel, relative_error


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@pytest.fixture
def graphs():
    return Graphs(Recording(), most_bytes=2**30)


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
def test_layers_run_in_place_and_may_be_left_out(graphs):
    layers = [nn.Linear(4, 4) for _ in range(5)]
    for seed, left_out in enumerate([(), (), (1, 3), (0, 4), (2,), ()]):
        x, pair = given(seed)
        stream, expected, own = x, x, []
        for number, linear in enumerate(layers):
            if number in left_out:
                continue
            stream, more, _ = graphs.in_place(layer, linear, stream, pair, 0.5)
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
    graphs, linear, (x, pair) = Graphs(Recording(), most_bytes=10_000), nn.Linear(4, 4), given(0)
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
def test_a_layer_that_cannot_be_captured_runs_on_what_the_one_before_it_made():
    class Second(Recording):
        def __call__(self, work):
            captured = super().__call__(work)
            self.count += 1
            if self.count == 2:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            return captured

        count = 0

    graphs, layers = Graphs(Second(), 2**30), [nn.Linear(4, 4) for _ in range(3)]
    for seed in range(4):
        x, pair = given(seed)
        made = expected = x
        for linear in layers:
            made = graphs.in_place(layer, linear, made, pair, 0.5)[0]
            expected = layer(linear, expected, pair, 0.5)[0]
        assert made.equal(expected)
    assert graphs.count == 0


@torch.no_grad()
def test_without_memory_for_graphs_calls_are_made_as_they_are(caplog):
    class Full(Recording):
        def __call__(self, work):
            raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = Graphs(Full(), 2**30)
    for _ in range(10):
        assert graphs(torch.neg, torch.ones(2)).equal(-torch.ones(2))
    assert graphs.count == graphs.bytes == 0
    assert caplog.text.count("no more CUDA graphs") == 1


def test_in_inference_mode_calls_are_made_as_they_are(graphs):
    with torch.inference_mode():
        for value in range(4):
            assert graphs(torch.neg, torch.full((2,), float(value))).tolist() == [-value, -value]
    assert graphs.count == 0


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
    graphs = Graphs(Recording(), 2**30)
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
def test_images_that_skip_different_layers_do_so_beside_graphs(monkeypatch):
    """Each of two images runs a layer that the other leaves out, alone and as often as both would."""
    golden = GoldenModel(GOLDEN / "tiny")
    apply_flashu_patch(golden.model, SKIPS, scores=golden.scores())
    monkeypatch.setattr(layer_skipping, "least_important", lambda importances, count: ((1,), (2,))[: len(importances)])
    plan = golden.model.acceleration.plan(SKIPS.total_steps, 5.0)
    noise, rows, points = golden.expected["noise"], golden.prompt_tokens([0, 1]), sampler.time_grid(SKIPS.total_steps)
    captured = Blocks.through(lambda block: block).captured(Graphs(Recording(), 2**30))
    *_, expected = sampler.trajectory(golden.model, noise[:2], rows, points, plan)
    for _ in range(3):
        *_, state = sampler.trajectory(golden.model, noise[:2], rows, points, plan, captured)
        assert relative_error(state, expected) < TRAJECTORY


@torch.no_grad()
def test_prefixes_of_two_subnetworks_are_kept_side_by_side():
    golden = GoldenModel(GOLDEN / "tiny")
    model, layers = golden.model, len(golden.model.showo.model.layers)
    nobody = torch.empty(0, dtype=torch.long)
    some = Subnetwork(running_rows=(None, nobody, *[None] * (layers - 2)))
    captured = Blocks.through(lambda block: block).captured(Graphs(Recording(), 2**30))
    text = model.lay_out_text([golden.rows[0], golden.null_rows[0]], golden.grid, guided=True, blocks=captured)
    expected = model.read_text(text).llm[-1]
    for _ in range(3):
        prefix = model.read_text(text, blocks=captured)
        model.read_text(text, some, blocks=captured)
        for half, other in zip(prefix.llm[-1], expected, strict=True):
            assert relative_error(half.key, other.key) < EVALUATION


@torch.no_grad()
@pytest.mark.parametrize("most_bytes", [2**16, 2**18, 2**20])
def test_graphs_that_are_dropped_in_the_middle_of_a_run_leave_it_as_it_is(most_bytes):
    golden = GoldenModel(GOLDEN / "tiny")
    apply_flashu_patch(golden.model, SKIPS, scores=golden.scores())
    plan = golden.model.acceleration.plan(SKIPS.total_steps, 5.0)
    noise, rows, points = golden.expected["noise"][:1], golden.prompt_tokens([0]), sampler.time_grid(SKIPS.total_steps)
    graphs = Graphs(Recording(), most_bytes)
    captured = Blocks.through(lambda block: block).captured(graphs)
    *_, expected = sampler.trajectory(golden.model, noise, rows, points, plan)
    for _ in range(3):
        *_, state = sampler.trajectory(golden.model, noise, rows, points, plan, captured)
        assert relative_error(state, expected) < TRAJECTORY
    assert graphs.captures > graphs.count


@torch.no_grad()
def test_weights_that_are_changed_in_place_are_those_that_run():
    golden = GoldenModel(GOLDEN / "tiny")
    noise, rows, points = golden.expected["noise"][:1], golden.prompt_tokens([0]), sampler.time_grid(4)
    plan, model = make_plan(None, 4, 5.0), golden.model
    captured = Blocks.through(lambda block: block).captured(Graphs(Recording(), 2**30))
    for _ in range(3):
        for weight in (model.position_embedding.weight, model.showo.model.norm.weight, model.diff_proj[0].weight):
            weight.data.mul_(1.1)
            *_, expected = sampler.trajectory(model, noise, rows, points, plan)
            *_, state = sampler.trajectory(model, noise, rows, points, plan, captured)
            assert relative_error(state, expected) < TRAJECTORY


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
    graphs = Graphs(Recording(), 2**30)
    assert np.abs(pictures(plain.captured(graphs)) - pictures(AS_THEY_ARE)).max() <= LEVEL
    assert graphs.captures > 50


def test_large_batches_are_not_captured(monkeypatch):
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    graphs = Graphs(Recording(), 2**30)
    pipe.blocks = Blocks.through(lambda block: block).captured(graphs)
    height, width = pipe.model.config.native_grid
    monkeypatch.setattr("flashu.models.blocks.MOST_POSITIONS", 2 * 2 * (1 + height * width))
    pipe(["a red circle"] * 3, num_inference_steps=3, batch_size=3)
    assert graphs.captures == 0
    pipe(["a red circle"] * 2, num_inference_steps=3, batch_size=2)
    assert graphs.count > 10
    pipe.compile("off")
    assert graphs.count == 0, "and their memory is given back where they are switched off"
