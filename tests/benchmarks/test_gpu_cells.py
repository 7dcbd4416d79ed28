"""What the GPU benchmark makes of its measurements: how long others will take, and which batch size is best."""

import pytest
import torch
from gpu_arms import ARMS, Timing
from gpu_attempts import Attempts, Budget
from gpu_bench import Bench
from gpu_cells import Cell, Forecast
from gpu_report import entries
from gpu_series import Series

from flashu.config import flashu_preset
from flashu.models.presets import PRESETS, VAE_PRESETS


def cells(seconds):
    return {key: Cell(*key, "auto", [Timing(value, value)]) for key, value in seconds.items()}


def test_forecast_counts_on_compiling_for_each_kind_of_batch_once():
    forecast = Forecast(cells({("ours-flashu", 1): 1.0}))
    forecast.note_first("ours-flashu", False, first_s=41.0, usual_s=1.0)
    again, larger = (forecast.seconds(Cell("ours-flashu", batch, "auto"), 1.0) for batch in (1, 4))
    assert again == pytest.approx(2)
    assert larger == pytest.approx(40 + 2 * 4), "as long as for one image, and in proportion to its batch"
    assert forecast.seconds(Cell("ours", 1, "auto"), 0.5) == pytest.approx(40 + 1.5), "as the slowest other arm"
    assert forecast.seconds(Cell("release", 1, "off"), 0.5) == pytest.approx(1.5)
    forecast.note_first("ours", True, first_s=30.0, usual_s=1.0)
    assert forecast.seconds(Cell("ours-few-steps", 4, "auto"), 1.0) < 10, "on blocks that `ours` compiled"


def test_forecast_grows_with_the_batch_as_the_leader_did():
    known = {("ours-flashu", 1): 1.0, ("ours-flashu", 4): 1.5, ("ours-flashu", 8): 3.0, ("release", 1): 2.0}
    forecast = Forecast(cells(known))
    assert forecast.seconds(Cell("release", 4), 0.0) == pytest.approx(2 * 1.5)
    forecast.cells |= cells({("release", 4): 5.0})
    assert forecast.seconds(Cell("release", 8), 0.0) == pytest.approx(5 * 3 / 1.5), "from the nearest batch size"
    assert forecast.seconds(Cell("release", 16), 0.0) == pytest.approx(5 * 4), "where the leader has not been"


@pytest.fixture
def series():
    config, settings = PRESETS["embedded"], flashu_preset("paper-1.5b")
    bench = Bench(config, VAE_PRESETS["embedded"], config.native_grid, settings, torch.device("cpu"), torch.float32)
    series = Series(bench, ARMS, [1, 4, 8, 16], Attempts(bench.device, Budget(100)), 1)
    known = {
        ("ours-flashu", 1): 1.0, ("ours-flashu", 4): 2.0, ("ours-flashu", 8): 3.97,
        ("release", 1): 2.0, ("release", 4): 6.0, ("release", 8): 11.95, ("release", 16): 23.85,
        ("release-flashu", 1): 1.5, ("release-flashu", 4): 4.0,
    }  # fmt: skip
    series.cells |= cells(known)
    series.measure = lambda arm, batch: series.cells.get((arm, batch))
    return series


def test_best_batch_is_compared_where_it_is_known_to_be_best(series):
    for arm in ("ours-flashu", "release", "release-flashu"):
        series.find_best(arm)
    best = entries(series, {})["best"]
    assert (best["ours-flashu"]["batch_size"], best["ours-flashu"]["found_by"]) == (8, "batch 8 gains less than 2%")
    assert best["release"]["found_by"] == "batch 8 gains less than 2%"
    assert best["release"]["batch_size"] == 16, "the quickest by a hair"
    assert best["ours-flashu"]["speed_up"] == pytest.approx(8 / 3.97 / (16 / 23.85))
    assert best["release-flashu"]["is_known"] is False, "batch 8 was not tried"
    assert best["ours-flashu"]["speed_up_over_release_flashu"] is None
    assert best["release-flashu"]["speed_up"] is None
