"""Finding ids that occur twice among any number of them, in bounded memory.

Ids become 128-bit hashes. Up to a million are compared in memory; more are spilled, with their row numbers, to
temporary files by the hash's first bits, so that equal ids meet in one file, and each file is sorted on its own: 24
bytes of disk a row, and at a billion rows some 50 MB of memory for a file. (That two different ids among a billion
share 128 bits has a probability of 1e-21.) The answer holds a bit a row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manifests.errors import ManifestError

PARTITION_BITS = 9
IN_MEMORY = 1_000_000
EXAMPLES = 5
ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])


def hash_ids(ids: Iterable[str]) -> bytes:
    """16 bytes for each id, one after another."""
    return b"".join(blake2b(name.encode(), digest_size=16).digest() for name in ids)


@dataclass(frozen=True)
class Duplicates:
    """Rows whose id an earlier row has. `examples` are the first few, as (earlier row, this row)."""

    count: int
    examples: list[tuple[int, int]]
    bits: NDArray[np.uint8]  # one a row, packed; set where the row repeats an earlier one

    def repeats(self, start: int, stop: int) -> NDArray[np.bool_]:
        """For each of these rows, whether it repeats an earlier one."""
        first = start // 8
        bits = np.unpackbits(self.bits[first : (stop + 7) // 8], bitorder="little")
        return bits[start - first * 8 : stop - first * 8].astype(bool)


class DuplicateFinder:
    """Takes ids in the order of their rows, then says which occur twice. Use it in a `with` block: it has a folder."""

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self.rows = 0
        self._in_memory = in_memory
        self._hashes: list[bytes] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # made when there is too much for memory

    def __enter__(self) -> DuplicateFinder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder:
            self._folder.cleanup()

    def add(self, ids: Iterable[str]) -> bytes:
        """The next rows' ids; returns their hashes."""
        hashes = hash_ids(ids)
        self._hashes.append(hashes)
        self.rows += len(hashes) // 16
        if sum(map(len, self._hashes)) >= 16 * self._in_memory:
            self._spill()
        return hashes

    def duplicates(self) -> Duplicates:
        """Of all ids so far. The last thing to ask of it."""
        if self._folder and self._hashes:
            self._spill()
        bits = np.zeros((self.rows + 7) // 8, np.uint8)
        count = 0
        examples: list[tuple[int, int]] = []  # (this row, earlier row)
        for entries in self._partitions():
            first, repeat = _repeats(entries)
            count += len(repeat)
            np.bitwise_or.at(bits, repeat // 8, np.left_shift(1, repeat % 8).astype(np.uint8))
            order = np.argsort(repeat)[:EXAMPLES]
            examples = sorted(examples + list(zip(repeat[order].tolist(), first[order].tolist(), strict=True)))
            del examples[EXAMPLES:]
        return Duplicates(count, [(earlier, row) for row, earlier in examples], bits)

    def _take(self) -> NDArray[np.void]:
        """What is in memory, as entries."""
        pairs = np.frombuffer(b"".join(self._hashes), "<u8").reshape(-1, 2)
        self._hashes = []
        entries = np.empty(len(pairs), ENTRY)
        entries["high"], entries["low"] = pairs[:, 0], pairs[:, 1]
        entries["row"] = np.arange(self.rows - len(pairs), self.rows)
        return entries

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="flashu-ids-")
        entries = self._take()
        partition = entries["high"] >> np.uint64(64 - PARTITION_BITS)
        order = np.argsort(partition, kind="stable")  # stable: rows stay in order within a file
        entries, bounds = entries[order], np.searchsorted(partition[order], np.arange(2**PARTITION_BITS + 1))
        try:
            for index in range(2**PARTITION_BITS):
                with open(Path(self._folder.name) / f"{index:03d}", "ab") as file:
                    entries[bounds[index] : bounds[index + 1]].tofile(file)
        except OSError as error:
            raise ManifestError(
                f"ids cannot be compared: {self._folder.name}: {error.strerror or error}; "
                "TMPDIR names a folder with 24 bytes for each row"
            ) from None

    def _partitions(self) -> Iterator[NDArray[np.void]]:
        if self._folder is None:
            yield self._take()
            return
        for file in sorted(Path(self._folder.name).iterdir()):
            yield np.fromfile(file, ENTRY)


def _repeats(entries: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that repeat an earlier one, and for each the earliest with its id: (earliest, row)."""
    high = np.sort(entries["high"])
    shared = high[1:][high[1:] == high[:-1]]
    tied = entries[np.isin(entries["high"], shared)]  # few, as a rule: only these are sorted in full
    tied = tied[np.lexsort((tied["row"], tied["low"], tied["high"]))]
    same = np.zeros(len(tied), bool)
    same[1:] = (tied["high"][1:] == tied["high"][:-1]) & (tied["low"][1:] == tied["low"][:-1])
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(tied))))
    return tied["row"][starts[same]], tied["row"][same]
