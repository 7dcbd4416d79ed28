"""A run's many small files, read side by side and taken in order; what is read of each is the reader's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 16
AHEAD = 64  # files that are read, and not yet taken; a run may have millions

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_each(read: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS) -> Iterator[Result]:
    """What `read` makes of each item, in their order. What it raises is raised where that item's turn is."""
    with ThreadPoolExecutor(threads, "reader") as pool:
        yield from in_order(pool, read, items, AHEAD)


def in_order(pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """The results for `items`, in their order; at most `ahead` of them are held or under way at a time."""
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:  # nobody takes them
            future.cancel()
