"""What a caller may pass: checked once, here, with errors that name the argument and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeGuard

from flashu.errors import InputError

MAX_SEED = 2**64 - 1


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number of any type; a truth value is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number that a float holds; a truth value is none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def texts(name: str, values: Any, count: int | None = None) -> list[str]:
    """A list of texts; one text is repeated `count` times. Raises `InputError` for anything else."""
    result = [values] * (1 if count is None else count) if isinstance(values, str) else as_list(name, values)
    for value in result:
        if not isinstance(value, str):
            raise InputError(f"{name} holds {value!r}, which is no text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise InputError(f"{name} holds {value!r}, which is not valid Unicode")
    return _one_each(name, result, count)


def seeds(values: Any, count: int, of: str = "prompts") -> list[int]:
    """A seed for each: given, counted up from one number, or, for None, from torch's global generator."""
    if values is None:
        import torch  # takes seconds, and settings are checked without it

        return torch.randint(2**63 - 1, (count,)).tolist()
    if is_whole(values):
        values = range(int(values), int(values) + count)
    result = as_list("seeds", values)
    for value in result:
        if not is_whole(value) or not 0 <= value <= MAX_SEED:
            raise InputError(f"seeds holds {value!r}; a seed is a whole number from 0 to 2**64 - 1")
    return [int(value) for value in _one_each("seeds", result, count, of)]


def whole(name: str, value: Any, least: int) -> int:
    """A whole number. Raises `InputError` for another kind, or one below `least`."""
    if not is_whole(value) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number, at least {least}")
    return int(value)


def finite(name: str, value: Any, *, zero: bool) -> float:
    """A finite number above zero, or, with `zero`, from zero on. Raises `InputError` for anything else."""
    if not is_finite(value) or value < 0 or (value == 0 and not zero):
        raise InputError(f"{name} is {value!r}; it must be a finite number, {'0 or more' if zero else 'above 0'}")
    return float(value)


def as_list(name: str, values: Any) -> list[Any]:
    """Several values as a list. Raises `InputError` for what is no iterable."""
    if not isinstance(values, Iterable):
        raise InputError(f"{name} is {values!r}; give one, or several in a list")
    return list(values)


def _one_each(name: str, values: list[Any], count: int | None, of: str = "prompts") -> list[Any]:
    if count is not None and len(values) != count:
        raise InputError(f"{len(values)} {name} for {count} {of}; give one for each")
    return values
