"""The pages of the reference that are made from the code: that they are as the code has them, and leave nothing out."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import write_reference

from jobs.scoring.benchmark import BenchmarkConfig
from jobs.scoring.geneval import GenevalConfig
from jobs.scoring.understanding import UnderstandingConfig
from jobs.settings.config import RunConfig
from jobs.settings.config_text import settings_of
from tests.command import flashu

ROOT = Path(__file__).parents[2]
PAGES = write_reference.pages()
SETTINGS, COMMAND_LINE = PAGES[write_reference.SETTINGS], PAGES[write_reference.COMMAND_LINE]


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_the_page_is_as_the_code_has_it(file):
    assert file.read_text(encoding="utf-8") == PAGES[file], "run make docs, and commit what it writes"


@pytest.mark.parametrize("kind", [RunConfig, BenchmarkConfig, GenevalConfig, UnderstandingConfig])
def test_every_setting_has_an_entry_with_words(kind):
    entries = dict(re.findall(r"^- \*\*`([\w.]+)`\*\* · .*\\\n  (.+)$", SETTINGS, flags=re.MULTILINE))
    assert set(settings_of(kind)) <= entries.keys()


def test_comments_are_read_in_yaml_and_in_python():
    read = write_reference.written_beside
    yaml = 'a:   # of a\n  one: "x"   # words,\n           # and more\n  two: 2\nb:\n  one: []  # other words\n'
    assert read(yaml) == {"a": "of a", "a.one": "words, and more", "b.one": "other words"}
    python = "@dataclass\nclass A:\n    one: str = ''  # words  # noqa: N815 - why\n    two: int = 2  # noqa: N815\n"
    assert read(python, "a") == {"a.one": "words"}


def test_a_setting_of_which_nothing_is_written_is_an_error():
    with pytest.raises(ValueError, match=r"sampling\.seed has no comment that says what it is"):
        write_reference.setting_list(RunConfig, ["sampling.seed"], {})


def test_every_variable_that_the_code_reads_is_there():
    """Those that it only sets for Ray are not a user's."""
    read = {name for package in ("flashu", "cluster", "manifests", "jobs") for name in _variables(ROOT / package)}
    assert read - {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"} == set(write_reference.ENVIRONMENT)


def _variables(folder):
    """The names of `os.environ.get(NAME)` and its like, of those that are written out or a module's constant."""
    for file in folder.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "os.environ" not in text:
            continue
        module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr=_), args=[name, *_]):
                    pass
                case ast.Subscript(value=ast.Attribute(attr="environ"), slice=name):
                    pass
                case _:
                    continue
            value = name.value if isinstance(name, ast.Constant) else getattr(module, name.id, None)
            if value:
                yield value


def test_every_command_is_there_with_the_options_that_its_help_shows(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    sections = re.split(r"^#+ (flashu .*)\n", COMMAND_LINE, flags=re.MULTILINE)
    commands = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert len(commands) > 25
    for path, text in commands.items():
        shown = flashu(*path.split()[1:], "--help").out
        of_help = set(re.findall(r"^│ [* ]*(--[a-z-]+)", shown, flags=re.MULTILINE)) - {"--help"}
        assert {*re.findall(r"^- \*\*`(--[a-z-]+)`", text, flags=re.MULTILINE)} == of_help, path
        for below in re.findall(r"^│ ([a-z]+) ", shown.partition("Commands")[2], flags=re.MULTILINE):
            assert f"{path} {below}" in commands
