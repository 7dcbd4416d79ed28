"""Runs that are started as jobs of a Ray cluster of several nodes, over S3 and on a disk that the nodes share."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.authentication import MODE, TOKEN, environment
from cluster.open_storage import open_storage
from cluster.storage import S3Options
from flashu.errors import InputError
from jobs.driver.submit import settings_of, submit_run
from jobs.settings.config import RunConfig, read_config
from tests.command import contents
from tests.conftest import LIGHT
from tests.s3_server import bucket, s3_environment, s3_server  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
QUICK = ("flashu.preset=off", "sampling.num_inference_steps=2", "sampling.size=64", "manifest.shard_size=3")


@pytest.fixture
def dashboard(s3_environment, monkeypatch):  # noqa: F811
    """The dashboard's address of a cluster: a head without CPUs, and a node with two."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port = free_port()
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    with environment({MODE: "token", TOKEN: "only-for-this-test"}):  # which it asks for
        cluster = Cluster(
            initialize_head=True, head_node_args=LIGHT | head | {"dashboard_agent_listen_port": free_port()}
        )
        cluster.add_node(num_cpus=2, dashboard_agent_listen_port=free_port(), include_log_monitor=False)
        wait_for_agents(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
        cluster.shutdown()


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def wait_for_agents(address):
    """Until the cluster takes jobs, which it does a while after its dashboard is up."""
    from ray.job_submission import JobSubmissionClient

    client, deadline = JobSubmissionClient(address), time.monotonic() + 120
    while True:
        try:
            client.submit_job(entrypoint="true")
            return
        except RuntimeError:
            assert time.monotonic() < deadline, "the cluster takes no jobs"
            time.sleep(1)


@pytest.fixture
def manifest(tmp_path):
    """Seven prompts, two of which ask for four images."""
    rows = {
        "prompt_id": [f"p{row}" for row in range(7)],
        "prompt": [f"a picture of {row} things" for row in range(7)],
        "num_images": pa.array([4, None, None, 4, None, None, None], pa.int32()),
        "source": [f"line {row}" for row in range(7)],
    }
    pq.write_table(pa.table(rows), tmp_path / "prompts.parquet")
    return tmp_path / "prompts.parquet"


def read_metadata(bucket, stem):  # noqa: F811
    client = boto3.client("s3", endpoint_url=bucket.endpoint_url)
    data = client.get_object(Bucket=bucket.name, Key=f"{stem}.parquet")["Body"].read()
    return pq.read_table(io.BytesIO(data)).to_pylist()


def contents_of(bucket):  # noqa: F811
    storage = open_storage(bucket.url, S3Options(bucket.endpoint_url, path_style=True))
    return {key: storage.get(key) for key in storage.list()}


@pytest.mark.slow
def test_a_run_submitted_to_a_cluster_writes_the_same_images_to_s3_and_to_disk(dashboard, manifest, bucket, tmp_path):  # noqa: F811
    def call(*command, without=()):
        environment = {name: value for name, value in os.environ.items() if name not in without}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "only-for-this-test" not in done.stdout + done.stderr
        return done.stdout

    output = f"{bucket.url}/runs/first"
    s3 = (f"storage.endpoint_url={bucket.endpoint_url}", "storage.path_style=true")
    text = call(
        BIN / "flashu", "submit", "default", *QUICK, *s3, f"manifest.path={manifest}", f"output.path={output}",
        "cluster.workers=1", "--address", dashboard, without=[MODE],
    )  # fmt: skip
    assert "complete: 13 images, 0 failed prompts" in text, "the job's log is followed to its end"
    assert "Ray cluster of 2 nodes" in text

    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"manifest": {"path": "prompts.parquet"}, "output": {"path": str(tmp_path / "run")}}))
    call(
        BIN / "ray", "job", "submit", "--address", dashboard, "--working-dir", ".", "--",
        "flashu", "run", "config.yaml", *QUICK, "cluster.workers=1",
    )  # fmt: skip

    local = datasets.load_dataset(str(tmp_path / "run"), split="train", cache_dir=str(tmp_path / "cache"))
    assert local.num_rows == 13
    assert [image.size for image in local["image"]] == [(64, 64)] * 13
    assert local["source"][:5] == ["line 0"] * 4 + ["line 1"]
    assert local["image_index"][:5] == [0, 1, 2, 3, 0]
    rows = [row for shard in range(3) for row in read_metadata(bucket, f"runs/first/metadata/shard-0000{shard}")]
    remote = [row["sha256"] for row in rows]
    assert remote == local["sha256"]
    written = [*contents(tmp_path / "run").values(), *contents_of(bucket).values()]
    assert len(written) > 2 * 3
    assert not [data for data in written if b"only-for-this-test" in data]


def test_a_submitted_command_holds_what_differs_from_the_defaults():
    given = ("sampling.seed=3", "sampling.negative_prompt='a \"b\" = c'", "flashu.schedule=[[24, 7.5], [25, 9.0]]")
    config = read_config("default", given)
    assert read_config("default", settings_of(config)) == config
    assert len(settings_of(config)) == 3


@pytest.mark.parametrize("preset", ["auto", "embedded", "paper-1.5b"])
def test_a_submitted_command_keeps_the_preset(preset):
    config = read_config("default", ["model.path=showlab/show-o2-1.5B", f"flashu.preset={preset}"])
    assert read_config("default", settings_of(config)) == config


@pytest.mark.parametrize("name", ["output", "manifest"])
def test_a_path_that_means_nothing_on_the_cluster_is_refused(name):
    config = RunConfig()
    config.manifest.path, config.output.path = "/data/prompts", "/data/run"
    getattr(config, name).path = "here/there"
    with pytest.raises(InputError, match=f"{name}.path here/there is relative"):
        submit_run(config, "http://127.0.0.1:1", None, True, print)


def test_a_cluster_that_cannot_be_reached_is_told_in_a_line():
    config = RunConfig()
    config.manifest.path, config.output.path = "/data/prompts", "/data/run"
    with pytest.raises(InputError, match=r"could not be submitted to http://127\.0\.0\.1:1: "):
        submit_run(config, "http://127.0.0.1:1", None, True, print)
