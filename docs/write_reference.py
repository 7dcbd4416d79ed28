"""Writes the pages of the reference that are made from the code, so that they can be read on GitHub too.

    python docs/write_reference.py

`settings.md` is made of the configs' classes, and of the comments in `default.yaml` and beside the benchmarks' own
settings; `command-line.md` of the commands as typer knows them.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
import yaml

from cluster import authentication, node_cache, session
from flashu.config import FLASHU_PRESETS, FlashUConfig
from jobs.cli.main import app
from jobs.scoring import published
from jobs.scoring.arms import ArmsConfig
from jobs.scoring.benchmark import BenchmarkConfig
from jobs.scoring.geneval import GenevalConfig
from jobs.scoring.understanding import UnderstandingConfig
from jobs.settings.config import BUILT_IN, RunConfig, built_in_configs
from jobs.settings.config_text import EXAMPLES, SCALARS, sections_of, settings_of
from jobs.worker.warm_up import COMPILED_CODE

ROOT = Path(__file__).parents[1]
SETTINGS, COMMAND_LINE = (ROOT / "docs" / "reference" / name for name in ("settings.md", "command-line.md"))
DEFAULT = BUILT_IN / "default.yaml"
WRITTEN = "`make docs` writes this page from the code."

ENVIRONMENT = {
    node_cache.CACHE_VARIABLE: "where a node keeps what it fetches from S3, compiles and measures, unless "
    "`model.cache_dir` says; `~/.cache/flashu`",
    session.ADDRESS_VARIABLE: "the Ray cluster that a run joins, unless `cluster.address` says; `local` starts Ray "
    "here. For `flashu submit`, the cluster's dashboard",
    authentication.TOKEN: "the token of a Ray cluster that asks for one",
    authentication.TOKEN_PATH: "a file with that token; `~/.ray/auth_token`",
    authentication.MODE: "anything but `token`, and Ray that is started here asks for none of its own",
    authentication.TLS: "set, no cluster is asked whether it wants a token, and Ray goes by its own variables",
    "RAY_TMPDIR": "Ray's folder, where `ray start` leaves the address of a cluster on this machine",
    "TMPDIR": "the folder above that one, on Linux, unless `RAY_TMPDIR` says; `/tmp`",
    "AWS_ENDPOINT_URL_S3": "an S3 server that is not Amazon's, unless `storage.endpoint_url` or `--endpoint-url` says",
    "AWS_ENDPOINT_URL": "the same, for all of Amazon's services",
    "AWS_REGION": "the region of a manifest in S3, unless `storage.region` or `--region` says",
    "AWS_DEFAULT_REGION": "the region of S3, unless `storage.region` or `--region` says",
    COMPILED_CODE: "where PyTorch keeps compiled code; without it, a run has it kept in the node's cache",
}
"""Those that the code reads, of which a test sees that they are all here."""
OF_LIBRARIES = """\
Libraries read others. boto3 and Arrow look for S3's credentials in `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or
in the profile that `AWS_PROFILE` names. huggingface_hub takes `HF_TOKEN` for repositories that are not public,
`HF_HOME` as its cache, and with `HF_HUB_OFFLINE=1` asks for nothing."""


def pages() -> dict[Path, str]:
    """The text of each page, by its file."""
    return {SETTINGS: settings_page(), COMMAND_LINE: command_line_page()}


# ---------------------------------------------------------------------------------------------------- settings


def settings_page() -> str:
    words = written_beside(DEFAULT.read_text(encoding="utf-8"))
    of_runs, of_both = default_values(RunConfig), default_values(ArmsConfig)
    parts = [
        "# Settings",
        "A setting is given in a YAML file, under its section, or on the command line as `section.key=value`. A file "
        "says only what differs from the defaults, which are all in "
        "[default.yaml](../../jobs/settings/configs/default.yaml), to be copied. Beside each name here stands the "
        f"default, and what else it may be. {WRITTEN}",
    ]
    for section in sections_of(RunConfig):
        parts.append(f"## {section}")
        if section in words:
            parts.append(as_code(f"{words[section][:1].upper()}{words[section][1:]}."))
        parts.append(setting_list(RunConfig, [name for name in of_runs if name.startswith(f"{section}.")], words))
    parts += [
        "## Benchmarks",
        "`flashu dpg`, `flashu reproduce dpg` and `flashu reproduce geneval` take every setting of a run, and",
        setting_list(ArmsConfig, [name for name, value in of_both.items() if value != of_runs.get(name)], words),
        "For DPG-Bench also",
        setting_list(BenchmarkConfig, [name for name in default_values(BenchmarkConfig) if name not in of_both], words),
        "For GenEval also",
        setting_list(GenevalConfig, [name for name in default_values(GenevalConfig) if name not in of_both], words),
        "What has an option of its own in `flashu reproduce` (`--model`, `-o`, `--questions`, `--prompts`) is given by "
        "that. See [Benchmarks](../benchmarks.md).",
        "### flashu reproduce understanding",
        "It starts no run, and its settings are its own:",
        setting_list(UnderstandingConfig, default_values(UnderstandingConfig), {}),
        "## FlashU's presets",
        "For `flashu.preset`, and `--flashu` of the command line. See [Accelerate](../accelerate.md).",
        preset_table(),
        "## Built-in configs",
        "Each goes by the name of its file. In those of benchmarks, every value has the place beside it that it is "
        "taken from.",
        "\n".join(config_entry(file) for file in built_in_configs().values() if file != DEFAULT),
        "`flashu reproduce understanding` goes by others:",
        "\n".join(config_entry(file) for file in sorted((Path(published.__file__).parent / "configs").glob("*.yaml"))),
        "## Environment variables",
        "\n".join(f"- **`{name}`**\\\n  {says}" for name, says in ENVIRONMENT.items()),
        OF_LIBRARIES,
    ]
    return "\n\n".join(parts) + "\n"


def written_beside(text: str, section: str = "") -> dict[str, str]:
    """What comments say of settings, by `section.key`, or by `section` itself: in YAML, or in a class of that section.

    A comment stands behind its setting, and may go on in lines of its own.
    """
    found: dict[str, str] = {}
    name, in_yaml = "", not section
    for line in text.splitlines():
        if setting := re.match(r"( *)(\w+):(?: [^#]*?)?(?: +# (?!noqa)(.*?))?(?: +# noqa.*)?$", line):
            indent, key, words = setting.groups()
            section = key if in_yaml and not indent else section
            name = f"{section}.{key}" if indent else key
            if words:
                found[name] = words
        elif (more := re.match(r" +# (.*)$", line)) and name in found:
            found[name] += f" {more[1]}"
    return found


def of_class(kind: type, section: str = "") -> dict[str, str]:
    """What comments in Python say of a config's settings."""
    found = {}
    for each in filter(is_dataclass, reversed(kind.__mro__)):
        found |= written_beside(inspect.getsource(each), section or "*")
    if not section:  # the config itself
        found = {name.removeprefix("*."): words for name, words in found.items()}
        for name, hint in typing.get_type_hints(kind).items():
            found |= of_class(hint, name) if is_dataclass(hint) else {}
    return found


def default_values(kind: type) -> dict[str, Any]:
    """A config's defaults by name, before anything is made of them."""
    found: dict[str, Any] = {}
    for entry in fields(kind):
        value = entry.default_factory() if entry.default is MISSING else entry.default
        keys = fields(value) if is_dataclass(value) else ()
        found |= {f"{entry.name}.{key.name}": getattr(value, key.name) for key in keys} or {entry.name: value}
    return found


def setting_list(kind: type, names: Iterable[str], words: Mapping[str, str]) -> str:
    """An entry for each of some settings. Raises `ValueError` for one of which nothing is written."""
    words, defaults, lines = of_class(kind) | words, default_values(kind), []
    for name in names:
        if name not in words:
            raise ValueError(f"{name} has no comment that says what it is")
        shown = f"`{as_yaml(defaults[name])}`{others(kind, name, defaults[name])}"
        lines.append(f"- **`{name}`** · {shown}\\\n  {as_code(words[name])}")
    return "\n".join(lines)


def others(kind: type, name: str, default: Any) -> str:
    """What a setting may be besides its default."""
    setting = settings_of(kind)[name]
    if name in EXAMPLES:
        return f", or such as `{EXAMPLES[name]}`"
    if setting.kind is bool:
        return f", or `{as_yaml(not default)}`"
    takes = [SCALARS[setting.kind]] if setting.kind in SCALARS else []
    takes += ["`null`"] if setting.nullable and default is not None else []
    return "".join(f", or {each}" for each in takes)


def as_yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value)


def preset_table() -> str:
    """A row for each setting, and a column for the presets of each kind."""
    presets = {", ".join(names): config for config, names in groupby(FLASHU_PRESETS, FLASHU_PRESETS.__getitem__)}
    rows = [["", *presets], ["---"] * (len(presets) + 1)]
    for name in (entry.name for entry in fields(FlashUConfig)):
        values = [getattr(config, name) for config in presets.values()]
        if not name.startswith("und_"):
            rows.append([f"`{name}`", *map(preset_value, values)])
        elif {*values} != {getattr(FlashUConfig(), name)}:
            raise ValueError("a preset accelerates answering, which the table leaves out")
    rows.append(["points of the time grid", *(str(config.total_steps) for config in presets.values())])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\nNone changes how questions are answered: the `und_` settings of `FlashUConfig` are off in all."


def preset_value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{steps} at {scale:g}" for steps, scale in value)
    return "–" if value is None else f"{value:g}"


def config_entry(file: Path) -> str:
    """What a config's file says that it is for, in its first sentences, and what it sets."""
    text = file.read_text(encoding="utf-8")
    first = re.match(r"(?:# (?! ).*\n)+", text)
    about = " ".join(line.removeprefix("# ") for line in first[0].splitlines()) if first else ""
    about = re.sub(r"(?<=\.) [^.]*:$", "", about)  # which leads to a command
    sections = yaml.safe_load(text).items()
    given = [f"`{section}.{key}={as_yaml(value)}`" for section, keys in sections for key, value in keys.items()]
    link = f"../../{file.relative_to(ROOT).as_posix()}"
    return f"- **[`{file.stem}`]({link})**\\\n  {as_code(about)}\\\n  {', '.join(given)}"


# ------------------------------------------------------------------------------------------------ command line


def command_line_page() -> str:
    command = typer.main.get_command(app)
    found = [(path, each) for path, each in walk("flashu", command) if each is not command]
    parts = [
        "# Command line",
        "`--help` behind a command prints what is here. Where the package is not installed, `python -m jobs` is "
        "`flashu`. What a user can mend is told in one line, and then the exit code is 2. "
        f"{WRITTEN}",
        "\n".join(["| | |", "| --- | --- |", *(overview(path, each) for path, each in found if not below(each))]),
        *(text for path, each in found for text in command_parts(path, each)),
    ]
    return "\n\n".join(parts) + "\n"


def below(command: Any) -> dict[str, Any]:
    return getattr(command, "commands", {})


def walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command and those below it, each with all of its name."""
    yield path, command
    for name, each in below(command).items():
        yield from walk(f"{path} {name}", each)


def overview(path: str, command: Any) -> str:
    first = re.split(r"(?<=[a-z)]\.) ", paragraphs(command.help)[0])[0]
    return f"| [{path}](#{path.replace(' ', '-')}) | {as_code(first)} |"


def paragraphs(text: str) -> list[str]:
    """Each in a line; what is indented, as code."""
    return [
        f"```text\n{inspect.cleandoc(each)}\n```" if each.startswith("    ") else " ".join(each.splitlines())
        for each in inspect.cleandoc(text).split("\n\n")
    ]


def command_parts(path: str, command: Any) -> Iterator[str]:
    yield f"{'#' * len(path.split())} {path}"
    arguments = [each for each in command.params if not each.opts[0].startswith("-")]
    options = [each for each in command.params if each not in arguments]
    shown = ["COMMAND"] if below(command) else []
    shown += ["[OPTIONS]"] if options else []
    for each in arguments:
        shown.append(metavar(each) if each.required or metavar(each).startswith("[") else f"[{metavar(each)}]")
    yield f"```text\n{' '.join([path, *shown])}\n```"
    yield from map(as_code, paragraphs(command.help))
    if command.params:
        hints = typing.get_type_hints(inspect.unwrap(command.callback))
        entries = [entry(f"**`{re.sub('[][]', '', metavar(each))}`**", each) for each in arguments]
        entries += [entry(f"**{names(each)}**{taken(each, hints[each.name])}", each) for each in options]
        yield "\n".join(entries)


def metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in option.opts + option.secondary_opts)


def taken(option: Any, hint: Any) -> str:
    """What stands behind an option, by the type that its function has it in."""
    words = {str: " TEXT", int: " NUMBER", float: " NUMBER", Path: " PATH"}
    kinds: Iterable[Any] = (hint, *typing.get_args(hint))
    return f" {option.metavar}" if option.metavar else next((words[kind] for kind in kinds if kind in words), "")


def entry(shown: str, parameter: Any) -> str:
    default, facts = parameter.default, [shown]
    if parameter.required and parameter.opts[0].startswith("-"):
        facts.append("required")
    if isinstance(parameter.show_default, str):
        facts.append(parameter.show_default)
    elif parameter.secondary_opts:
        facts.append(f"`{(parameter.opts if default else parameter.secondary_opts)[0]}`")
    elif default is not None and default is not False and default != "":
        facts.append(f"`{default:g}`" if isinstance(default, float) else f"`{default}`")
    if parameter.envvar:
        facts.append(f"`{parameter.envvar}` of the environment")
    return f"- {' · '.join(facts)}\\\n  {as_code(parameter.help)}"


# ------------------------------------------------------------------------------------------------------- words


def as_code(text: str) -> str:
    """Text as Markdown: words that are code, and are not marked as such, are."""
    if text.startswith("```"):
        return text
    pieces = re.split(r"(`[^`]*`|\s+)", text)
    return "".join(re.sub(r"^([(\"']*)(.*?)([)\"',;:.]*)$", _marked, piece) for piece in pieces)


def _marked(word: re.Match[str]) -> str:
    before, bare, after = word.groups()
    is_code = bare in settings_of(RunConfig) or re.fullmatch(
        r"null|true|false|--[a-z][\w-]*|[\w.]+=\S+|[^`\s]*\w_\w[^`\s]*|\w*://[^`\s]*|~/\S+|host:port", bare
    )
    return f"{before}`{bare}`{after}" if is_code else word[0]


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
