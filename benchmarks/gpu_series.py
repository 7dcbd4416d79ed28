"""Measuring arms at batch sizes, as far as time and memory go."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from generate import Stopwatch, peak_memory_gib
from gpu_arms import ARMS, ONCE, PROFILED, VAE, Flop, Ours, Release, timed
from gpu_attempts import Attempts
from gpu_bench import Bench
from gpu_cells import Best, Cell, Cells, Forecast
from graphs import graphs_compiled
from PIL import Image
from time_split import split_time

CELL_SHARE = 1 / 40  # of the budget: no repeat at once that would make one measurement take longer
GAIN = 1.02  # a larger batch is better when it makes so many times the images per second
# What is attempted.
SPEED, SPLIT, STREAM, COMPILING, COUNT = "speed", "time by part", "batches back to back", "compiling", "operations"
PROFILER_SLOWNESS = 3.0  # by which a profiled run, with what is made of it, is thought to take longer
PROFILER_S = 5.0  # to begin and end it
STREAMED = 4  # batches that are submitted back to back


class Series:
    def __init__(self, bench: Bench, arms: Sequence[str], batches: Sequence[int], attempts: Attempts, repeats: int):
        self.bench, self.attempts, self.repeats = bench, attempts, repeats
        self.batches = sorted(batches)
        self.clock = Stopwatch(bench.device)
        self.ways: dict[str, Ours | Release] = {arm: ARMS[arm].on(bench) for arm in arms}
        self.cells: Cells = {}
        self.forecast = Forecast(self.cells)
        self.splits: dict[tuple[str, int], dict[str, Any]] = {}
        self.back_to_back: dict[str, Any] | None = None
        self.pictures: dict[str, Image.Image] = {}  # the first prompt's, alone in its batch or among the fewest
        self.flop: dict[str, Flop] = {}
        self._found_by: dict[str, str] = {}  # how the search for an arm's best batch size ended
        self._ended: dict[str, tuple[int, bool]] = {}  # the batch size that an arm could not do, and whether by memory

    def measure(self, arm: str, batch: int, *, again: bool = False) -> Cell | None:
        """An arm's cell, measured if it has not been; None where it cannot be. `again` adds repeats to it."""
        known = self.cells.get((arm, batch))
        if known and not again:
            return known
        if self._is_past_end(arm, batch):
            self.attempts.leave_out(SPEED, f"batch {self._ended[arm][0]} did not work", arm, batch)
            return None
        way = self.ways[arm]
        cell = known or Cell(arm, batch, way.compile_mode)
        expected_s = self.forecast.seconds(cell, way.warm_up_share, way.batches(batch))
        if not self.attempts.is_time_for(SPEED, expected_s, arm, batch):
            return None
        failure = self.attempts.attempt(SPEED, lambda: self._fill(cell), arm, batch)
        if failure and not (failure.foreseen or failure.out_of_memory or cell.timings) and cell.compile_mode == "auto":
            cell.compile_mode = "off"  # as the library does where blocks turn out not to compile
            uncompiled_failure = self.attempts.attempt(SPEED, lambda: self._fill(cell), arm, batch)
            if uncompiled_failure is None:
                way.compile_mode = "off"  # for what is not measured yet
                self.attempts.leave_out(COMPILING, failure.why, arm, batch)
            failure = uncompiled_failure
        if not cell.timings:
            self._ended[arm] = batch, failure.out_of_memory
            return None
        if arm not in self.flop:
            self.attempts.attempt(COUNT, lambda: self._count_flop(arm), arm)
        print(
            f"{self.attempts.budget.left_s():5.0f} s left   {arm} at batch {batch}: "
            f"{cell.seconds / batch:.3f} s an image",
            file=sys.stderr,
            flush=True,
        )
        return cell

    def find_best(self, arm: str) -> Best | None:
        """Try batch sizes upwards until more images bring no more a second, or memory or time ends."""
        best: Cell | None = None
        for batch in self.batches:
            cell = self.measure(arm, batch)
            if cell is None:
                if self._is_past_end(arm, batch) and self._ended[arm][1]:
                    self._found_by.setdefault(arm, f"out of memory at batch {self._ended[arm][0]}")
                break
            if best and cell.images_per_s < GAIN * best.images_per_s:
                self._found_by.setdefault(arm, f"batch {batch} gains less than {GAIN - 1:.0%}")
                break
            best = cell
        else:
            self._found_by.setdefault(arm, "no larger one was asked for")
        return self.best(arm)

    def best(self, arm: str) -> Best | None:
        """The best of what was measured so far."""
        cells = [cell for cell in self.cells.values() if cell.arm == arm]
        return Best(max(cells, key=lambda cell: cell.images_per_s), self._found_by.get(arm)) if cells else None

    def split(self, arm: str, batch: int) -> None:
        """Where an arm's time goes at a batch size that has been measured."""
        cell, way = self.cells.get((arm, batch)), self.ways[arm]
        if cell is None or (arm, batch) in self.splits:
            return
        evaluations = None if way.settings else min(PROFILED, way.evaluations)
        scale = way.evaluations / (evaluations or way.evaluations)
        if self.attempts.is_time_for(SPLIT, PROFILER_S + PROFILER_SLOWNESS * cell.seconds / scale, arm, batch):
            self.attempts.attempt(SPLIT, lambda: self._split(cell, evaluations, scale), arm, batch)

    def stream(self, arm: str) -> None:
        """An arm's best batch several times, each submitted before the one before it is waited for."""
        best = self.best(arm)
        if best is None or not isinstance(self.ways[arm], Ours):
            return
        expected_s = (STREAMED + self.ways[arm].warm_up_share) * best.cell.seconds
        if self.attempts.is_time_for(STREAM, expected_s, arm, best.cell.batch):
            self.attempts.attempt(STREAM, lambda: self._stream(best.cell), arm, best.cell.batch)

    def repeat(self, arms: Sequence[str] | None = None) -> None:
        """Spend what is left of the budget on more repeats, of the quickest measurements first.

        Of all, or for some arms of those that are compared: at the smallest batch size and at the best.
        """
        cells = [cell for cell in self.cells.values() if not ARMS[cell.arm].aside]
        if arms is not None:
            best = {arm: found.cell.batch for arm in arms if (found := self.best(arm))}
            cells = [cell for cell in cells if cell.arm in best and cell.batch in (self.batches[0], best[cell.arm])]
        for cell in sorted(cells, key=lambda cell: cell.seconds):
            expected_s = self.forecast.seconds(cell, self.ways[cell.arm].warm_up_share)
            if len(cell.timings) < self.repeats and expected_s < self.attempts.budget.left_s():
                self.measure(cell.arm, cell.batch, again=True)

    def _is_past_end(self, arm: str, batch: int) -> bool:
        return arm in self._ended and batch >= self._ended[arm][0]

    def _count_flop(self, arm: str) -> None:
        """The same for arms that differ in how they run only."""
        way = self.ways[arm]
        alike = [
            self.flop[name]
            for name, other in self.ways.items()
            if name in self.flop and (type(other), other.settings) == (type(way), way.settings)
        ]
        self.flop[arm] = alike[0] if alike else way.count_flop()

    @contextmanager
    def _entered(self, cell: Cell) -> Iterator[Ours | Release]:
        """The cell's way, ready to make images as the cell does."""
        way = self.ways[cell.arm]
        own, way.compile_mode = way.compile_mode, cell.compile_mode
        try:
            with way:
                yield way
        finally:
            way.compile_mode = own
        if self.bench.device.type == "cuda":
            torch.cuda.empty_cache()  # no arm is to find its memory in pieces that another left

    def _fill(self, cell: Cell) -> None:
        device, budget = self.bench.device, self.attempts.budget
        before = graphs_compiled()
        with self._entered(cell) as way:
            _, warm_up_s = self.clock(lambda: way.warm_up(cell.batch))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            cell.graphs += graphs_compiled() - before
            graphs, start, batches = graphs_compiled(), time.monotonic(), way.batches(cell.batch)
            while True:
                timing, pictures = timed(way, cell.batch)
                cell.timings.append(timing)
                cell.compiled, cell.peak_gib = way.compiled, max(cell.peak_gib, peak_memory_gib(device))
                self.cells[cell.arm, cell.batch] = cell
                self.pictures.setdefault(cell.arm, pictures[0])
                spent_s = time.monotonic() - start + timing.seconds
                enough = len(cell.timings) >= self.repeats or spent_s > CELL_SHARE * budget.seconds
                if (enough and len(cell.timings) >= batches) or timing.seconds > budget.left_s():
                    break
            cell.graphs_while_timed += graphs_compiled() - graphs
            if way.graphs:
                cell.captured, cell.captured_gib = way.graphs.count, way.graphs.bytes / 2**30
            self.forecast.note_first(cell.arm, cell.several, warm_up_s, way.warm_up_share * cell.seconds)

    def _split(self, cell: Cell, evaluations: int | None, scale: float) -> None:
        with self._entered(cell) as way:
            split = split_time(lambda: way.generate(cell.batch, evaluations), way.calls(), self.bench.device)
        # Where only some of a run's like steps were run, what each of them takes is scaled up to all.
        scales = {part: 1.0 if part in (ONCE, VAE) else scale for part in split.parts}
        parts = {part: seconds * scales[part] for part, seconds in split.parts.items()}
        overlap_s = sum(split.parts.values()) - (split.busy_s or 0.0)
        busy_s = None if split.busy_s is None else sum(parts.values()) - overlap_s
        self.splits[cell.arm, cell.batch] = {
            "arm": cell.arm,
            "batch_size": cell.batch,
            "seconds": cell.seconds,  # without the profiler
            "parts_s": parts,
            "gpu_busy_s": busy_s,
            "gpu_idle_s": None if busy_s is None else max(0.0, cell.seconds - busy_s),
            "profiled_evaluations": evaluations or way.evaluations,
            "profiled_s": split.profiled_s,
            "profiled_kernels": split.kernels,
        }

    def _stream(self, cell: Cell) -> None:
        device = self.bench.device
        with self._entered(cell) as way:
            way.warm_up(cell.batch)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)

            def make() -> None:
                before = way.submit(cell.batch)
                for _ in range(STREAMED - 1):
                    under_way = way.submit(cell.batch)
                    before.pictures()
                    before = under_way
                before.pictures()

            _, seconds = self.clock(make)
            self.back_to_back = {
                "arm": cell.arm,
                "batch_size": cell.batch,
                "batches": STREAMED,
                "images_per_s": STREAMED * cell.batch / seconds,
                "one_at_a_time_images_per_s": cell.images_per_s,
                "peak_memory_gib": peak_memory_gib(device),
            }
