"""What `gpu.py` measured, as entries of its JSON and as text to read."""

from __future__ import annotations

from typing import Any

from gpu_arms import ARMS, BASELINES, LEADER, ONCE, SAME_PICTURES, VAE
from gpu_cells import Best, Cell
from gpu_series import COMPILING, Series
from PIL import Image, ImageChops, ImageStat
from time_split import OTHER

PARTS = ("image path", "LLM", "head", ONCE, VAE, OTHER)
SPEED_UPS = {"speed_up": BASELINES[0], "speed_up_over_release_flashu": BASELINES[1]}  # over which arm


def entries(series: Series, ceilings: dict[str, float]) -> dict[str, Any]:
    """Runs, splits, each arm's best run, and what was left out."""
    arms = list(series.ways)
    cells = sorted(series.cells.values(), key=lambda cell: (cell.batch, arms.index(cell.arm)))
    best = {arm: found for arm in arms if (found := series.best(arm))}
    return {
        **compiling(series),
        "runs": [_run(series, cell, ceilings) for cell in cells],
        "best": {arm: _best(found, best) for arm, found in best.items()},
        "splits": [series.splits[key] for key in sorted(series.splits, key=lambda key: (key[1], arms.index(key[0])))],
        "back_to_back": series.back_to_back,
        "picture_difference": {
            arm: mean_difference(series.pictures[arm], series.pictures[other])
            for arm, other in SAME_PICTURES.items()
            if arm in series.pictures and other in series.pictures
        },
        "left_out": [
            {"arm": arm, "batch_size": batch, "what": what, "why": why}
            for (what, arm, batch), why in series.attempts.left_out.items()
        ],
    }


def compiling(series: Series) -> dict[str, Any]:
    """Whether blocks ran compiled where they were to, and if not, why. None where nothing is known of it."""
    asked = [cell for cell in series.cells.values() if ARMS[cell.arm].options.get("compile_mode", "off") != "off"]
    compiled = all(cell.compiled for cell in asked)
    reasons = [series.ways[cell.arm].why_uncompiled for cell in asked if not cell.compiled]
    reasons += [why for (what, _, _), why in series.attempts.left_out.items() if what == COMPILING]
    if not compiled and series.bench.device.type != "cuda":
        reasons.append("compile=auto compiles on CUDA only")
    return {
        "blocks_compiled": compiled if asked else None,
        "why_uncompiled": next(filter(None, reasons), None),
    }


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    """Between two pictures, in levels of 255."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def text(result: dict[str, Any]) -> str:
    """The whole result, to be read."""
    height, width = result["size"]
    where = result.get("gpu") or result.get("cpu")
    lines = [f"{result['preset']} at {height}x{width}, {result['dtype']}, {where}, FlashU {result['flashu']}"]
    if result["blocks_compiled"] is not None:
        lines.append(f"blocks ran {'' if result['blocks_compiled'] else 'un'}compiled{_because(result)}")
    lines.append("")
    if ceilings := result["ceilings"]:
        lines += [*_ceiling_lines(ceilings, result["dtype"]), ""]
    lines += [
        f"{'arm':<23}{'batch':>6}{'s/image':>10}{'images/s':>10}{'speed-up':>10}{'(flashu)':>10}{'TFLOP':>10}"
        f"{'TFLOP/s':>10}{'share':>7}{'in steps':>10}{'share':>7}{'GiB':>7}{'runs':>6}{'slowest':>9}{'graphs':>8}"
    ]
    lines += [_run_line(run) for run in result["runs"]]
    lines += [
        "",
        f"speed-up: over {BASELINES[0]}, and over {BASELINES[1]}, at the same batch size. TFLOP: of an image.",
        "s/image: the median run's; slowest: the slowest one's. in steps: without VAE and copying.",
        "GiB: the most allocated at once. graphs: compiled before the first run, - where blocks ran uncompiled.",
        f"share: of the matrix product in {result['dtype']}, also where FFNs are in float8.",
        "",
    ]
    lines += [_smallest_line(run) for run in result["runs"] if run["arm"] == LEADER][:1]
    lines += [_best_line(arm, best, result["best"]) for arm, best in result["best"].items()]
    if pair := result["back_to_back"]:
        lines.append(
            f"batches back to back: {pair['images_per_s']:.3f} images/s of {pair['arm']} at batch "
            f"{pair['batch_size']}; one at a time {pair['one_at_a_time_images_per_s']:.3f}"
        )
    for arm, levels in result["picture_difference"].items():
        lines.append(f"the first picture of {arm} differs from {SAME_PICTURES[arm]}'s by {levels:.3f} of 255 levels")
    if result["splits"]:
        lines += ["", "ms of an image", f"{'arm':<23}{'batch':>6}{'all':>9}"]
        lines[-1] += "".join(f"{part:>16}" for part in PARTS) + f"{'GPU idle':>16}"
        lines += [_split_line(split) for split in result["splits"]]
    lines += ["", "cold start: " + ", ".join(f"{name} {_number(value)}" for name, value in result["cold"].items())]
    for run in result["runs"]:
        if run["calls_captured"]:
            lines.append(
                f"{run['arm']} at batch {run['batch_size']}: {run['calls_captured']} calls are CUDA graphs, "
                f"{run['captured_gib']:.2f} GiB"
            )
        if run["graphs_compiled_while_timed"]:
            lines.append(f"too slow, as it compiled while it was timed: {run['arm']} at batch {run['batch_size']}")
    for entry in result["left_out"]:
        of = f" of {entry['arm']}" if entry["arm"] else ""
        at = f" at batch {entry['batch_size']}" if entry["batch_size"] else ""
        lines.append(f"left out: {entry['what']}{of}{at}: {entry['why']}")
    return "\n".join(lines)


def _run(series: Series, cell: Cell, ceilings: dict[str, float]) -> dict[str, Any]:
    rates: dict[str, float | None] = dict.fromkeys(("tflop_per_image", "vae_tflop_per_image", "tflop_per_s"))
    loop_rate = None
    if flop := series.flop.get(cell.arm):
        whole = (flop.loop + flop.vae) / 1e12
        rates = {
            "tflop_per_image": whole,
            "vae_tflop_per_image": flop.vae / 1e12,
            "tflop_per_s": cell.batch * whole / cell.seconds,
        }
        loop_rate = cell.batch * flop.loop / 1e12 / cell.loop_s
    ceiling = ceilings.get("matrix_tflop_per_s")
    others = {key: series.cells.get((arm, cell.batch)) for key, arm in SPEED_UPS.items()}
    return {
        "arm": cell.arm,
        "batch_size": cell.batch,
        "compiled": cell.compiled,
        "seconds_per_image": cell.seconds / cell.batch,
        "loop_seconds_per_image": cell.loop_s / cell.batch,
        "images_per_s": cell.images_per_s,
        **{key: other and other.seconds / cell.seconds for key, other in others.items()},
        **rates,
        "share_of_ceiling": ceiling and rates["tflop_per_s"] and rates["tflop_per_s"] / ceiling,
        "loop_tflop_per_s": loop_rate,
        "loop_share_of_ceiling": ceiling and loop_rate and loop_rate / ceiling,
        "peak_memory_gib": cell.peak_gib,
        "seconds_of_runs": [timing.seconds for timing in cell.timings],
        "graphs_compiled": cell.graphs,
        "graphs_compiled_while_timed": cell.graphs_while_timed,
        "calls_captured": cell.captured,
        "captured_gib": cell.captured_gib,
    }


def _best(best: Best, others: dict[str, Best]) -> dict[str, Any]:
    """Speed-ups are over the others' best, and only of what is known to be best."""

    def speed_up(over: str) -> float | None:
        other = others.get(over)
        if not (best.is_known and other and other.is_known):
            return None
        return best.cell.images_per_s / other.cell.images_per_s

    return {
        "batch_size": best.cell.batch,
        "images_per_s": best.cell.images_per_s,
        "is_known": best.is_known,
        "found_by": best.found_by,
        **{key: speed_up(over) for key, over in SPEED_UPS.items()},
    }


def _ceiling_lines(ceilings: dict[str, float], dtype: str) -> list[str]:
    lines = []
    if "matrix_side" in ceilings:
        lines.append(
            f"matrix product of {ceilings['matrix_side']} in {dtype}: {ceilings['matrix_tflop_per_s']:.4g} TFLOP/s;   "
            f"copy: {ceilings['copy_gb_per_s']:.0f} GB/s, read and written"
        )
        lines.append(f"the same product for seconds on end: {ceilings['sustained_matrix_tflop_per_s']:.4g} TFLOP/s")
    if float8 := ceilings.get("float8_matrix_tflop_per_s"):
        lines.append(f"the same product in float8, with scales of rows and columns: {float8:.4g} TFLOP/s")
    return lines


def _because(result: dict[str, Any]) -> str:
    return f": {result['why_uncompiled']}" if result["why_uncompiled"] else ""


def _best_line(arm: str, best: dict[str, Any], others: dict[str, Any]) -> str:
    how = f"({best['found_by']})" if best["is_known"] else "so far; other batch sizes were not tried"
    line = f"best of {arm}: {best['images_per_s']:.3f} images/s at batch {best['batch_size']} {how}"
    for key, over in SPEED_UPS.items():
        if best[key] and over != arm:
            line += f", {best[key]:.2f}x {over}'s best (batch {others[over]['batch_size']})"
    return line


def _smallest_line(run: dict[str, Any]) -> str:
    over = "".join(f", {run[key]:.2f}x {arm}" for key, arm in SPEED_UPS.items() if run[key])
    return f"at batch {run['batch_size']}, {run['arm']}: {run['images_per_s']:.3f} images/s{over}"


def _run_line(run: dict[str, Any]) -> str:
    speed_ups = [f"{run[key]:.2f}x" if run[key] else "-" for key in SPEED_UPS]
    shares = [f"{run[key]:.1%}" if run[key] else "-" for key in ("share_of_ceiling", "loop_share_of_ceiling")]
    flop, rate, loop_rate = (
        f"{run[key]:.4g}" if run[key] else "-" for key in ("tflop_per_image", "tflop_per_s", "loop_tflop_per_s")
    )
    return (
        f"{run['arm']:<23}{run['batch_size']:>6}{run['seconds_per_image']:>10.3f}{run['images_per_s']:>10.3f}"
        f"{speed_ups[0]:>10}{speed_ups[1]:>10}{flop:>10}{rate:>10}{shares[0]:>7}{loop_rate:>10}{shares[1]:>7}"
        f"{run['peak_memory_gib']:>7.1f}{len(run['seconds_of_runs']):>6}"
        f"{max(run['seconds_of_runs']) / run['batch_size']:>9.3f}"
        f"{run['graphs_compiled'] if run['compiled'] else '-':>8}"
    )


def _split_line(split: dict[str, Any]) -> str:
    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds / split['batch_size']:.1f}"

    parts = "".join(f"{ms(split['parts_s'].get(part)):>16}" for part in PARTS)
    return f"{split['arm']:<23}{split['batch_size']:>6}{ms(split['seconds']):>9}{parts}{ms(split['gpu_idle_s']):>16}"


def _number(value: float | str) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
