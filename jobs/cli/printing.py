"""What several commands print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from jobs.settings.released import ReleasedSetting

SHOWN = 10  # of what is missing


def print_settings(released: list[ReleasedSetting], settings: Mapping[str, Any], arms: str) -> None:
    """The settings that a release sets, where it does, and what each arm does, where there are arms."""
    from jobs.settings.released import table

    typer.echo("\n".join(table(released, settings)))
    typer.echo(f"\n{arms}\n" if arms else "")


def print_missing(missing: list[str]) -> None:
    """The first of what an export left out."""
    for what in missing[:SHOWN]:
        typer.echo(f"Missing: {what}", err=True)
    if len(missing) > SHOWN:
        typer.echo(f"Missing: {len(missing) - SHOWN:,} more", err=True)
