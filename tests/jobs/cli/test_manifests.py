"""`flashu manifest`: what a user sees, and the exit codes."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli.manifests import app
from manifests.errors import ManifestError
from tests.manifests.conftest import HOSTILE


@pytest.fixture
def manifest(monkeypatch, tmp_path):
    """The command, run in `tmp_path`: its exit code and what it printed. Errors for a user are raised."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a red circle\n\ntwo blue squares\n" + "long " * 30)

    def run(*arguments):
        done = CliRunner().invoke(app, list(map(str, arguments)))
        if isinstance(done.exception, ManifestError):
            raise done.exception
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.stdout

    return run


def test_build_check_and_show_a_manifest(manifest):
    code, out = manifest("build", "a.txt", "-o", "m")
    assert code == 0
    assert "m: 3 rows in 1 file; columns prompt_id, prompt" in out
    assert "3 prompt ids made" in out
    code, out = manifest("check", "m", "--shard-size", 2)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["rows", "3"] in lines
    assert ["shards", "of", "2", "2"] in lines
    assert ["0-24", "2", "█" * 40] in lines
    assert ["100-199", "1", "█" * 20] in lines
    assert lines[-1] == ["no", "problems"]
    code, out = manifest("show", "m", "-n", 1)
    assert code == 0
    assert "a red circle" in out
    assert "two blue squares" not in out


def test_columns_and_duplicates_are_options(manifest, tmp_path):
    (tmp_path / "a.csv").write_text("caption,seed\nx,1\ny,2\nx,1\n")
    with pytest.raises(ManifestError, match=r"'x' at a.csv:2 and a.csv:4"):
        manifest("build", "a.csv", "-o", "m", "--column", "prompt=caption")
    code, out = manifest("build", "a.csv", "-o", "m", "--column", "prompt=caption", "--duplicates", "drop")
    assert code == 0
    assert "1 duplicates dropped" in out
    for options, problem in (
        (["--column", "prompt"], "must be OURS=THEIRS"),
        (["--column", "prompt=a", "--column", "prompt=b"], "prompt was given before"),
        (["--duplicates", "keep"], "there are report and drop"),
    ):
        with pytest.raises(ManifestError, match=problem):
            manifest("build", "a.csv", "-o", "m2", *options)


def test_check_tells_every_problem_with_its_row_and_exits_with_1(manifest):
    ids = [f"id-{row}" for row in range(40)]
    ids[7], ids[30] = None, "id-3"
    seeds = [5] * 40
    seeds[12] = -1
    prompts = ["p"] * 39 + [None]
    pq.write_table(pa.table({"prompt_id": ids, "prompt": prompts, "seed": seeds}), "bad.parquet")
    code, out = manifest("check", "bad.parquet")
    assert code == 1
    assert "4 problems" in out
    for row, problem in ((7, "prompt_id is missing"), (12, "seed must be"), (39, "prompt is missing")):
        assert f"row {row}: {problem}" in out
    assert "row 30: prompt_id 'id-3' is that of" in out
    pq.write_table(pa.table({"prompt_id": ids, "prompt": [" "] * 40}), "worse.parquet")
    code, out = manifest("check", "worse.parquet")
    assert out.count("prompt is empty") == 20
    assert "and 21 more" in out


def test_show_cannot_be_made_to_write_to_the_terminal(manifest):
    pq.write_table(pa.table({"prompt_id": HOSTILE, "prompt": HOSTILE}), "a.parquet")
    code, out = manifest("show", "a.parquet")
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[bold]" in out


def test_dpg_says_when_it_is_not_the_official_set(manifest, tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps([{"prompt": "x", "prompt_file_name": "a"}]))
    code, out = manifest("dpg", "meta.json", "-o", "d.parquet")
    assert code == 0
    assert "d.parquet: 1 rows in 1 file; columns prompt_id, prompt, num_images" in out
    assert "official benchmark has 1,065 prompts" in out


def test_the_help_imports_nothing_heavy():
    heavy = "{'pyarrow', 'numpy', 'rich.table', 'torch', 'ray'} & set(sys.modules)"
    code = f"import sys, jobs.cli.manifests; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
