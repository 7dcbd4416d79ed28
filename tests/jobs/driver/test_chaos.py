"""A run that loses workers, a node, its storage and its driver ends with the images of a quiet one."""

import collections
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.open_storage import open_storage
from cluster.storage import S3Options
from jobs.dataset.keys import FAILURES, METADATA, shards_with
from tests.command import flashu
from tests.conftest import LIGHT
from tests.s3_server import (  # noqa: F401 - fixtures
    DROP,
    INTERNAL_ERROR,
    LOSE_ANSWER,
    UNAVAILABLE,
    bucket,
    fault_proxy,
    s3_environment,
    s3_server,
)

ROOT = Path(__file__).parents[3]
PROMPTS, SHARD = 80, 4
SETTINGS = (
    "default",
    "flashu.preset=off",
    "sampling.num_inference_steps=2",
    "sampling.size=64",
    "sampling.batch_size=2",
    f"manifest.shard_size={SHARD}",
    "cluster.workers=2",
    "cluster.lease_timeout_s=8",
    "storage.path_style=true",
)
RAISES, HANGS = 17, 8  # rows


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    prompts = [f"a picture of {row} things" for row in range(PROMPTS)]
    prompts[RAISES] += " RAISES"
    prompts[HANGS] += " HANGS"
    table = pa.table(
        {
            "prompt_id": [f"p{row:03d}" for row in range(PROMPTS)],
            "prompt": prompts,
            "num_images": pa.array([2 if row % 10 == 0 else 1 for row in range(PROMPTS)], pa.int32()),
        }
    )
    file = tmp_path_factory.mktemp("manifest") / "prompts.parquet"
    pq.write_table(table, file)
    return file


@contextlib.contextmanager
def ray_cluster():
    """A head, where the driver is, and another node, of one CPU each. Ray's processes inherit the environment as it is
    here."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1} | LIGHT)
    try:
        cluster.add_node(num_cpus=1, include_log_monitor=False)
        yield cluster
    finally:
        cluster.shutdown()


def settings(manifest, output, *more):
    return [*SETTINGS, f"manifest.path={manifest}", f"output.path={output}", *more]


def start(manifest, output, log, *more):
    """In a process of its own, which may be killed."""
    command = [sys.executable, "-m", "tests.jobs.driver.chaos_run", *settings(manifest, output, *more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=log.open("a"), stderr=subprocess.STDOUT)


def workers_of(cluster):
    """Process ids of the cluster's workers that hold a model."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in raylets and (folder / "cmdline").read_bytes().startswith(b"ray::Worker.run"):
                found.append(int(folder.name))
    return found


def committed(storage):
    return set(shards_with(storage, METADATA))


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def images_of(storage):
    """{(prompt id, index): sha256} of the metadata; each is checked against the bytes that are there."""
    found = {}
    for shard in committed(storage):
        rows = pq.read_table(io.BytesIO(storage.get(f"metadata/shard-{shard:05d}.parquet"))).to_pylist()
        data = pq.read_table(io.BytesIO(storage.get(f"data/shard-{shard:05d}.parquet"))).to_pylist() if rows else []
        assert [row["sha256"] for row in rows] == [row["sha256"] for row in data]
        for row, image in zip(rows, data, strict=True):
            key = row["prompt_id"], row["image_index"]
            assert key not in found, "no image is there twice"
            found[key] = image["image"]["bytes"]
    return found


def starts(log, since=0.0):
    lines = [line.split() for line in log.read_text().splitlines()]
    return collections.Counter(int(shard) for at, shard in lines if float(at) >= since)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_loses_everything_ends_with_the_images_of_a_quiet_one(
    manifest, fault_proxy, bucket, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    chaos = tmp_path / "chaos"
    chaos.mkdir()
    monkeypatch.setenv("CHAOS", str(chaos))
    events, hung = chaos / "starts", chaos / "hung"
    from tests.jobs.driver.chaos_run import ChaosWork  # which wants to know its folder

    monkeypatch.setattr("jobs.driver.run.GenerationWork", ChaosWork)
    with ray_cluster() as cluster:
        # A quiet run, to this machine's disk. No prompt hangs in it; the one that raises does.
        (chaos / "seconds").write_text("0")
        hung.touch()
        place, quiet = f"cluster.address={cluster.address}", open_storage(str(tmp_path / "quiet"))
        done = flashu("run", *settings(manifest, quiet.url, place, "cluster.workers=1"))
        assert done.code == 1, done
        expected = images_of(quiet)
        assert len(expected) == PROMPTS + PROMPTS // 10 - 1
        assert set(starts(events).values()) == {1}

        # The same over S3, with everything that can go wrong.
        (chaos / "seconds").write_text("0.6")
        hung.unlink()
        events.unlink()
        log = tmp_path / "run.log"
        storage = open_storage(f"{bucket.url}/run", S3Options(bucket.endpoint_url, path_style=True))
        more = (place, f"storage.endpoint_url={fault_proxy.endpoint_url}")
        driver = start(manifest, storage.url, log, *more)
        wait_for(lambda: "no sign of life" in log.read_text())
        assert hung.exists()
        lost = 1 + disturb(cluster, storage, fault_proxy)
        driver.kill()
        driver.wait()
        wait_for(lambda: not workers_of(cluster))
        lost += 2
        before, killed_at = committed(storage), time.time()
        assert 2 <= len(before) < PROMPTS // SHARD

        (chaos / "seconds").write_text("0")
        again = flashu("run", *settings(manifest, storage.url, *more, "cluster.workers=1"))
        assert again.code == 1, again

    assert images_of(storage) == expected, "every good prompt has its images, byte for byte"
    failures = [
        row
        for shard in shards_with(storage, FAILURES)
        for row in pq.read_table(io.BytesIO(storage.get(f"failures/shard-{shard:05d}.parquet"))).to_pylist()
    ]
    assert [(row["prompt_id"], row["error"]) for row in failures] == [
        (f"p{RAISES:03d}", "ArithmeticError: this prompt cannot be drawn")
    ]
    assert not before & starts(events, since=killed_at).keys(), "what was committed was not made again"
    extra = sum(starts(events).values()) - PROMPTS // SHARD
    assert extra <= 2 * lost, "each loss costs the leases in flight: one running and one being written"
    told = log.read_text() + again.out + again.err
    assert f"Failed: row {RAISES}" in told
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in told


def disturb(cluster, storage, proxy):
    """Kill a worker, break S3 for a while, and exchange a node. Returns how many workers were lost."""
    chance = random.Random(0)
    wait_for(lambda: len(committed(storage)) >= 2)
    wait_for(lambda: len(workers_of(cluster)) == 2)
    os.kill(chance.choice(workers_of(cluster)), signal.SIGKILL)
    proxy.inject(INTERNAL_ERROR, UNAVAILABLE, DROP, LOSE_ANSWER, probability=0.5)
    time.sleep(6)
    proxy.heal()
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    cluster.add_node(num_cpus=1, include_log_monitor=False)
    count = len(committed(storage))
    wait_for(lambda: len(committed(storage)) > count)
    return 2
