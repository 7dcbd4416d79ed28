"""What `gpu.py` measured, as entries of its JSON and as text to read."""

from __future__ import annotations

from typing import Any

from gpu_arms import BASELINE, ONCE, SAME_PICTURES, VAE
from gpu_series import Cell, Series
from PIL import Image, ImageChops, ImageStat
from time_split import OTHER

PARTS = ("image path", "LLM", "head", ONCE, VAE, OTHER)


def entries(series: Series, ceilings: dict[str, float] | None) -> dict[str, Any]:
    """Runs, splits, each arm's best run, and what was left out."""
    arms = list(series.ways)
    cells = sorted(series.cells.values(), key=lambda cell: (cell.batch, arms.index(cell.arm)))
    runs = [_run(series, cell, ceilings) for cell in cells]
    best = {arm: max((run for run in runs if run["arm"] == arm), key=_speed, default=None) for arm in arms}
    against = best.get(BASELINE)
    return {
        "runs": runs,
        "best": {
            arm: {
                "batch_size": run["batch_size"],
                "images_per_s": run["images_per_s"],
                "speed_up": run["images_per_s"] / against["images_per_s"] if against else None,
            }
            for arm, run in best.items()
            if run
        },
        "splits": list(series.splits.values()),
        "picture_difference": {
            arm: mean_difference(series.pictures[arm], series.pictures[other])
            for arm, other in SAME_PICTURES.items()
            if arm in series.pictures and other in series.pictures
        },
        "left_out": [
            {"arm": arm, "batch_size": batch, "what": what, "why": why}
            for (arm, batch, what), why in series.left_out.items()
        ],
    }


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    """Between two pictures, in levels of 255."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def text(result: dict[str, Any]) -> str:
    """The whole result, to be read."""
    height, width = result["size"]
    where = result.get("gpu") or result.get("cpu")
    lines = [f"{result['preset']} at {height}x{width}, {result['dtype']}, {where}, FlashU {result['flashu']}", ""]
    if ceilings := result["ceilings"]:
        lines += [
            f"matrix product of {ceilings['matrix_side']}: {ceilings['matrix_tflop_per_s']:.4g} TFLOP/s;   "
            f"copy: {ceilings['copy_gb_per_s']:.0f} GB/s, read and written",
            "",
        ]
    lines += [
        f"{'arm':<20}{'batch':>6}{'s/image':>10}{'images/s':>10}{'speed-up':>10}{'TFLOP':>10}"
        f"{'TFLOP/s':>10}{'share':>7}{'in steps':>10}{'share':>7}{'GiB':>7}{'runs':>6}"
    ]
    lines += [_run_line(run) for run in result["runs"]]
    lines += ["", "speed-up: over `release` at the same batch size. TFLOP: of an image. share: of the matrix product."]
    for arm, best in result["best"].items():
        against = f", {best['speed_up']:.2f}x the release's best" if best["speed_up"] else ""
        lines.append(f"best of {arm}: {best['images_per_s']:.3f} images/s at batch {best['batch_size']}{against}")
    for arm, levels in result["picture_difference"].items():
        lines.append(f"the first picture of {arm} differs from {SAME_PICTURES[arm]}'s by {levels:.3f} of 255 levels")
    if result["splits"]:
        lines += ["", "ms of an image", f"{'arm':<20}{'batch':>6}{'all':>9}"]
        lines[-1] += "".join(f"{part:>16}" for part in PARTS) + f"{'GPU idle':>16}"
        lines += [_split_line(split) for split in result["splits"]]
    lines += ["", "cold start: " + ", ".join(f"{name} {_number(value)}" for name, value in result["cold"].items())]
    lines += [
        f"left out: {entry['what']} of {entry['arm']} at batch {entry['batch_size']}: {entry['why']}"
        for entry in result["left_out"]
    ]
    return "\n".join(lines)


def _run(series: Series, cell: Cell, ceilings: dict[str, float] | None) -> dict[str, Any]:
    flop, baseline = series.flop_of(cell.arm), series.cells.get((BASELINE, cell.batch))
    rate, loop_rate = (
        cell.batch * count / seconds / 1e12
        for count, seconds in ((flop.loop + flop.vae, cell.seconds), (flop.loop, cell.loop_s))
    )
    ceiling = ceilings and ceilings["matrix_tflop_per_s"]
    return {
        "arm": cell.arm,
        "batch_size": cell.batch,
        "seconds_per_image": cell.seconds / cell.batch,
        "loop_seconds_per_image": cell.loop_s / cell.batch,
        "images_per_s": cell.images_per_s,
        "speed_up": baseline and baseline.seconds / cell.seconds,
        "tflop_per_image": (flop.loop + flop.vae) / 1e12,
        "vae_tflop_per_image": flop.vae / 1e12,
        "tflop_per_s": rate,
        "share_of_ceiling": ceiling and rate / ceiling,
        "loop_tflop_per_s": loop_rate,
        "loop_share_of_ceiling": ceiling and loop_rate / ceiling,
        "peak_memory_gib": cell.peak_gib,
        "seconds_of_runs": [timing.seconds for timing in cell.timings],
    }


def _speed(run: dict[str, Any]) -> float:
    return run["images_per_s"]


def _run_line(run: dict[str, Any]) -> str:
    speed_up = f"{run['speed_up']:.2f}x" if run["speed_up"] else "-"
    shares = [f"{run[key]:.1%}" if run[key] else "-" for key in ("share_of_ceiling", "loop_share_of_ceiling")]
    return (
        f"{run['arm']:<20}{run['batch_size']:>6}{run['seconds_per_image']:>10.3f}{run['images_per_s']:>10.3f}"
        f"{speed_up:>10}{run['tflop_per_image']:>10.4g}{run['tflop_per_s']:>10.4g}{shares[0]:>7}"
        f"{run['loop_tflop_per_s']:>10.4g}{shares[1]:>7}{run['peak_memory_gib']:>7.1f}{len(run['seconds_of_runs']):>6}"
    )


def _split_line(split: dict[str, Any]) -> str:
    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds / split['batch_size']:.1f}"

    parts = "".join(f"{ms(split['parts_s'].get(part)):>16}" for part in PARTS)
    return f"{split['arm']:<20}{split['batch_size']:>6}{ms(split['seconds']):>9}{parts}{ms(split['gpu_idle_s']):>16}"


def _number(value: float | str) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
