"""An image size as a person types it."""

from __future__ import annotations

from flashu.errors import InputError


def parse_size(name: str, size: str | int | None) -> int | tuple[int, int] | None:
    """Pixels per side ("432"), or "WIDTHxHEIGHT" as (height, width). Raises `InputError` beginning with `name`."""
    if size is None:
        return None
    sides = str(size).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"{name} {size}: give pixels per side (432), or WIDTHxHEIGHT (512x384)")
    if len(sides) == 1:
        return int(sides[0])
    width, height = map(int, sides)
    return height, width
