"""The pages of this folder's templates: HTML in one file, with pictures inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jobs.report.wording import FILTERS


def page(template: str, **values: Any) -> str:
    """A template filled in. Values are escaped: prompts, ids and errors are other people's text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template(template).render(**values)
