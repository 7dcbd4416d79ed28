"""The bins of a metric's histogram: fixed, so that histograms of shards, runs and copies can be added and compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Range:
    """The fixed bins of a histogram. Values outside are counted in the first or the last bin."""

    low: float
    high: float
    log: bool = False
    bins: int = 64

    def edges(self) -> np.ndarray:
        spaced = np.geomspace if self.log else np.linspace
        return spaced(self.low, self.high, self.bins + 1)

    def index(self, values: np.ndarray) -> np.ndarray:
        scale = np.log if self.log else np.asarray
        low, high = scale(self.low), scale(self.high)
        values = scale(np.clip(values, self.low, self.high))
        return np.minimum((values - low) / (high - low) * self.bins, self.bins - 1).astype(np.int64)
