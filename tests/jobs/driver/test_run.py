"""`flashu run` from end to end, on a real Ray: what it writes, and how it goes on after a stop.

Most runs share one Ray cluster on this machine; one that is stopped by Ctrl-C is a process that starts its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.dataset.records import ATTEMPT
from jobs.worker.batch_maker import BatchMaker
from jobs.worker.shard import GenerationWork
from tests.command import Outcome, assert_refused, contents, flashu, names
from tests.jobs.driver.failing_work import CannotSetUp, NoModel

QUICK = ("flashu.preset=off", "sampling.num_inference_steps=2", "sampling.size=64")
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAINTHEENVIRONMENT",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/in-the-environment",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaD-in-the-environment",
    "HF_TOKEN": "hf_InTheEnvironmentInTheEnvironment",
}
GOOD = ["plain", "../../x", "a/b", "y" * 5000, "🦊", "two\nlines", "<b>id</b>"]
PROMPTS = ["a fox", "a hen", "<script>alert('hi')</script>", "a dog", "🦊", "one\ntwo", "an owl " * 300]
ROWS = {
    "prompt_id": [*GOOD, "empty", "raises"],
    "prompt": [*PROMPTS, " ", "a cat"],
    "num_images": [2, 1, 1, 1, 1, 1, 1, 1, 1],
    "source": [f"web {row}" for row in range(9)],
}


def rows_of(run, folder="metadata"):
    return [row for file in sorted((run / folder).iterdir()) for row in pq.read_table(file).to_pylist()]


@dataclass
class Run:
    """A run that was made, and the command that made it."""

    output: Path
    command: tuple[str, ...]
    outcome: Outcome | None = None

    def copied_to(self, folder):
        """A copy that a test may change."""
        shutil.copytree(self.output, folder)
        return Run(folder, (*self.command, f"output.path={folder}"))

    def start(self, *more):
        return flashu(*self.command, *more)


# -------------------------------------------------------------------------------------------- one run, looked into


class Raises(BatchMaker):
    def submit(self, prompts, *settings):
        if any("cat" in prompt for prompt in prompts):
            raise ArithmeticError("no cats")
        return super().submit(prompts, *settings)


class RaisesAtWork(GenerationWork):
    def setup(self, place):
        identity = super().setup(place)
        self.maker = Raises(**vars(self.maker))
        return identity


@pytest.fixture(scope="module")
def hostile(cluster, tmp_path_factory):
    """A run over hostile ids and prompts, one of them empty and one that raises, with secrets around it."""
    folder = tmp_path_factory.mktemp("hostile")
    pq.write_table(pa.table(ROWS), folder / "m.parquet")
    settings = (f"manifest.path={folder / 'm.parquet'}", "manifest.shard_size=3", "cluster.workers=1")
    run = Run(folder / "run", ("run", "default", *QUICK, *settings, cluster, f"output.path={folder / 'run'}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.driver.run.GenerationWork", RaisesAtWork)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        run.outcome = run.start()
    return run


def test_every_good_prompt_has_its_images_and_columns(hostile):
    rows = rows_of(hostile.output)
    wanted = [(name, index) for name in GOOD for index in range(2 if name == "plain" else 1)]
    assert [(row["prompt_id"], row["image_index"]) for row in rows] == wanted
    assert [row["source"] for row in rows] == [f"web {max(0, row - 1)}" for row in range(8)]
    assert [row["truncated"] for row in rows] == [False] * 7 + [True]
    assert len({row["sha256"] for row in rows}) == 8
    assert {row["worker"] for row in rows} == {"worker-0000"}


def test_failed_prompts_are_told_and_make_the_exit_code_1(hostile):
    assert hostile.outcome.code == 1
    assert hostile.outcome.err == ""
    assert 'Failed: row 7, "empty": prompt is empty' in hostile.outcome.out
    assert "complete: 8 images, 2 failed prompts" in hostile.outcome.out
    errors = "prompt is empty", "ArithmeticError: no cats"
    failures = [
        {"prompt_id": name, "prompt": prompt, "error": error, "shard": 2, "row": row}
        for row, (name, prompt, error) in enumerate(zip(("empty", "raises"), (" ", "a cat"), errors, strict=True), 7)
    ]
    assert rows_of(hostile.output, "failures") == failures


def test_a_prompt_that_raises_leaves_its_traceback(hostile):
    (file,) = (hostile.output / "logs").iterdir()
    assert f'Failed: row 8, "raises": ArithmeticError: no cats (traceback: {file})' in hostile.outcome.out
    assert 'raise ArithmeticError("no cats")' in file.read_text(encoding="utf-8")


def test_the_output_opens_as_a_dataset(hostile, tmp_path):
    import datasets

    dataset = datasets.load_dataset(str(hostile.output), split="train", cache_dir=str(tmp_path))
    assert len(dataset) == 8
    assert dataset[0]["image"].size == (64, 64)
    assert {"prompt_id", "prompt", "seed", "source", "quality_entropy"} < set(dataset.column_names)


def test_no_id_leads_out_of_the_runs_folder(hostile):
    assert names(hostile.output.parent) == ["m.parquet", "run"]
    assert names(hostile.output) == [
        "README.md", "data", "failures", "logs", "metadata", "report.html", "run.json", "summary.json",
    ]  # fmt: skip
    shards = [f"shard-0000{shard}.parquet" for shard in range(3)]
    assert names(hostile.output / "data") == names(hostile.output / "metadata") == shards
    assert all(re.fullmatch(r"[A-Za-z0-9~_-]+\.png", row["file_name"]) for row in rows_of(hostile.output))


def test_prompts_are_text_in_the_report_and_never_markup(hostile):
    page = (hostile.output / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    assert "<b>id</b>" not in page
    assert "prompt is empty" in page


def test_no_secret_is_written_or_printed(hostile):
    written = contents(hostile.output)
    for secret in SECRETS.values():
        assert secret not in hostile.outcome.out + hostile.outcome.err
        assert [name for name, data in written.items() if secret.encode() in data] == []


def test_a_second_start_does_nothing_and_says_the_same(hostile):
    before = contents(hostile.output)
    start = time.monotonic()
    again = hostile.start()
    assert time.monotonic() - start < 5
    assert again.code == 1
    assert "3 shards committed" in again.out
    assert 'Failed: row 7, "empty": prompt is empty' in again.out
    assert "worker" not in again.out
    after = contents(hostile.output)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"summary.json", "report.html", "README.md"}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sampling.seed=1", "sampling.seed was 0 and is 1"),
        ("output.format=files", "output.format was 'parquet' and is 'files'"),
        ("manifest.shard_size=4", "manifest.shard_size was 3 and is 4"),
        ("flashu.preset=fast", "flashu.preset was 'off' and is 'fast'"),
        ("manifest.path=demo", "the manifest's fingerprint was "),
    ],
)
def test_another_run_in_the_same_folder_is_refused_with_what_differs(hostile, override, told):
    before = contents(hostile.output)
    steps = ["sampling.num_inference_steps=null"] if "preset" in override else []
    outcome = hostile.start(override, *steps)
    assert_refused(outcome, "holds another run", told)
    assert contents(hostile.output) == before


def test_what_may_differ_between_two_starts_may(hostile):
    outcome = hostile.start("sampling.batch_size=1", "cluster.workers=2", "cluster.hedge=false")
    assert "3 shards committed" in outcome.out


def test_what_is_missing_is_made_again_alike_and_failures_are_tried_again_when_asked(hostile, tmp_path):
    run = hostile.copied_to(tmp_path / "run")
    missing = "metadata/shard-00000.parquet"
    (run.output / missing).unlink()
    before = contents(run.output)
    assert "interrupted" in flashu("status", run.output).out.splitlines()[0]
    outcome = run.start("output.retry_failures=true")
    assert outcome.code == 1
    assert "1 shards committed" in outcome.out  # 0 is missing, 2 has failures
    after = contents(run.output)
    assert {name for name in after if after[name] != before.get(name) and name.startswith("data/")} == {
        "data/shard-00002.parquet"
    }
    attempt = ATTEMPT.names
    made, wanted = (pq.read_table(folder / missing).drop(attempt) for folder in (run.output, hostile.output))
    assert made.replace_schema_metadata(None) == wanted.replace_schema_metadata(None)
    assert rows_of(run.output, "failures") == rows_of(hostile.output, "failures")[:1], "the other was made"
    assert rows_of(run.output)[-1]["prompt_id"] == "raises"
    kept, again = "metadata/shard-00001.parquet", "metadata/shard-00002.parquet"
    assert after[kept] == before[kept]
    assert after[again] != before[again]


def test_what_the_driver_does_not_see_is_told_and_a_worker_decides(cluster, tmp_path, monkeypatch):
    """So is a size that takes far more than the model's own, before any worker starts.

    That a worker's set-up ends so where a folder is missing is in test_shard.py.
    """
    monkeypatch.setattr("jobs.driver.run.GenerationWork", NoModel)
    missing = "model.tokenizer: no such checkpoint folder: /no/words"
    settings = (*QUICK, "sampling.size=512", "model.tokenizer=/no/words", "cluster.workers=1", cluster)
    outcome = flashu("run", "demo", *settings, f"output.path={tmp_path}")
    lines = [line.partition(" ")[2] for line in outcome.out.splitlines()]
    [unseen] = [line for line in lines if line.startswith(f"Warning: {missing}")]
    [large] = [line for line in lines if line.startswith("Warning: an image of 512x512 has 64 times the pixels")]
    started = next(index for index, line in enumerate(lines) if line.startswith("Ray cluster"))
    assert max(lines.index(unseen), lines.index(large)) < started
    assert any(line == "The run cannot go on: there is no model here" for line in lines), "at once, in its own words"
    assert outcome.code == 1


def test_a_model_that_raises_on_a_worker_leaves_its_traceback_in_the_runs_folder(
    cluster, s3_environment, tmp_path, monkeypatch
):
    """`s3_environment` is the environment of workers, with their secret."""
    monkeypatch.setattr("jobs.driver.run.GenerationWork", CannotSetUp)
    monkeypatch.setattr("cluster.pool.FAILED_STARTS", 1)  # there are seconds between them
    output = tmp_path / "run"
    settings = ("default", *QUICK, "manifest.path=demo", "manifest.limit=2", "cluster.workers=1")
    outcome = flashu("run", *settings, cluster, f"output.path={output}")
    assert outcome.code == 1
    line = "RuntimeError: no kernel image for s3://***@host/ with ***"
    (file,) = (output / "logs").iterdir()
    for told in ("Lost worker-0000: ", "The run cannot go on: no worker can be set up; the last one: "):
        assert f"{told}{line} (traceback: {file})" in outcome.out, outcome.out
    text = file.read_text(encoding="utf-8")
    assert 'raise RuntimeError(f"no kernel image for' in text
    assert re.search(r"worker-000\d  set-up", text)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text + outcome.out
    assert "failed" in flashu("status", output).out


def test_a_complete_run_needs_no_model(hostile, tmp_path):
    run = hostile.copied_to(tmp_path / "run")
    described = json.loads((run.output / "run.json").read_text())
    described["config"]["model"]["path"] = "/no/model"
    (run.output / "run.json").write_text(json.dumps(described))
    outcome = run.start("model.path=/no/model")
    assert "3 shards committed" in outcome.out
    assert outcome.code == 1  # of the prompt that failed
    (run.output / "metadata" / "shard-00001.parquet").unlink()
    assert_refused(run.start("model.path=/no/model", "cluster.address=local"), "model.path: no such checkpoint folder")


def test_status_tells_where_a_run_stands(hostile, tmp_path):
    outcome = flashu("status", hostile.output)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == f"{hostile.output}: complete"
    assert lines[1].split() == ["shards", "3", "of", "3", "committed", "(100%),", "1", "with", "failures"]
    assert lines[3].split() == ["model", "embedded,", "FlashU", "off"]
    assert lines[4].startswith("images     8, 2 prompts failed, ")


def test_a_report_is_made_anew_from_what_is_committed(hostile, tmp_path):
    run = hostile.copied_to(tmp_path / "run")
    for name in ("report.html", "summary.json", "README.md", "metadata/shard-00000.parquet"):
        (run.output / name).unlink()
    assert flashu("status", run.output).out.startswith(f"{run.output}: running\nshards     2 of 3 committed (67%)")
    outcome = flashu("report", run.output)
    assert (outcome.code, outcome.out) == (0, f"{run.output}/report.html\n")
    assert "images     4, 2 prompts failed" in flashu("status", run.output).out
    assert "one\ntwo" in (run.output / "report.html").read_text()


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_folder_without_a_run_is_told(command, tmp_path):
    assert_refused(flashu(command, tmp_path), f"{tmp_path} holds no run (no run.json)")
    assert_refused(flashu(command, tmp_path / "nowhere"), "holds no run")
    assert not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------------------------------------------- interrupted

LONG = (
    "run", "demo", "flashu.preset=fast", "flashu.tau=1", "sampling.num_inference_steps=12",
    "sampling.size=64", "manifest.limit=24", "manifest.shard_size=2", "output.format=files",
    "output.image_format=webp",
)  # fmt: skip


@pytest.fixture(scope="module")
def quiet(cluster, tmp_path_factory):
    """A run that nothing happens to, with more workers than there is room for."""
    folder = tmp_path_factory.mktemp("quiet") / "run"
    run = Run(folder, (*LONG, cluster, "cluster.workers=5", f"output.path={folder}"))
    run.outcome = run.start()
    return run


def test_more_workers_than_there_is_room_for_is_a_warning_and_the_run_finishes(quiet):
    assert quiet.outcome.code == 0, quiet.outcome.out
    assert (
        "Warning: 5 workers of 1 CPUs each are asked for, and there is room for 2 "
        "(Ray cluster of 1 node: 2 CPUs, 0 GPUs); the others wait until nodes join"
    ) in quiet.outcome.out
    assert len({row["worker"] for row in rows_of(quiet.output)}) <= 2


def test_a_run_keeps_the_scores_that_its_workers_prune_by(quiet):
    """That the images are those of a run of one worker is shown below."""
    assert all('"r_p": 0.3' in row["flashu"] for row in rows_of(quiet.output))
    assert (quiet.output / "scores.safetensors").is_file()


def test_files_land_in_a_folder_for_each_shard(quiet):
    assert names(quiet.output / "data") == [f"{shard:05d}" for shard in range(12)]
    for shard, row in ((row // 2, one) for row, one in enumerate(rows_of(quiet.output))):
        picture = Image.open(quiet.output / "data" / f"{shard:05d}" / row["file_name"])
        assert (picture.format, picture.size) == ("WEBP", (64, 64))


class Process:
    """The command in a process of its own, which starts its own Ray, as from a terminal."""

    def __init__(self, run, log):
        self.run, self.log = run, log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs", *LONG, "cluster.address=local", "cluster.workers=1",
                 f"output.path={run}"],
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_for_shards(self, count):
        for _ in range(1200):
            if len(list(self.run.glob("metadata/shard-*"))) >= count:
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())


def test_a_run_that_was_stopped_ends_as_one_that_nothing_happened_to(quiet, cluster, tmp_path):
    """What was killed does as well: see test_chaos.py."""
    run, log = tmp_path / "run", tmp_path / "log"
    with Process(run, log) as stopped:
        stopped.wait_for_shards(2)
        assert flashu("status", run).out.startswith(f"{run}: running\n")
        os.killpg(stopped.process.pid, signal.SIGINT)  # as Ctrl-C does: Ray's own processes get it too
        assert stopped.process.wait(timeout=60) == 130, log.read_text()
    assert "Finishing the shards in flight. Ctrl-C again stops at once." in log.read_text()
    assert "What is committed stays. Run the same command again to go on." in log.read_text()
    assert "Traceback" not in log.read_text()
    assert flashu("status", run).out.startswith(f"{run}: stopped\n")
    committed = contents(run / "metadata")
    assert 2 <= len(committed) < 12

    last = flashu(*LONG, cluster, "cluster.workers=1", f"output.path={run}")
    assert last.code == 0, last
    assert f"{len(committed):,} shards committed" in last.out
    assert flashu("status", run).out.startswith(f"{run}: complete\n")
    assert contents(run / "data") == contents(quiet.output / "data")
    assert {name: data for name, data in contents(run / "metadata").items() if name in committed} == committed
    made, wanted = (
        [{name: value for name, value in row.items() if name not in ATTEMPT.names} for row in rows_of(folder)]
        for folder in (run, quiet.output)
    )
    assert made == wanted
