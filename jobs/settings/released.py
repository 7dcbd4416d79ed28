"""The settings that a run comes to, beside those that a built-in config takes from a release, and where those stand.

A built-in config is the one place that says both: its values, and in the comment behind each, the file of the release
that sets it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.settings.config import built_in_configs

_SECTION = re.compile(r"(\w+):\s*$")
_SETTING = re.compile(r"  (\w+):\s*(?P<value>.*?)\s+#\s*(?P<source>.*)$")


@dataclass(frozen=True)
class ReleasedSetting:
    """A setting, as the release has it, and where."""

    name: str
    value: Any
    source: str


def released_settings(config_file: Path) -> list[ReleasedSetting]:
    """The settings of a built-in config that say where they are from."""
    found, section = [], ""
    for line in config_file.read_text(encoding="utf-8").splitlines():
        if begins := _SECTION.match(line):
            section = begins[1]
        elif setting := _SETTING.match(line):
            found.append(
                ReleasedSetting(f"{section}.{setting[1]}", yaml.safe_load(setting["value"]), setting["source"])
            )
    return found


def released_settings_of(config: str | None) -> list[ReleasedSetting]:
    """The settings of a built-in config that takes them from a release; none of another's."""
    built_in = built_in_configs()
    return released_settings(built_in[config]) if config in built_in and config.startswith(("dpg-", "geneval-")) else []


def table(released: list[ReleasedSetting], settings: Mapping[str, Any]) -> list[str]:
    """The settings as lines of a table: as resolved, and where the release has that value, or which other it has."""
    lines = []
    for each in released:
        now = _setting(settings, each)
        same = now == each.value
        lines.append((each.name, _shown(now), each.source if same else f"NOT {_shown(each.value)}: {each.source}"))
    widths = [max((len(line[column]) for line in lines), default=0) for column in range(2)]
    return [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in lines]


def other_than(released: list[ReleasedSetting], settings: Mapping[str, Any]) -> list[str]:
    """The settings that are not the release's, in words."""
    return [
        f"{each.name}: {_shown(each.value)} there, {_shown(now)} here"
        for each in released
        if (now := _setting(settings, each)) != each.value
    ]


def _setting(settings: Mapping[str, Any], setting: ReleasedSetting) -> Any:
    section, _, key = setting.name.partition(".")
    return settings[section][key]


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
