"""Published figures with their sources, the settings that a release sets, and how what runs here is unlike them.

A built-in config is the one place that says both: its values, and in the comment behind each, the file of the release
that sets it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashu.errors import InputError
from jobs.settings.config import BASELINE, BUILT_IN, FLASHU, built_in_configs

OF_UNDERSTANDING = Path(__file__).parent / "configs"  # which are of no run
DPG, GENEVAL, UNDERSTANDING = "dpg", "geneval", "understanding"
MODELS = ("show-o2-1.5b", "show-o2-1.5b-hq", "show-o2-7b")
PAPER = "Show-o2, arXiv 2506.15564"
UNSEEN = " (could not be looked up where this was written; check it)"
FLASHU_PAPER = "FlashU, arXiv 2603.15271, abstract"
ONEIG = "OneIG-Bench's authors, 432 pixels"
AGAIN = "TorchUMM's README, an independent run"
_SECTION = re.compile(r"(\w+):\s*$")
_SETTING = re.compile(r"  (\w+):\s*(?P<value>.*?)\s+#\s*(?P<source>.*)$")


@dataclass(frozen=True)
class Figure:
    """A published number. `arm` is whose it is, `measured` the key of ours that it stands beside, if there is one."""

    what: str
    value: str
    arm: str
    source: str
    measured: str | None = None


_SPEED_UP = Figure("speed-up by FlashU", "1.78-2.01x", FLASHU, FLASHU_PAPER, "speed_up")

FIGURES: dict[tuple[str, str], tuple[Figure, ...]] = {
    (DPG, "show-o2-1.5b"): (
        Figure("DPG-Bench score", "85.02", BASELINE, f"{PAPER}, table of DPG-Bench{UNSEEN}", "score"),
        Figure("DPG-Bench score", "82.78", BASELINE, AGAIN, "score"),
        _SPEED_UP,
        Figure("OneIG-Bench alignment", "0.798", BASELINE, ONEIG),
    ),
    (DPG, "show-o2-7b"): (
        Figure("DPG-Bench score", "86.14", BASELINE, f"{PAPER}, table of DPG-Bench", "score"),
        Figure("DPG-Bench score", "82.81", BASELINE, AGAIN, "score"),
        _SPEED_UP,
        Figure("OneIG-Bench alignment", "0.817", BASELINE, ONEIG),
    ),
    (GENEVAL, "show-o2-1.5b"): (
        Figure("GenEval score", "0.73", BASELINE, f"{PAPER}, table of GenEval{UNSEEN}", "score"),
        Figure("GenEval score", "0.55", BASELINE, AGAIN, "score"),
        _SPEED_UP,
    ),
    (GENEVAL, "show-o2-7b"): (
        Figure("GenEval score", "0.76", BASELINE, f"{PAPER}, table of GenEval", "score"),
        Figure("GenEval score", "0.60", BASELINE, AGAIN, "score"),
        _SPEED_UP,
    ),
    (GENEVAL, "show-o2-1.5b-hq"): (_SPEED_UP,),
    (UNDERSTANDING, "show-o2-1.5b"): (_SPEED_UP,),
    (UNDERSTANDING, "show-o2-7b"): (_SPEED_UP,),
}

UNLIKE: dict[str, tuple[str, ...]] = {
    DPG: (
        "seeds: the scripts set none; here an image's is a hash of run seed, prompt and number, alike in both arms",
        "pixels: the scripts cut them off to 8 bits; here they are rounded, so half of them are a level higher",
        "noise: the scripts draw it in bfloat16; here in float32, on the CPU, so that it does not depend on the device",
        "images: FlashU's scripts make one of each prompt, Show-o2's four; here both arms make four",
        "order: FlashU calibrates on the first prompt of its JSON list; here on the first of the question file, or of "
        "manifest.path",
        "judge: the papers' is mPLUG, of modelscope (vqa=mplug); another one's scores cannot be compared with theirs",
        "score: the official script leaves out the question file's first row; here it counts",
    ),
    GENEVAL: (
        "seeds, pixels and noise: as with DPG-Bench",
        "FlashU's arm: neither paper nor scripts give its numbers of steps for GenEval, so it takes those of DPG-Bench",
        "score: by GenEval's own evaluator, in an environment of its own",
    ),
    UNDERSTANDING: (
        "settings: FlashU's code for understanding was not released; its ratios here are those that cost the built-in "
        "model two points (docs/how-it-works/quality.md, Answers)",
        "tasks: the paper's are MME, GQA, MMMU and others, by lmms-eval; here any questions about images, with answers "
        "or without",
        "images: the script draws the latents of an image from the VAE's posterior; here they are its mean",
        "answers: here an image is read once for all of its questions, with its keys and values kept; tokens are equal",
    ),
}


def released_model(name: str) -> str:
    """Which released model a hub id or folder is of, by its name. Raises `InputError` where it says none."""
    called = re.findall(r"show-?o2-((?:1\.5b|7b)(?:-hq)?)", name, re.IGNORECASE)
    model = f"show-o2-{called[-1].lower()}" if called else None
    if model not in MODELS:
        raise InputError(
            f"--model {name}: its name does not say which released model it is of; add --like with one of: "
            f"{', '.join(MODELS)}"
        )
    return model


def config_file(benchmark: str, released: str) -> Path:
    """The config that has a released model's settings."""
    folder = OF_UNDERSTANDING if benchmark == UNDERSTANDING else BUILT_IN
    return folder / f"{benchmark}-{released}.yaml"


def beside(figures: tuple[Figure, ...], measured: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The published figures as lines of a table, each with ours; `measured` has ours by arm and key, as text."""
    lines = [("", "published", "here", "source")]
    for figure in figures:
        ours = measured.get(figure.arm, {}).get(figure.measured or "", "not measured")
        lines.append((f"{figure.what}, {figure.arm}", figure.value, ours, figure.source))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {ours:>{widths[2]}}  {source}".rstrip()
        for name, value, ours, source in lines
    ]


@dataclass(frozen=True)
class ReleasedSetting:
    """A setting, as the release has it, and where."""

    name: str
    value: Any
    source: str


def released_settings(config_file: Path) -> list[ReleasedSetting]:
    """The settings of a built-in config that say where they are from."""
    import yaml

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
