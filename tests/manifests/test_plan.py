"""Planning shards from footers, reading them, and what is refused before a run starts."""

import pickle
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.build import build
from manifests.errors import ManifestError
from manifests.plan import Manifest
from manifests.schema import row_problem
from tests.manifests.conftest import numbered


@pytest.fixture
def folder(write, tmp_path):
    """Four files with borders at odd places, row groups of several sizes; one is empty."""
    for name, start, count, group in (("a", 0, 137, 10), ("b", 137, 0, 5), ("c", 137, 1, 1), ("sub/d", 138, 300, 77)):
        columns = numbered(count, start, number=pa.array(range(start, start + count), pa.int32()))
        columns |= {name: pa.array(columns[name], pa.string()) for name in ("prompt_id", "prompt")}
        write(f"m/{name}.parquet", columns, row_group_size=group)
    write("m/_not/this.parquet", numbered(3))
    (tmp_path / "m/README.md").write_text("not this either")
    return str(tmp_path / "m")


@pytest.mark.parametrize("shard_size", [1, 7, 64, 137, 1000])
def test_shards_across_file_borders_are_slices_of_the_whole(folder, shard_size):
    manifest = Manifest.open(folder, shard_size=shard_size)
    read = [manifest.read(shard) for shard in range(manifest.num_shards)]
    assert [len(table) for table in read] == [len(manifest.rows(shard)) for shard in range(manifest.num_shards)]
    assert {table.schema for table in read} == {manifest.schema}
    whole = pa.concat_tables(read)
    assert whole.column("number").to_pylist() == list(range(438))
    assert whole.column("prompt_id").to_pylist() == [f"id-{row}" for row in range(438)]
    assert manifest.num_rows == 438
    assert manifest.carried == ["number"]


def test_a_limit_cuts_the_last_shard_and_keeps_the_fingerprint(folder):
    whole, some = Manifest.open(folder, shard_size=64), Manifest.open(folder, shard_size=50, limit=120)
    assert (some.num_rows, some.num_shards, some.rows(2)) == (120, 3, range(100, 120))
    assert len(some.read(2)) == 20
    assert some.fingerprint == whole.fingerprint
    assert Manifest.open(folder, shard_size=64, limit=10_000).num_rows == 438


def test_batches_hold_every_row_once_in_order(folder):
    manifest = Manifest.open(folder, shard_size=64, limit=300)
    numbers = [(row, table.column("number").to_pylist()) for row, table in manifest.batches(size=50)]
    assert [number for _, batch in numbers for number in batch] == list(range(300))
    assert all(row == batch[0] for row, batch in numbers)


def test_a_manifest_travels_to_another_process_as_a_few_bytes(folder):
    manifest = Manifest.open(folder, shard_size=10)
    sent = pickle.dumps(manifest)
    assert pickle.loads(sent).read(13).equals(manifest.read(13))
    assert len(sent) < 3000


def test_planning_three_thousand_files_takes_seconds(write, tmp_path):
    first = write("many/00000.parquet", numbered(5))
    data = Path(first).read_bytes()
    for index in range(1, 3000):
        (tmp_path / f"many/{index:05d}.parquet").write_bytes(data)
    start = time.perf_counter()
    manifest = Manifest.open(str(tmp_path / "many"), shard_size=7)
    assert time.perf_counter() - start < 10
    assert (manifest.num_rows, manifest.num_shards) == (15_000, 2143)
    assert len(manifest.read(2142)) == 6


def test_a_row_group_of_more_than_a_million_rows_is_read(write):
    count = 1_100_000
    ids = pa.array(np.arange(count)).cast(pa.string())
    path = write("big.parquet", {"prompt_id": ids, "prompt": ids}, row_group_size=count)
    manifest = Manifest.open(path, shard_size=64)
    assert manifest.num_row_groups == 1
    assert manifest.read(17_000).column("prompt_id")[5].as_py() == str(17_000 * 64 + 5)
    manifest.check_ids()


def test_globs_and_single_files(folder):
    assert Manifest.open(f"{folder}/[ac].parquet", shard_size=1).num_rows == 138
    assert Manifest.open(f"{folder}/*.parquet", shard_size=1).num_rows == 138
    assert Manifest.open(f"{folder}/**/*.parquet", shard_size=1).num_rows == 438
    assert Manifest.open(f"{folder}/?.parquet", shard_size=1).files == ("a.parquet", "b.parquet", "c.parquet")
    assert Manifest.open(f"{folder}/sub/d.parquet", shard_size=1).files == ("d.parquet",)


def test_the_fingerprint_follows_content_names_and_columns(write, tmp_path):
    path = write("a.parquet", numbered(5, other=["x"] * 5))
    first = Manifest.open(path, shard_size=2).fingerprint
    assert Manifest.open(path, shard_size=3).fingerprint == first
    assert Manifest.open(path, shard_size=2, columns={"mine": "other"}).fingerprint != first
    write("a.parquet", numbered(5, start=1, other=["x"] * 5))
    assert Manifest.open(path, shard_size=2).fingerprint != first


def test_a_file_that_changes_under_a_run_is_told(write):
    path = write("a.parquet", numbered(50))
    manifest = pickle.loads(pickle.dumps(Manifest.open(path, shard_size=10)))
    write("a.parquet", numbered(50, start=1))
    with pytest.raises(ManifestError, match="changed since"):
        manifest.read(0)


def test_types_that_mean_the_same_are_read_as_ours(write):
    table = pa.table(
        {
            "caption": pa.array(["a", "b"], pa.large_string()),
            "key": pa.array(["1", "2"]).dictionary_encode(),
            "negative_prompt": pa.array(["n", None]),
            "seed": pa.array([2**64 - 1, 5], pa.uint64()),
            "num_images": pa.array([2**32, 4], pa.int64()),
            "guidance_scale": pa.array([5, None], pa.int16()),
            "tags": pa.array([["x"], []]),
        }
    )
    path = write("a.parquet", table)
    manifest = Manifest.open(path, shard_size=2, columns={"prompt_id": "key", "prompt": "caption", "labels": "tags"})
    bad, good = manifest.read(0).to_pylist()
    assert good == {
        "prompt": "b",
        "prompt_id": "2",
        "negative_prompt": None,
        "seed": 5,
        "num_images": 4,
        "guidance_scale": None,
        "labels": [],
    }
    assert manifest.carried == ["labels"]
    assert "seed must be between 0 and 2^63 - 1" in row_problem(bad)
    assert "num_images must be between 1 and 10,000" in row_problem({**bad, "seed": None})
    assert row_problem(good) is None
    manifest.check_ids()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt_id": ""}, "prompt_id is missing"),
        ({"seed": -1}, "seed must be"),
        ({"num_images": 0}, "num_images must be between 1 and 10,000, not 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number from 0, not nan"),
        ({"guidance_scale": -0.5}, "not -0.5"),
    ],
)
def test_a_value_that_cannot_be_used_is_a_problem_of_its_row(change, problem):
    row = {"prompt_id": "a", "prompt": "b", "seed": 2**63 - 1, "num_images": 1, "guidance_scale": 0.0}
    assert row_problem(row) is None
    assert problem in row_problem({**row, **change})


def test_text_that_is_not_utf8_spoils_its_row_alone(write):
    broken = pa.array([b"fine", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    path = write("a.parquet", {"prompt_id": ["a", "b"], "prompt": broken, "note": broken})
    rows = Manifest.open(path, shard_size=2).read(0).to_pylist()
    assert [row_problem(row) for row in rows] == [None, "prompt is missing, or not valid UTF-8"]
    assert [row["note"] for row in rows] == ["fine", "\ufffd\ufffd"]


def refused(path, **options):
    with pytest.raises(ManifestError) as error:
        Manifest.open(str(path), **{"shard_size": 4, **options})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_paths_that_hold_no_manifest_are_refused(tmp_path, write):
    assert "nowhere does not exist" in refused(tmp_path / "nowhere")
    assert "matches no file" in refused(tmp_path / "*.parquet")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/a.csv").write_text("prompt\nx\n")
    assert "no file that ends in .parquet or .pq; it holds a.csv" in refused(tmp_path / "csv")
    assert "a.csv is not a Parquet file, or was cut short" in refused(tmp_path / "csv/a.csv")
    path = write("m/a.parquet", numbered(100))
    data = Path(path).read_bytes()
    for size in (0, 3, 500, len(data) - 1):
        (tmp_path / "m/b.parquet").write_bytes(data[:size])
        assert re.search(r"m/b.parquet is not a Parquet file, or was cut short", refused(tmp_path / "m"))
    (tmp_path / "m/b.parquet").write_bytes(data[:-200] + b"x" * 192 + data[-8:])
    assert "m/b.parquet cannot be read" in refused(tmp_path / "m")
    assert "is not a valid glob" in refused(tmp_path / "[z-a].parquet")
    assert "gs://" in refused("gs://bucket/x")
    assert "secret" not in refused("s3://key:secret@bucket/x")
    assert "secret" not in refused("s3://bucket/x", endpoint_url="http://key:secret@localhost:1")
    assert "secret" not in refused("s3://bucket/x", endpoint_url="key:secret@localhost:1")


def test_columns_that_cannot_be_used_are_refused(tmp_path, write):
    text = refused(write("a.parquet", {"id": ["a"], "caption": ["b"]}))
    assert "no column prompt_id; there are id, caption" in text
    assert "manifest.columns" in text
    assert "flashu manifest build" in text
    assert "no column prompt;" in refused(write("a.parquet", {"prompt_id": ["a"], "caption": ["b"]}))
    assert "no column text, named in" in refused(write("a.parquet", numbered(1)), columns={"prompt": "text"})
    both = write("a.parquet", numbered(1, caption=["x"]))
    assert "caption cannot be named prompt" in refused(both, columns={"prompt": "caption"})
    assert Manifest.open(both, shard_size=1, columns={"prompt": "caption", "old": "prompt"}).read(0).to_pylist() == [
        {"prompt_id": "id-0", "old": "prompt 0", "prompt": "x"}
    ]
    assert "prompt_id is int64, and must be string" in refused(
        write("a.parquet", {"prompt_id": [1], "prompt": ["b"]}),
    )
    assert "seed is double, and must be int64" in refused(write("a.parquet", numbered(1, seed=[1.0])))
    assert "named sha256" in refused(write("a.parquet", numbered(1, sha256=["x"])))
    assert "--column new=quality_score" in refused(write("a.parquet", numbered(1, quality_score=[1.0])))
    Manifest.open(write("a.parquet", numbered(1, sha256=["x"])), shard_size=1, columns={"source_sha256": "sha256"})
    write("m/a.parquet", numbered(1, score=[1]))
    write("m/b.parquet", numbered(1, start=1, score=["1"]))
    text = refused(tmp_path / "m")
    assert re.search(r"score is int64 in .*m/a.parquet, but string in .*m/b.parquet", text)
    write("m/b.parquet", numbered(1, start=1))
    assert "missing in" in refused(tmp_path / "m")


def test_rows_that_cannot_be_used_are_refused(write):
    empty = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string())]).empty_table()
    assert "holds no rows" in refused(write("a.parquet", empty))
    path = write("a.parquet", {"prompt_id": ["a", None, None], "prompt": ["b", "c", "d"]})
    assert "2 of 3 rows have no prompt_id" in refused(path)
    assert "1 of 2 rows have no prompt " in refused(
        write("a.parquet", {"prompt_id": ["a", "b"], "prompt": [None, "c"]})
    )
    assert "at least 1, not -3" in refused(path, limit=-3)
    assert "at least 1, not 0" in refused(path, shard_size=0)


def test_ids_that_occur_twice_are_named_with_their_rows(write, tmp_path):
    write("m/a.parquet", numbered(50))
    write("m/b.parquet", numbered(50, start=40))
    manifest = Manifest.open(str(tmp_path / "m"), shard_size=8)
    assert not manifest.ids_checked
    with pytest.raises(ManifestError, match="10 rows have a prompt_id that an earlier row has") as error:
        manifest.check_ids()
    assert "'id-40' at row 40 (a.parquet) and row 50 (b.parquet)" in str(error.value)
    Manifest.open(str(tmp_path / "m"), shard_size=8, limit=50).check_ids()
    path = write("c.parquet", {"prompt_id": ["a", None], "prompt": ["b", "c"]}, write_statistics=False)
    with pytest.raises(ManifestError, match=r"c.parquet, row 1: prompt_id is null"):
        Manifest.open(path, shard_size=8).check_ids()


def test_what_build_wrote_needs_no_second_look(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"prompt {row}" for row in range(100)))
    folder = str(tmp_path / "m")
    build([str(tmp_path / "a.txt")], folder, rows_per_file=30)
    assert Manifest.open(folder, shard_size=8).ids_checked
    assert Manifest.open(f"{folder}/part-0000[01].parquet", shard_size=8).ids_checked
    pq.write_table(pa.concat_tables([pq.read_table(f"{folder}/part-00000.parquet")] * 2), tmp_path / "copied.parquet")
    assert not Manifest.open(str(tmp_path / "copied.parquet"), shard_size=8).ids_checked
    (tmp_path / "m/part-00002.parquet").rename(tmp_path / "away.parquet")
    assert "holds 3 of the 4 files" in refused(folder)
    (tmp_path / "m/part-00001.copy.parquet").write_bytes((tmp_path / "m/part-00001.parquet").read_bytes())
    assert not Manifest.open(folder, shard_size=8).ids_checked
