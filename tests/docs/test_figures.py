"""The tables of README and docs show what the committed results hold: each row is made here from its file."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PERFORMANCE, QUALITY = "docs/how-it-works/performance.md", "docs/how-it-works/quality.md"
SIZES = {
    "1.5B at 432": "show-o2-1.5b",
    "1.5B-HQ at 512": "show-o2-1.5b-hq-512",
    "1.5B-HQ at 1024": "show-o2-1.5b-hq-1024",
    "7B at 432": "show-o2-7b",
}
ARMS = {
    "release, 50 steps": "release",
    "release, FlashU": "release-flashu",
    "ours, 50 steps": "ours",
    "ours, FlashU": "ours-flashu",
    "ours, `few-steps`": "ours-few-steps",
}
MORE_ARMS = {
    "ours, FlashU, uncompiled": "ours-flashu-uncompiled",
    "ours, FlashU, 24 prompts of as many lengths, each once": "ours-flashu-natural",
    "ours, FlashU, these prompts, without cuDNN's attention": "ours-flashu-natural-no-cudnn",
}
SETTINGS = {
    "unaccelerated, 50 steps": "stock-50",
    "20 steps": "stock-20",
    "12 steps": "stock-12",
    "8 steps": "stock-8",
    "FFN pruning alone, r_p = 0.2": "ffn-pruning-alone",
    "guidance schedule alone": "guidance-schedule-alone",
    "head cache alone, T_cache = 5": "head-cache-alone",
    "layer skipping alone, r_LS = 0.2": "layer-skipping-alone",
    "the paper's settings, guidance in proportion": "paper",
    "those, without layer skipping": "paper-without-layer-skipping",
    "those, tau = 19": "paper-tau-19",
    "preset `quality`": "quality",
    "preset `fast`": "fast",
    "`embedded`: FFN pruning and T_cache = 3, 35 steps": "embedded",
    "20 steps of order 2": "order-2-20",
    "`few-steps`: 14 of order 2": "few-steps",
    "12 of order 2": "order-2-12",
    "10 of order 2": "order-2-10",
    "8 of order 2": "order-2-8",
}
ANSWERING = {
    "unaccelerated": "off",
    "FFN pruning, und_r_p = 0.2": "FFN pruning 0.2",
    "FFN pruning, 0.4": "FFN pruning 0.4",
    "FFN pruning, 0.6": "FFN pruning 0.6",
    "layer skipping, und_r_LS = 0.1": "layer skipping 0.1",
    "layer skipping, 0.2": "layer skipping 0.2",
    "a quarter of the image's 16 tokens dropped after layer 2": "token pruning 0.25 after layer 2",
    "half of them after layer 2": "token pruning 0.5 after layer 2",
    "half of them after layer 5": "token pruning 0.5 after layer 5",
    "r_p 0.2, r_LS 0.1 and a quarter of the tokens after layer 5": "all",
}
REAL_SIZES = {
    "load, as stored": "load",
    "`flashu convert`, bfloat16 to bfloat16": "convert",
    "a worker's set-up, without FlashU": "setup",
    "with it: calibrated as the release does, FFNs reordered": "setup_flashu",
    "one evaluation, guided": "evaluate",
}


def result(name):
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))


def rows(page, heading=None):
    """Each row of the tables of a page, or below one of its headings, by its first cell, as the texts of the others."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if heading:
        text = text[text.index(heading) :].removeprefix("## ").partition("\n## ")[0]
    lines = text.replace("**", "").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {first: others for first, *others in cells}


def counts():
    return {(each["preset"], each["flashu"]): each for each in result("2026-11-25-flops")["counts"]}


def runs_of(name):
    return {(run["arm"], run["batch_size"]): run for run in result(name)["runs"]}


def gpu_runs():
    return runs_of("2026-11-27-gpu-nvidia-h200")


def cpu_runs():
    return runs_of("2026-11-28-release-mid-cpu")


def quality():
    files = [result(name)["settings"] for name in ("2026-11-25-inexact", "2026-11-24-quality")]
    return {each["name"]: each for settings in files for each in settings}


@pytest.mark.parametrize("name", SIZES)
def test_counts_are_the_committed_ones(name):
    stock, flashu, few = (counts()[SIZES[name], settings] for settings in (None, "paper-1.5b", "few-steps"))
    table = rows(PERFORMANCE)
    told = [f"{count:.1f}" for count in (stock["tflop_release_without_vae"], stock["tflop_per_image"])]
    assert table[f"Show-o2 {name}, 50 steps"] == [*told, f"{few['tflop_per_image']:.1f}"]
    (row,) = (cells for first, cells in table.items() if first.startswith(f"Show-o2 {name}, FlashU"))
    assert row == [f"{flashu[count]:.1f}" for count in ("tflop_release_without_vae", "tflop_per_image")] + [""]


@pytest.mark.parametrize("name", ARMS | MORE_ARMS)
def test_speeds_on_a_gpu_are_the_committed_ones(name):
    runs, arm = gpu_runs(), (ARMS | MORE_ARMS)[name]
    one, several = runs[arm, 1], runs[arm, 8]
    over = f"{several['speed_up']:.2f}x / {several['speed_up_over_release_flashu']:.2f}x"
    told = [f"{one['images_per_s']:.2f}", f"{several['images_per_s']:.2f}", f"{several['tflop_per_s']:.0f}", over]
    assert rows(PERFORMANCE, "## Measured on a GPU")[name] == told


def forecast(arm):
    """GPU hours of a million images."""
    return f"{1e6 / gpu_runs()[arm, 8]['images_per_s'] / 3600:.0f}"


@pytest.mark.parametrize("name", ARMS)
def test_forecast_follows_from_the_measured_speed(name):
    assert rows(PERFORMANCE, "## Forecast")[name] == [forecast(ARMS[name])]


@pytest.mark.parametrize("name", ARMS)
def test_speeds_on_a_cpu_are_the_committed_ones(name):
    run = cpu_runs()[ARMS[name], 1]
    over = f"{run['speed_up']:.2f}x / {run['speed_up_over_release_flashu']:.2f}x"
    told = [f"{run['images_per_s']:.3f}", f"{run['tflop_per_image']:.2f}", over]
    assert rows(PERFORMANCE, "## Measured on a CPU")[name] == told


@pytest.mark.parametrize(
    "run", result("2026-11-28-paired-mid-cpu")["runs"], ids=lambda run: f"{run['arm']}-{run['batch_size']}"
)
def test_two_checkouts_are_told_as_they_were_timed(run):
    told = [f"{run['seconds'][when]:.2f}" for when in ("before", "after")]
    told += [f"{run['speed_up']:.2f}x", *(f"{run['peak_memory_gib'][when]:.2f}" for when in ("before", "after"))]
    what = {"stock": "two unaccelerated evaluations", "flashu": "seven steps of FlashU, of every kind"}[run["arm"]]
    assert rows(PERFORMANCE, "## Measured on a CPU")[f"{what}, batch {run['batch_size']}"] == told
    sums = run["sum_of_latents"]
    assert sums["before"] == pytest.approx(sums["after"], rel=1e-5)


@pytest.mark.parametrize("name", ["ours", "ours-flashu", "ours-few-steps"])
def test_a_gpu_that_is_never_idle_is_as_fast_as_it_was_busy(name):
    splits = {(each["arm"], each["batch_size"]): each for each in result("2026-11-27-gpu-nvidia-h200")["splits"]}
    measured, busy_s = splits[name, 1]["seconds"], splits[name, 1]["gpu_busy_s"]
    (label,) = (label for label, arm in ARMS.items() if arm == name)
    told = rows(PERFORMANCE, "## Forecast")[f"{label}, one at a time"]
    assert told == [f"{1 / measured:.2f}", f"{1 / busy_s:.2f}"]


@pytest.mark.parametrize("name", ["uncompiled", "compiled", "captured (`model.compile: graphs`)", "waits"])
@pytest.mark.parametrize("suffix", ["", ", before"])
def test_launches_are_the_committed_ones(name, suffix):
    counted = result(f"2026-11-28-launches{suffix.replace(', ', '-')}")["counts"]
    if name == "waits":
        of = lambda each: [*each["compiled"]["waits"].values(), each["waits_after_measuring"]]  # noqa: E731
        told = [sum(sum(places.values()) for places in of(each)) for each in counted]
    elif (way := name.split()[0]) in counted[0]:
        told = [each[way]["together"] for each in counted]
    else:
        pytest.skip("there was no such way")
    table = rows(PERFORMANCE, "## What an image costs, counted")
    assert table[f"{name}{suffix}"] == [f"{number:,}" for number in told]


@pytest.mark.parametrize("name", ARMS)
def test_readme_shows_them_side_by_side(name):
    arm = ARMS[name]
    of_flashu = "flashu" in arm and "paper-1.5b"
    count = counts()["show-o2-1.5b", "few-steps" if arm == "ours-few-steps" else of_flashu or None]
    counted = count["tflop_release_without_vae" if arm.startswith("release") else "tflop_per_image"]
    score = quality()["few-steps" if arm == "ours-few-steps" else "paper" if of_flashu else "stock-50"]["oracle"]["all"]
    told = rows("README.md")[name.replace("`few-steps`", "[`few-steps`](docs/accelerate.md#techniques)")]
    assert told[0] == f"{counted:.1f}"
    assert told[1] == f"{gpu_runs()[arm, 8]['images_per_s']:.2f}"
    assert told[2] == forecast(arm)
    assert told[3] == f"{cpu_runs()[arm, 1]['images_per_s']:.3f}"
    assert told[4] == ("" if arm.startswith("release") else f"{score:.1f}")


def test_readme_says_how_many_fewer_operations_the_same_pictures_take():
    count = counts()["show-o2-1.5b", "paper-1.5b"]
    ratio = count["tflop_release_without_vae"] / count["tflop_per_image"]
    both = f"({count['tflop_per_image']:.0f} TFLOP an image instead of {count['tflop_release_without_vae']:.0f})"
    assert f"with {ratio:.1f} times fewer operations {both}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SETTINGS)
def test_quality_is_the_committed_one(name):
    setting = quality()[SETTINGS[name]]
    change = setting["oracle_change"]
    told = f"{change['points']:+.1f} ± {change['standard_error']:.1f}" if name != next(iter(SETTINGS)) else ""
    gflop = 1000 * setting["tflop_per_image"]
    assert rows(QUALITY)[name] == [
        f"{setting['oracle']['all']:.1f}", told, f"{gflop:.1f}", f"{setting['flop_ratio']:.1f}x"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ANSWERING)
def test_quality_of_answers_is_the_committed_one(name):
    settings = {each["setting"]: each for each in result("2026-11-25-answering-flashu")["settings"]}
    setting, gflop = settings[ANSWERING[name]], settings["off"]["gflop_per_answer"]
    right, took, ratio = rows(QUALITY)[name]
    assert float(right.rstrip("%")) == pytest.approx(setting["right"], abs=0.0501)
    assert took == f"{setting['gflop_per_answer']:.3f}"
    assert ratio == f"{gflop / setting['gflop_per_answer']:.2f}x"


@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_sizes_are_the_committed_ones(name):
    told = []
    for size in ("1.5b", "7b"):
        step = result(f"2026-11-28-real-sizes-{size}")["steps"][REAL_SIZES[name]]
        told += [f"{step['seconds']:.1f} s", f"{step['peak_anonymous_gib']:.2f} GiB"]
    assert rows("docs/checkpoints.md")[name] == told


@pytest.mark.parametrize(
    ("number", "shards"),
    [*enumerate(("1,920 shards of 1 s ± 20%", "960 shards of exactly 1 s, so that all workers call at once"))],
)
def test_the_schedulers_shares_are_the_committed_ones(number, shards):
    measured = result("2026-11-22-scheduler")
    told = [f"{100 * measured[kind][number]['efficiency']:.1f}%" for kind in ("pool", "ray-data")]
    assert rows("docs/cluster.md", "## Limits")[shards] == told
