"""Multistep solver (Adams-Bashforth): a step that leans on the velocity of the one before, and so may be longer.

Not FlashU's, whose steps are Euler's, of order 1. Order 2 takes no evaluation more: the velocity is continued along the
line through the last two, as in the AB methods of DEIS (arXiv 2204.13902), here over the sampler's own uneven grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def orders(guidance: Sequence[float], highest: int) -> list[int]:
    """Each step's order, given its guidance scale.

    A step of order 2 needs an earlier velocity of the same field, so the first step has order 1, and so has one whose
    guidance is another than the step's before. The last is the longest on a grid moved towards the noise, and is better
    not continued either.
    """
    last = len(guidance) - 1
    return [
        highest if 0 < index < last and guidance[index] == guidance[index - 1] else 1 for index in range(len(guidance))
    ]


def share(interval: float, earlier_interval: float) -> float:
    """Of the way from the velocity of a step `earlier_interval` ago to this one's, how much to go on by: the mean over
    the next `interval` on the line through both."""
    return interval / (2 * earlier_interval)


def continued(velocity: Tensor, earlier: Tensor, share: float | Tensor) -> Tensor:
    """The mean velocity over the next interval, by its `share`."""
    return velocity + share * (velocity - earlier)
