"""How a worker starts: its model calibrated, patched and compiled, and loaded from its files. Each part may fail."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from generate import random_scores
from gpu_arms import ARMS, LEADER
from gpu_series import Series
from graphs import graphs_compiled

from flashu.calibration import calibrate
from flashu.pipeline import TextToImagePipeline

CALIBRATION_PROMPTS = 2
LOAD_S_PER_GIB = 8.0  # to write and load, roughly


@contextmanager
def empty_compile_caches() -> Iterator[None]:
    """What is compiled meanwhile is compiled anew, and its files are gone afterwards. Nothing may be compiled yet."""
    variables = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
    before = {name: os.environ.get(name) for name in variables}
    # The compiler's processes may still write when the folder is removed.
    with tempfile.TemporaryDirectory(prefix="flashu-cold-", ignore_cleanup_errors=True) as folder:
        os.environ.update({name: str(Path(folder) / name.lower()) for name in variables})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def prepare(series: Series, cold: dict[str, Any]) -> None:
    """Calibrate, which arms with FlashU need. Where that fails they prune at random, which takes as long."""
    bench = series.bench

    def work() -> None:
        bench.scores, cold["calibrate_s"] = series.clock(
            lambda: calibrate(
                bench.model, bench.prompts(CALIBRATION_PROMPTS), tokenizer=bench.tokenizer, size=bench.size
            )
        )
        cold["calibration_prompts"] = CALIBRATION_PROMPTS

    if series.attempts.attempt("calibration, so importances are random", work):
        bench.scores = random_scores(bench.model)


def first_images(series: Series, cold: dict[str, Any]) -> None:
    """Go on from there to a worker's first image, and to a second one, for which nothing is compiled any more."""

    def work() -> None:
        before = graphs_compiled()
        with ExitStack() as stack:
            way = ARMS[LEADER].on(series.bench)
            _, cold["patch_and_start_compiler_s"] = series.clock(lambda: stack.enter_context(way))
            _, cold["first_image_s"] = series.clock(lambda: way.generate(1))
            _, cold["second_image_s"] = series.clock(lambda: way.generate(1))
            cold["compiled"], cold["graphs"] = way.compiled, graphs_compiled() - before
        series.forecast.note_first(LEADER, False, cold["first_image_s"], cold["second_image_s"])

    series.attempts.attempt("first image", work, LEADER, 1)


def load(series: Series, cold: dict[str, Any]) -> None:
    """Write the checkpoint to a temporary folder and load it as a user does."""
    bench, attempts, what = series.bench, series.attempts, "loading"
    size = sum(parameter.numel() * parameter.element_size() for parameter in bench.model.parameters())
    gib = size / 2**30
    if not attempts.is_time_for(what, LOAD_S_PER_GIB * gib):
        return
    if 2 * size > shutil.disk_usage(tempfile.gettempdir()).free:
        attempts.leave_out(what, f"no room for {gib:.1f} GiB in {tempfile.gettempdir()}")
        return

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            TextToImagePipeline(bench.model, bench.vae, bench.tokenizer).save_pretrained(checkpoint)
            _, cold["load_s"] = series.clock(
                lambda: TextToImagePipeline.from_pretrained(checkpoint, device=bench.device, dtype=bench.dtype)
            )
        cold["load_gib"] = gib

    attempts.attempt(what, work)
