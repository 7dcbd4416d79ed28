"""What is known of arms at batch sizes, and how long it will take to know more."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from gpu_arms import ARMS, LEADER, Timing


@dataclass
class Cell:
    """One arm at one batch size."""

    arm: str
    batch: int
    compile_mode: str = "off"  # in which it was asked for
    timings: list[Timing] = field(default_factory=list)
    peak_gib: float = 0.0
    compiled: bool = False  # whether blocks really were
    graphs: int = 0  # that were compiled to warm up
    graphs_while_timed: int = 0  # that were compiled when all should have been
    captured: int = 0  # calls, as CUDA graphs
    captured_gib: float = 0.0  # that these take

    @property
    def several(self) -> bool:
        """Batches of one image and of several are compiled apart."""
        return self.batch > 1

    @property
    def seconds(self) -> float:
        return statistics.median(timing.seconds for timing in self.timings)

    @property
    def loop_s(self) -> float:
        return statistics.median(timing.loop_s for timing in self.timings)

    @property
    def images_per_s(self) -> float:
        return self.batch / self.seconds


@dataclass(frozen=True)
class Best:
    """An arm's quickest cell."""

    cell: Cell
    found_by: str | None  # what shows that no other batch size is quicker; None where others were not tried

    @property
    def is_known(self) -> bool:
        return self.found_by is not None


Cells = dict[tuple[str, int], Cell]


class Forecast:
    """How long measurements will take, by those that were made."""

    def __init__(self, cells: Cells):
        self.cells = cells
        self.compile_s: dict[tuple[str, bool], float] = {}  # by arm, and whether batches are of several images

    def note_first(self, arm: str, several: bool, first_s: float, usual_s: float) -> None:
        """The first batch of a kind took `first_s`; any later one takes `usual_s`. The rest was compiling."""
        self.compile_s.setdefault((arm, several), max(0.0, first_s - usual_s))

    def seconds(self, cell: Cell, warm_up_share: float, batches: int = 1) -> float:
        """Of a cell's warm-up, which makes `warm_up_share` of a batch, and of so many batches."""
        return self._compiling_s(cell) + (batches + warm_up_share) * self._batch_s(cell)

    def _compiling_s(self, cell: Cell) -> float:
        """As long as the arm's other kind of batch took, or else the slowest of other arms."""
        served_by = {cell.arm, ARMS[cell.arm].compiled_with}
        if cell.compile_mode == "off" or any((arm, cell.several) in self.compile_s for arm in served_by):
            return 0.0
        own = [seconds for (arm, _), seconds in self.compile_s.items() if arm == cell.arm]
        return max(own or self.compile_s.values(), default=0.0)

    def _batch_s(self, cell: Cell) -> float:
        """By the arm's nearest batch size, and how the leader's time grew from there; or else in proportion.

        An arm of which nothing is known is as slow as any. 0 where nothing is known at all.
        """
        known = {batch: other.seconds for (arm, batch), other in self.cells.items() if arm == cell.arm}
        if not known:
            same_size = [other.seconds for (_, batch), other in self.cells.items() if batch == cell.batch]
            return max(same_size, default=0.0)
        nearest = min(known, key=lambda batch: abs(math.log(batch / cell.batch)))
        growth = cell.batch / nearest
        leader = [self.cells.get((LEADER, batch)) for batch in (nearest, cell.batch)]
        if all(leader):
            growth = leader[1].seconds / leader[0].seconds
        return growth * known[nearest]
