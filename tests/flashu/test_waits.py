"""A batch is handed to the device without waiting for it, so that the next one can be begun meanwhile."""

import pytest
import torch
from dispatched import OPERATOR, WAIT, WAYS
from launches import count_launches

from flashu import FlashUConfig, sampler
from flashu.acceleration import layer_skipping
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.plan import make_plan
from flashu.models.presets import preset
from tests.conftest import GOLDEN
from tests.reference import GoldenModel

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SETTINGS = {
    "off": None,
    "all": FlashUConfig(r_LS=0.3, T_LS=3, T_cache=2, tau=2, schedule=((3, 1.0), (5, 7.5)), num_inference_steps=8),
    "order 2": FlashUConfig(r_p=0, r_LS=0, T_LS=None, T_cache=None, tau=0, schedule=None, solver_order=2,
                            num_inference_steps=5),
}  # fmt: skip


def plan_of(settings, config):
    return (
        Acceleration.of(settings, config.llm).plan(settings.total_steps, 7.5) if settings else make_plan(None, 4, 7.5)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_nothing_between_noise_and_pixels_waits(settings, images, way, monkeypatch):
    """Seen on `meta`: no tensor is made on the device of Python's numbers, and no copy from the host is waited for.

    A measurement of layers is read by the host on a real device; that is one wait, and all it decides, other layers for
    each image, is sent at once.
    """
    skipped = lambda importances, count: tuple((image, *range(5, 4 + count)) for image in range(len(importances)))  # noqa: E731
    monkeypatch.setattr(layer_skipping, "least_important", skipped)
    config, vae = preset("embedded")
    launches = count_launches(config, vae, plan_of(settings, config), images, way)
    assert launches.by(lambda event: (event.place, event.name), WAIT) == {}
    assert len(launches.by(lambda event: event.part, OPERATOR)) > 4, "and it saw what was dispatched"


@CUDA
@torch.no_grad()
@pytest.mark.parametrize("settings", [SETTINGS["off"], SETTINGS["order 2"]], ids=["off", "order 2"])
def test_a_gpu_is_not_waited_for(settings):
    """By PyTorch's own watch. Settings that measure layers wait, once each."""
    golden = GoldenModel(GOLDEN / "tiny", "cuda")
    plan = plan_of(settings, golden.model.config)
    noise, rows = golden.expected["noise"].cpu(), golden.prompt_tokens(range(len(golden.rows)))
    points = sampler.time_grid(plan.num_inference_steps)
    for mode in ("default", "error"):  # what libraries do once may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            *_, state = sampler.trajectory(golden.model, noise, rows, points, plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert state.isfinite().all()
