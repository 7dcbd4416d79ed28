"""What `flashu run` refuses: at once, in one line, before Ray is started or anything is written."""

import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import jobs.driver.run  # noqa: F401 - not to be imported on a test's time
from tests.command import assert_refused, contents, flashu


@pytest.fixture
def refused(tmp_path):
    """Start a run that must be refused, at once, before Ray starts, and with nothing written."""

    def start(*overrides, told=()):
        before = contents(tmp_path)
        began = time.monotonic()
        outcome = flashu(
            "run", "default", "flashu.preset=off", "manifest.path=demo", f"output.path={tmp_path / 'run'}",
            "cluster.address=local", *overrides,
        )  # fmt: skip
        assert time.monotonic() - began < 5
        assert not ray.is_initialized()
        assert_refused(outcome, *told)
        assert contents(tmp_path) == before
        assert not (tmp_path / "run").is_dir()
        return outcome

    return start


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sampling.num_image=2", "did you mean sampling.num_images?"),
        ("sampling.seed=x", "sampling.seed is 'x'; it must be a whole number"),
        ("output.format=zip", "output.format is 'zip'; choose one of: parquet, webdataset, files"),
        ("output.image_format=gif", "output.image_format is 'gif'; choose one of: png, jpeg, webp"),
        ("output.quality=0", "output.quality is 0; it goes from 1 to 100"),
        ("output.path=", "output.path"),
        ("manifest.path=''", "manifest.path is not set"),
        ("flashu.preset=fastest", "no FlashU preset 'fastest'; there are: paper-1.5b"),
        ("flashu.r_p=0.5", "flashu.preset is off, so r_p would do nothing"),
        ("model.dtype=fp8", "model.dtype fp8 is not supported; choose one of: bfloat16, float32, float8"),
        ("model.compile=fast", "model.compile is 'fast'; choose one of: auto, off, max, graphs"),
        ("sampling.size=100", "next to 100 are 96 and 112"),
        ("sampling.size=big", "sampling.size big: give pixels per side (432), or WIDTHxHEIGHT (512x384)"),
        ("sampling.batch_size=many", "sampling.batch_size is 'many'; it must be a whole number, at least 1, or auto"),
        ("sampling.batch_size=0", "sampling.batch_size is 0"),
        ("sampling.num_inference_steps=1", "1"),
        ("sampling.num_images=0", "sampling.num_images is 0; it must be a whole number, at least 1"),
        ("sampling.guidance_scale=-1", "sampling.guidance_scale is -1.0"),
        ("sampling.guidance_scale=nan", "sampling.guidance_scale is nan"),
        ("cluster.workers=0", "cluster.workers is 0; it must be a whole number, at least 1"),
        ("cluster.workers=two", "cluster.workers is 'two'"),
        ("cluster.cpus_per_worker=0", "cluster.cpus_per_worker is 0.0; it must be a finite number, above 0"),
        ("cluster.max_attempts=0", "cluster.max_attempts is 0"),
        ("manifest.shard_size=0", "shard size must be at least 1, not 0"),
        ("manifest.limit=0", "limit must be at least 1, not 0"),
        ("manifest.columns.prompt=caption", "no column caption"),
        ("output.path=ftp://host/run", "storage of the kind ftp:// is not known"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(refused, override, told):
    refused(override, told=[told])


def test_steps_that_do_not_fit_a_preset_are_told_with_what_to_change(refused):
    told = (
        "sampling.num_inference_steps is 10, and flashu.preset=embedded is made for 35: tau is 11; it counts full steps"
    )
    refused(
        "flashu.preset=embedded", "sampling.num_inference_steps=10", told=[told, "Set flashu.tau or flashu.schedule"]
    )


def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(refused):
    for override in ("storage.aws_secret_access_key=hunter2", "storage.endpoint_url=http://me:hunter2@host"):
        assert "hunter2" not in refused(override, told=["credentials", "environment"]).err


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"prompt_id": ["a", "b"]}, "no column prompt; there are prompt_id"),
        ({"prompt": ["a", "b"]}, "no column prompt_id; there are prompt"),
        ({"prompt_id": ["a", "b", "a"], "prompt": ["x", "y", "z"]}, "'a' at "),
        ({"prompt_id": ["a", None], "prompt": ["x", "y"]}, "1 of 2 rows have no prompt_id (null)"),
        ({"prompt_id": pa.array([], "string"), "prompt": pa.array([], "string")}, "holds no rows"),
        ({"prompt_id": [1, 2], "prompt": ["x", "y"]}, "prompt_id is int64, and must be string"),
        ({"prompt_id": ["a"], "prompt": ["x"], "sha256": ["y"]}, "the job writes columns of its own named sha256"),
    ],
    ids=["no prompt", "no id", "duplicate id", "null id", "no rows", "ids are numbers", "reserved name"],
)
def test_a_manifest_that_cannot_be_used_is_refused(refused, tmp_path, columns, told):
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    refused(f"manifest.path={tmp_path / 'm.parquet'}", told=[told, tmp_path / "m.parquet"])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (None, "m.parquet"),
        (b"prompt\na fox\n", "m.parquet is not a Parquet file, or was cut short"),
        (b"", "m.parquet is not a Parquet file, or was cut short"),
        ("half", "m.parquet is not a Parquet file, or was cut short"),
    ],
    ids=["missing", "text", "empty", "cut short"],
)
def test_a_file_that_is_no_manifest_is_refused(refused, tmp_path, data, told):
    file = tmp_path / "m.parquet"
    if data == "half":
        pq.write_table(pa.table({"prompt_id": ["a"], "prompt": ["a fox"]}), file)
        data = file.read_bytes()[: file.stat().st_size // 2]
    if data is not None:
        file.write_bytes(data)
    refused(f"manifest.path={file}", told=[told])


@pytest.mark.parametrize("output", ["run", "run/deeper"])
def test_an_output_with_a_file_in_the_way_is_refused(refused, tmp_path, output):
    (tmp_path / "run").write_text("mine")
    told = [f"cannot read {tmp_path / output}/run.json", "a part of this path is a file"]
    refused(f"output.path={tmp_path / output}", told=told)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_in_a_folder_that_may_not_be_written_is_refused(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(f"output.path={tmp_path / 'locked' / 'run'}", told=[tmp_path / "locked", "change its permissions"])


def test_shards_without_a_run_are_refused(refused, tmp_path):
    (tmp_path / "other" / "metadata").mkdir(parents=True)
    (tmp_path / "other" / "metadata" / "shard-00000.parquet").write_bytes(b"")
    refused(f"output.path={tmp_path / 'other'}", told=["holds shards but no run.json; give another output.path"])


def test_a_bucket_that_is_not_there_is_refused(refused, bucket):
    refused(f"output.path={bucket.url}-not/run", f"storage.endpoint_url={bucket.endpoint_url}",
            "storage.path_style=true", told=[f"{bucket.url}-not"])  # fmt: skip
