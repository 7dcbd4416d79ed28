"""The `flashu` command in this process, for tests: what it prints, how it exits, and what it leaves in a folder."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from jobs.cli import main

LIGHT = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
"""For a head of `ray.cluster_utils.Cluster`: fewer processes, which take seconds to start."""


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def flashu(*arguments):
    """The command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["flashu", *map(str, arguments)])
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(SystemExit) as exit_:
            main()
    return Outcome(exit_.value.code or 0, out.getvalue(), err.getvalue())


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
