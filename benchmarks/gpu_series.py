"""Measuring arms at batch sizes within a budget of time: what a measurement is, and when there is no time for one."""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from generate import peak_memory_gib
from gpu_arms import ARMS, ONCE, PROFILED, VAE, Flop, Ours, Release, Timing, timed
from gpu_bench import Bench
from PIL import Image
from time_split import split_time

from flashu.devices import is_device_error, is_out_of_memory
from flashu.errors import InputError

CELL_SHARE = 1 / 40  # of the budget: no repeat at once that would make one measurement take longer
GAIN = 1.02  # a larger batch is better when it makes so many times the images per second
SPEED, SPLIT = "speed", "time by part"  # what is measured
PROFILER_SLOWNESS = 3.0  # by which a profiled run, with what is made of it, is thought to take longer


class Budget:
    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        return self._end - time.monotonic()


@dataclass
class Cell:
    """One arm at one batch size."""

    arm: str
    batch: int
    timings: list[Timing] = field(default_factory=list)
    peak_gib: float = 0.0

    @property
    def seconds(self) -> float:
        return statistics.median(timing.seconds for timing in self.timings)

    @property
    def loop_s(self) -> float:
        return statistics.median(timing.loop_s for timing in self.timings)

    @property
    def images_per_s(self) -> float:
        return self.batch / self.seconds


class Series:
    def __init__(self, bench: Bench, arms: Sequence[str], budget: Budget, repeats: int, on_change: Callable[[], None]):
        """`on_change` is called when there is a new measurement."""
        self.bench, self.budget, self.repeats, self.on_change = bench, budget, repeats, on_change
        self.ways: dict[str, Ours | Release] = {arm: ARMS[arm].on(bench) for arm in arms}
        self.flop: dict[str, Flop] = {}
        self.cells: dict[tuple[str, int], Cell] = {}
        self.splits: dict[tuple[str, int], dict[str, Any]] = {}
        self.pictures: dict[str, Image.Image] = {}  # the first prompt's, alone in its batch or among the fewest
        self.left_out: dict[tuple[str, int, str], str] = {}  # by arm, batch size and what was to be measured
        self._ended: dict[str, int] = {}  # the batch size that an arm could not do

    def measure(self, arm: str, batch: int, *, again: bool = False) -> Cell | None:
        """An arm's cell, measured if it has not been; None where it cannot be. `again` adds repeats to it."""
        if (arm, batch) in self.cells and not again:
            return self.cells[arm, batch]
        way = self.ways[arm]
        if batch >= self._ended.get(arm, batch + 1):
            self._leave_out(arm, batch, SPEED, f"batch {self._ended[arm]} did not work")
            return None
        expected_s = self.expected_s(arm, batch) * (1 + way.warm_up_share)
        if not self._is_time_for(arm, batch, SPEED, expected_s):
            return None
        cell = self.cells.get((arm, batch), Cell(arm, batch))
        if not self._attempt(arm, batch, SPEED, lambda: self._fill(cell)):
            self._ended[arm] = batch
            return None
        self.cells[arm, batch] = cell
        print(
            f"{self.budget.left_s():5.0f} s left   {arm} at batch {batch}: {cell.seconds / batch:.3f} s an image",
            file=sys.stderr,
            flush=True,
        )
        self.on_change()
        return cell

    def best_batch(self, arm: str, batches: Sequence[int]) -> int | None:
        """The batch size at which an arm makes most images per second, tried upwards until more brings no more."""
        best: Cell | None = None
        for batch in batches:
            cell = self.measure(arm, batch)
            if cell is None:
                break
            if best and cell.images_per_s < GAIN * best.images_per_s:
                break
            best = cell
        return best.batch if best else None

    def split(self, arm: str, batch: int) -> None:
        """Where an arm's time goes at a batch size that has been measured."""
        cell, way = self.cells.get((arm, batch)), self.ways[arm]
        if cell is None or (arm, batch) in self.splits:
            return
        evaluations = None if way.settings else min(PROFILED, way.evaluations)
        scale = way.evaluations / (evaluations or way.evaluations)
        if self._is_time_for(arm, batch, SPLIT, PROFILER_SLOWNESS * cell.seconds / scale):
            self._attempt(arm, batch, SPLIT, lambda: self._split(cell, evaluations, scale))
            self.on_change()

    def repeat(self) -> None:
        """Spend what is left of the budget on more repeats, of the quickest measurements first."""
        for cell in sorted(self.cells.values(), key=lambda cell: cell.seconds):
            expected_s = cell.seconds * (1 + self.ways[cell.arm].warm_up_share)
            if len(cell.timings) < self.repeats and expected_s < self.budget.left_s():
                self.measure(cell.arm, cell.batch, again=True)

    def expected_s(self, arm: str, batch: int) -> float:
        """How long a batch will take, by those of the arm that were measured; 0 before any was."""
        known = [cell for cell in self.cells.values() if cell.arm == arm]
        return batch / max(known, key=lambda cell: cell.batch).images_per_s if known else 0.0

    def flop_of(self, arm: str) -> Flop:
        if arm not in self.flop:
            self.flop[arm] = self.ways[arm].count_flop()
        return self.flop[arm]

    def _fill(self, cell: Cell) -> None:
        device, start = self.bench.device, time.monotonic()
        with self.ways[cell.arm] as way:
            way.warm_up(cell.batch)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            while True:
                timing, pictures = timed(way, cell.batch)
                cell.timings.append(timing)
                self.pictures.setdefault(cell.arm, pictures[0])
                spent_s = time.monotonic() - start + timing.seconds
                enough = len(cell.timings) >= self.repeats or spent_s > CELL_SHARE * self.budget.seconds
                if enough or timing.seconds > self.budget.left_s():
                    break
            cell.peak_gib = max(cell.peak_gib, peak_memory_gib(device))

    def _split(self, cell: Cell, evaluations: int | None, scale: float) -> None:
        with self.ways[cell.arm] as way:
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

    def _is_time_for(self, arm: str, batch: int, what: str, expected_s: float) -> bool:
        left_s = self.budget.left_s()
        if expected_s > left_s or left_s <= 0:
            self._leave_out(arm, batch, what, f"no time: about {expected_s:.0f} s of {max(left_s, 0):.0f} s left")
            return False
        self.left_out.pop((arm, batch, what), None)
        return True

    def _leave_out(self, arm: str, batch: int, what: str, why: str) -> None:
        self.left_out[arm, batch, what] = why

    def _attempt(self, arm: str, batch: int, what: str, work: Callable[[], None]) -> bool:
        """Do some work; note it if that fails, for want of memory or in any other way that a GPU survives."""
        why = None
        try:
            work()
        except Exception as error:
            if is_device_error(error):
                raise
            why = "out of memory"
            if isinstance(error, InputError):
                why = str(error)
            elif not is_out_of_memory(error):
                traceback.print_exc()
                why = f"{type(error).__name__}: {error}".partition("\n")[0]
        if why:  # outside the handler, whose traceback would hold on to the batch's tensors
            gc.collect()
            if self.bench.device.type == "cuda":
                torch.cuda.empty_cache()
            self._leave_out(arm, batch, what, why)
        return why is None
