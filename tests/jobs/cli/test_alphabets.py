"""Runs whose manifest, folder, prompts, ids and columns are in many scripts, on terminals that know them and others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.open_storage import open_storage
from cluster.storage import S3Options
from jobs.dataset.keys import METADATA, metadata_key, shards_with
from tests.command import flashu

ROOT = Path(__file__).parents[3]
NAMES = ["Grüße, Österreich", "Привет мир", "مرحبا بالعالم", "你好世界", "नमस्ते दुनिया", "🦊🎨", "e\u0301 is not é"]
QUICK = ("flashu.preset=off", "sampling.num_inference_steps=2", "manifest.shard_size=4", "cluster.workers=1")
LOCALES = {
    "utf-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C"},
    "ascii": {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},  # a terminal of fewer letters
}
CASES = [("disk", "C", ("webdataset", "jpeg")), ("s3", "ascii", ("parquet", "png"))]


def command(environment, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, encoding="utf-8", timeout=200,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts") / " ".join(NAMES[:5])
    folder.mkdir()
    table = {"prompt_id": NAMES, "prompt": [f"{name}: a red circle" for name in NAMES], "ключ 键": NAMES}
    pq.write_table(pa.table(table), folder / f"{NAMES[2]} {NAMES[3]}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("place", "locale", "layout"), CASES)
def test_a_run_in_many_scripts_is_complete_and_every_reader_reads_it(folder, place, locale, layout, bucket, cluster):
    import datasets

    environment, s3 = LOCALES[locale], S3Options(bucket.endpoint_url, path_style=True)
    (manifest,) = folder.glob("*.parquet")
    output = folder / f"out {locale} ü" if place == "disk" else f"{bucket.url}/{NAMES[1]}/{NAMES[4]} {locale}"
    settings = () if place == "disk" else (f"storage.endpoint_url={bucket.endpoint_url}", "storage.path_style=true")
    run = ("run", "default", *QUICK, *settings, f"manifest.path={manifest}", f"output.path={output}",
           f"output.format={layout[0]}", f"output.image_format={layout[1]}", f"sampling.negative_prompt={NAMES[0]}",
           "cluster.address=local" if locale == "C" else cluster)  # fmt: skip
    done = command(environment, *run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert flashu(*run).code == 0, "it goes on, with nothing left to do"

    options = () if place == "disk" else ("--endpoint-url", bucket.endpoint_url, "--path-style")
    assert "complete" in command(environment, "status", output, *options).stdout
    kept = command(environment, "filter", output, f"{output} kept", "--where", f'prompt_id != "{NAMES[1]}"', *options)
    assert kept.returncode == 0, kept.stderr
    assert flashu("report", output, *options).code == 0

    storage, rows = open_storage(str(output), s3), []
    for shard in sorted(shards_with(storage, METADATA)):
        with storage.open(metadata_key(shard)) as file:
            rows += pq.read_table(file).to_pylist()
    assert [row["prompt_id"] for row in rows] == [row["ключ 键"] for row in rows] == NAMES
    assert json.loads(storage.get("run.json"))["config"]["sampling"]["negative_prompt"] == NAMES[0]
    report = storage.get("report.html").decode("utf-8")
    assert all(name in report for name in NAMES)
    assert json.loads(open_storage(f"{output} kept", s3).get("summary.json"))["images"]["count"] == len(NAMES) - 1
    if place == "disk":
        loaded = datasets.load_dataset(str(output), split="train", cache_dir=str(folder / "cache"))
        assert [row["seed"] for row in loaded["json"]] == [row["seed"] for row in rows]
        assert {image.format for image in loaded["jpg"]} == {"JPEG"}


def test_what_is_no_text_at_all_is_told(folder):
    named = os.fsencode(folder) + b"/\xff.parquet"
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"jobs", b"run", b"default", b"manifest.path=" + named],
        cwd=ROOT, env=os.environ | LOCALES["utf-8"], capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert rb"\udcff.parquet is no text in this terminal's encoding; set its locale, or rename the file" in done.stderr
