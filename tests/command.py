"""Commands in this process, for tests: what they print, how they exit, and what they leave in a folder."""

import io
import runpy
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import typer

import jobs.cli.main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def flashu(*arguments):
    """The command, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.cli.main, "app", _command())
        return _run(jobs.cli.main.main, "flashu", arguments)


def benchmark(script, *arguments):
    """A script of benchmarks/, run in this process."""
    return _run(lambda: runpy.run_path(str(BENCHMARKS / script), run_name="__main__"), script, arguments)


@cache
def _command():
    """What typer makes of the app, at each call of it: here once, as that takes longer than most refusals do."""
    return typer.main.get_command(jobs.cli.main.app)


def _run(program, name, arguments):
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        try:
            program()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
            if isinstance(code, str):  # Python prints it, and exits with 1
                err.write(f"{code}\n")
                code = 1
    return Outcome(code, out.getvalue(), err.getvalue())


def assert_refused(outcome, *told):
    """That a user was told in one line what to mend."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("flashu: "), outcome
    assert outcome.err.count("\n") == 1, outcome
    assert outcome.out == "", outcome
    for text in told:
        assert str(text) in outcome.err, outcome.err


def contents(folder):
    """{path: bytes} of all files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def names(folder):
    return sorted(file.name for file in folder.iterdir())
