"""Finding images that look like an earlier one among any number of them, by 64-bit perceptual hashes, and exactly.

Two hashes that differ in at most four bits have at least one of five bands in common, so a hash is compared only with
those that share a band with it. Hashes that are kept stand in sorted arrays, one for each band, with that band's bits
rotated to the top: those sharing a band are neighbours. The arrays are in levels of growing size, merged when two are
alike, so each hash is moved a logarithmic number of times. That takes 40 bytes a kept hash, 48 while levels merge.

How many a hash is compared with depends on the pictures: for every million kept, 732 where bits are random, which takes
half a minute for a million and four minutes for three; 1,221 for pictures of 1/f noise, 6,182 for coloured shapes.
"""

from __future__ import annotations

import numpy as np

from jobs.metrics.pixels import NEAR_DUPLICATE_BITS

BITS = 64
BANDS = NEAR_DUPLICATE_BITS + 1
STARTS = [BITS * band // BANDS for band in range(BANDS + 1)]
BLOCK = 256  # hashes that are compared with each other
RECENT = 1024  # hashes that stand outside of levels, and are compared with all that come
PAIRS = 2**16  # that are compared at once


class NearDuplicateFinder:
    """Takes hashes in the order of their images, and says which of them are near an earlier one that was kept."""

    def __init__(self) -> None:
        self._levels: list[list[np.ndarray]] = []  # the largest first; in each, an array per band
        self._recent = np.empty(0, np.uint64)
        self._repeats = bytearray()  # one a hash

    def add(self, hashes: np.ndarray) -> None:
        """The next hashes: (count,), uint64."""
        for start in range(0, len(hashes), BLOCK):
            block = hashes[start : start + BLOCK]
            repeats = self._near_kept(block)
            repeats |= _near(block[:, None] ^ self._recent[None, :]).any(axis=1)
            _drop_within(block, repeats)
            self._repeats += repeats.tobytes()
            self._keep(block[~repeats])

    def repeats(self, start: int, stop: int) -> np.ndarray:
        """For each of these hashes, counted in the order in which they came, whether it is near a kept one."""
        return np.frombuffer(self._repeats[start:stop], bool)

    def _near_kept(self, block: np.ndarray) -> np.ndarray:
        near = np.zeros(len(block), bool)
        for band in range(BANDS):
            width = STARTS[band + 1] - STARTS[band]
            rotated = _rotated(block, STARTS[band])
            others = np.uint64(2 ** (BITS - width) - 1)
            for level in self._levels:
                open_ = np.flatnonzero(~near)
                queries = rotated[open_]
                low = np.searchsorted(level[band], queries & ~others)
                high = np.searchsorted(level[band], queries | others, side="right")
                near[open_] = _near_any(queries, level[band], low, high)
        return near

    def _keep(self, hashes: np.ndarray) -> None:
        self._recent = np.concatenate([self._recent, hashes])
        if len(self._recent) < RECENT:
            return
        level = [np.sort(_rotated(self._recent, start)) for start in STARTS[:-1]]
        self._recent = self._recent[:0].copy()
        while self._levels and len(self._levels[-1][0]) <= len(level[0]):
            larger = self._levels.pop()
            for band in range(BANDS):  # one after the other: the old ones go as the new ones come
                level[band] = np.concatenate([larger[band], level[band]])
                larger[band] = None
                level[band].sort()
        self._levels.append(level)


def _rotated(hashes: np.ndarray, bits: int) -> np.ndarray:
    """With so many bits moved from the top to the bottom."""
    return hashes << np.uint64(bits) | hashes >> np.uint64((BITS - bits) % BITS)


def _near(differing: np.ndarray) -> np.ndarray:
    """Whether so few bits are set that two hashes, of which these are the differences, are near."""
    for _ in range(NEAR_DUPLICATE_BITS):
        differing = differing & (differing - np.uint64(1))  # clears the lowest bit; of 0 it makes 0
    return differing == 0


def _near_any(queries: np.ndarray, kept: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """For each query, whether it is near one of the kept hashes from `low` on and before `high`."""
    near = np.zeros(len(queries), bool)
    ends = np.cumsum(high - low)
    start = done = 0
    while start < len(queries):
        stop = max(start + 1, int(np.searchsorted(ends, done + PAIRS, side="right")))
        counts = high[start:stop] - low[start:stop]
        query = np.repeat(np.arange(start, stop), counts)
        place = np.arange(len(query)) + np.repeat(low[start:stop] - (ends[start:stop] - counts - done), counts)
        near[query[_near(queries[query] ^ kept[place])]] = True
        start, done = stop, int(ends[stop - 1])
    return near


def _drop_within(block: np.ndarray, repeats: np.ndarray) -> None:
    """Sets `repeats` for hashes near an earlier one of their block that is none itself."""
    near = np.triu(_near(block[:, None] ^ block[None, :]), 1)
    for earlier in np.flatnonzero(near.any(axis=1)):
        if not repeats[earlier]:
            repeats |= near[earlier]
