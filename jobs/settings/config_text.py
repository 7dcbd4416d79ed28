"""From text to settings: a YAML file, or `section.key=value` of a command line, read as what each setting is.

YAML guesses types: `no` is a truth value to it, `010` is eight, `a: b` a mapping, and what follows ` #` is lost. Here
the setting has the type, and nothing is guessed: a text is taken as it stands, but for spaces around it, and a number
is what Python reads as one. Settings of several types (a size, a schedule) are YAML.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from cluster.tracebacks import SECRET_NAME, scrubbed
from flashu.errors import InputError
from manifests import PARQUET

SCALARS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
EXAMPLES = {  # of settings that are neither
    "sampling.size": "432",
    "sampling.batch_size": "8",
    "flashu.schedule": "[[24,7.5],[11,10]]",
    "cluster.workers": "4",
}
COLUMNS = "manifest.columns"
OFF_OF = ("flashu.preset", "model.compile")  # settings that have a word for off
OFF = ("off", "no", "false")
NULLS = ("null", "Null", "NULL", "~")
LONGEST = 80  # characters of a value that are shown


@dataclass(frozen=True)
class Setting:
    """What a setting must be. `kind` is object where it is checked where it is used."""

    kind: type
    nullable: bool

    def __str__(self) -> str:
        if self.kind is dict:
            return f"our names of columns with theirs, as in {COLUMNS}.prompt=caption"
        return SCALARS[self.kind] + (", or null" if self.nullable else "")


@dataclass
class SourceSettings:
    """The settings that one source gives."""

    source: str  # how errors begin
    values: dict[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)  # of settings, in a file

    def place(self, key: str) -> str:
        """The beginning of an error about a setting: the file and the line, nothing for a command line."""
        line = f", line {self.lines[key]}" if key in self.lines else ""
        return f"{self.source}{line}: " if self.source else ""


@cache
def settings_of(kind: type) -> dict[str, Setting]:
    """The settings of a config, under their names as one gives them: `section.key`, or `key`."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            found |= {f"{name}.{key}": setting for key, setting in settings_of(hint).items()}
            continue
        options = [option for option in get_args(hint) if option is not type(None)]
        nullable = get_origin(hint) is Union
        bare = options[0] if nullable else get_origin(hint) or hint
        found[name] = Setting(object if bare is Any else bare, nullable)
    return found


@cache
def sections_of(kind: type) -> dict[str, list[str]]:
    """The names of a config's sections, and of the settings in each."""
    hints = get_type_hints(kind)
    return {name: [entry.name for entry in fields(hint)] for name, hint in hints.items() if is_dataclass(hint)}


# ------------------------------------------------------------------------------------------------------ a file


def read_file(file: Path, kind: type) -> SourceSettings:
    """What a YAML file says. Raises `InputError` naming file and line."""
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = file.read_text(encoding="utf-8-sig")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = OmegaConf.create(text)
    except UnicodeDecodeError:
        raise InputError(f"{file} cannot be read: it is no text in UTF-8, as a config is") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file} cannot be read: {_yaml_reason(error)}") from None
    except (OmegaConfBaseException, OSError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}") from None
    settings, sections = settings_of(kind), sections_of(kind)
    if not isinstance(loaded, DictConfig) or (tree is not None and not isinstance(tree, yaml.MappingNode)):
        raise InputError(f"{file} must be a mapping of the sections {', '.join(sections)}")
    values = OmegaConf.to_container(loaded)
    values = {name: value for name, value in values.items() if not (value is None and name in sections)}
    given = SourceSettings(str(file), values)
    nodes = dict(_nodes(tree)) if tree is not None else {}
    given.lines = {name: node.start_mark.line + 1 for name, node in nodes.items()}
    for name in values:
        if str(name) in settings and "." in name:
            section, _, key = name.partition(".")
            raise InputError(f"{given.place(name)}in a file, {name} is written as {key}: in the mapping {section}:")
    for name, node in nodes.items():
        setting = _setting(name, settings)
        if setting and setting.kind in SCALARS and isinstance(node, yaml.ScalarNode) and node.style is None:
            _put(values, name, None if node.tag.endswith(":null") else node.value)
        elif setting and setting.kind is str and not isinstance(node, yaml.ScalarNode):
            raw = text[node.start_mark.index : node.end_mark.index]
            quoted = f", as in {name.rpartition('.')[2]}: {json.dumps(raw, ensure_ascii=False)}"
            shown = quoted if "\n" not in raw and len(raw) <= LONGEST else ""
            raise InputError(f"{given.place(name)}{name} must be {setting}; put it in quotes{shown}")
    return given


def _nodes(mapping: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The nodes of a mapping and of those in it, under dotted names: three deep, as manifest.columns.prompt is."""
    for key, value in mapping.value:
        name = f"{path}{key.value}"
        yield name, value
        if hasattr(value, "flow_style") and value.id == "mapping" and path.count(".") < 2:
            yield from _nodes(value, f"{name}.")


def _yaml_reason(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return first_line(error)
    if "quoted scalar" in (error.context or "") and error.context_mark:
        return f"line {error.context_mark.line + 1}: a quote is opened there and not closed"
    hint = ""
    if "\\t" in problem:
        hint = "; indent with spaces, not tabs"
    elif "duplicate" not in problem and "document" not in problem:
        hint = "; a text with ': ' or ' #' in it, or that begins with one of []{},&*!|>'\"%@`, goes in quotes"
    return f"line {mark.line + 1}: {problem}{hint}"


# ---------------------------------------------------------------------------------------------- a command line


def check_overrides(overrides: Sequence[str], kind: type) -> None:
    """Raises `InputError` for what is no `section.key=value`, saying how the shell is to be told where it ends."""
    settings = settings_of(kind)
    for index, override in enumerate(overrides):
        key, equals, _ = override.partition("=")
        if key.startswith("-"):
            raise InputError(f"{key} is no option; settings have no dashes before them, as in sampling.seed=1")
        if equals and key.strip():
            continue
        before = overrides[index - 1] if index else ""
        if before.endswith("=") and before != "=":
            raise InputError(f"{before} and its value are written without a space between them, as in sampling.seed=1")
        if equals or (index + 1 < len(overrides) and overrides[index + 1].startswith("=")):
            raise InputError("a setting is written without spaces around its =, as in sampling.seed=1")
        hint = "write section.key=value, as in sampling.seed=1"
        if override.endswith(PARQUET):
            hint = f"did you mean manifest.path={override}?"
        if _setting(before.partition("=")[0], settings):  # else its value may be a secret in a wrong place
            words = [before]
            for word in overrides[index:]:
                if _setting(word.partition("=")[0], settings) and "=" in word:
                    break
                words.append(word)
            hint += f"; if it belongs to the setting before, quote the whole: {shlex.quote(' '.join(words))}"
        raise InputError(f"{scrubbed(repr(override))} is no override; {hint}")


def read_override(override: str, kind: type) -> SourceSettings:
    """What one `section.key=value` says: a text, without the quotes around it if there are any; null; or YAML, where
    the setting is none of text, number and truth value. Raises `InputError` naming the setting."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, _, text = (part.strip() for part in override.partition("="))
    setting, value = _setting(key, settings_of(kind)), None
    if setting is None and key not in sections_of(kind):
        value = text  # of an unknown setting, so that this is what is told
    elif setting is not None and setting.kind in SCALARS:
        value = _scalar(text, setting)
        if value is None and not setting.nullable:
            example = f"; for that word itself: {shlex.quote(f'{key}=' + json.dumps(text))}"
            raise InputError(
                f"{key} is {text or 'nothing'}; it must be {setting}{example if setting.kind is str else ''}"
            )
    else:
        try:
            with suppress(ValueError):  # which allows characters that YAML does not
                value = json.loads(text)
            if not isinstance(value, (str, list, dict)):
                value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
            example = f", as in {shlex.quote(f'{key}={EXAMPLES[key]}')}" if key in EXAMPLES else ""
            problem = getattr(error, "problem", None) or first_line(error)
            raise InputError(
                f"{key} is {scrubbed(shown(text))}, which cannot be read as YAML ({problem}); "
                f"give a complete value{example}"
            ) from None
    values: Any = value
    for part in reversed(key.split(".", 2)):
        values = {part: values}
    return SourceSettings("", values)


def _scalar(text: str, setting: Setting) -> str | None:
    """A text without its quotes, if it stands in quotes; None for null, and for nothing where that is allowed."""
    import yaml

    if text in NULLS or (not text and (setting.nullable or setting.kind is not str)):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        for read in (json.loads, yaml.safe_load):  # JSON first, which allows characters that YAML does not
            try:
                value = read(text)
            except (ValueError, yaml.YAMLError):
                continue
            if isinstance(value, str):
                return value
    return text


# --------------------------------------------------------------------------------------------------- both


def merge(config: Any, given: SourceSettings, kind: type) -> None:
    """Put what was given on top of an OmegaConf config. Raises `InputError`, with the config half changed."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    settings, sections = settings_of(kind), sections_of(kind)
    for name, value in given.values.items():
        if name in sections and not isinstance(value, dict):
            main = next((key for key in ("preset", "path") if key in sections[name]), None)
            hint = f"; did you mean {name}.{main}?" if main else ""
            raise InputError(f"{given.place(name)}{name} must be a mapping of {', '.join(sections[name])}{hint}")
    for name in OFF_OF:
        value = _get(given.values, name)
        if isinstance(value, str) and value.lower() in OFF:
            _put(given.values, name, "off")
    for name, setting in settings.items():
        value = _get(given.values, name)
        wrong = list if setting.kind is dict else (list, dict)
        if setting.kind is not object and isinstance(value, wrong):
            raise InputError(f"{given.place(name)}{name} is {shown(value)}; it must be {setting}")
    for name, value in _leaves(given.values):
        if isinstance(value, str) and "${" in value:
            raise InputError(
                f"{given.place(name)}{name} holds ${{…}}, which is not filled in, since it may stand for a secret; "
                "write the value itself"
            )
        setting = _setting(name, settings)
        if setting and setting.kind is str and value is not None and not isinstance(value, str):
            raise InputError(
                f"{given.place(name)}{name} is {shown(value)} to YAML; it must be {setting}: put it in quotes"
            )
        if value == "???":  # OmegaConf's sign of a value that is missing
            raise InputError(f"{given.place(name)}{name} is ???, which cannot be a value; write another")
    try:
        config.merge_with(OmegaConf.create(given.values))
        OmegaConf.to_object(config)
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        raise InputError(f"{given.place(key)}{_unknown(key, settings, sections)}") from None
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        setting = _setting(key, settings)
        if setting is None or setting.kind is object:
            raise InputError(f"{given.place(key)}{key}: {first_line(error)}") from None
        raise InputError(f"{given.place(key)}{key} is {shown(_get(given.values, key))}; it must be {setting}") from None


def shown(value: Any) -> str:
    """A value as errors show it, in one line and not too long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def first_line(error: Exception) -> str:
    return " ".join(str(error).splitlines()[:1]) or type(error).__name__


def _setting(name: str, settings: Mapping[str, Setting]) -> Setting | None:
    """The setting of that name, if there is one; a column's is a text."""
    return Setting(str, False) if name.startswith(f"{COLUMNS}.") else settings.get(name)


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in mappings and lists, and the mappings' keys, under the dotted name of the setting it is in."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        name = path if isinstance(values, list) else f"{path}.{key}" if path else str(key)
        if isinstance(key, str):
            yield name, key
        if isinstance(value, (dict, list)):
            yield from _leaves(value, name)
        else:
            yield name, value


def _get(values: Any, name: str) -> Any:
    for part in name.split(".", 2):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Set what is under a dotted name, if its mapping is there."""
    *path, last = name.split(".", 2)
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values[last] = value


def _unknown(key: str, settings: Mapping[str, Setting], sections: Mapping[str, Any]) -> str:
    if SECRET_NAME.search(key):
        return f"there is no setting {key}; credentials come from the environment, never from a config"
    known = [*settings, *sections]
    section, _, last = key.rpartition(".")
    last_parts = {name: name.rpartition(".")[2] for name in known}
    # A key in the wrong section is nearer by its last part, and one that lacks a word by those that it has.
    same = [name for name in known if last_parts[name] == last]
    longer = [
        name
        for name in known
        if {*last.split("_")} < {*last_parts[name].split("_")} and (not section or name.startswith(f"{section}."))
    ]
    near = same or longer or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near[:2])}?" if near else f"; there are: {', '.join(known)}"
    return f"there is no setting {key}{hint}"
