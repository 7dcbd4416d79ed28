"""The checkpoint cache: one fetch per node, whole copies only, and a word when it cannot be."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.checkpoint_cache import local_copy
from cluster.open_storage import open_storage
from cluster.storage import S3Options, StorageError
from tests.s3_server import UNAVAILABLE, Answer

FILES = {
    "config.json": b"{}",
    "model.safetensors": os.urandom(300_000),
    "vae/model.safetensors": os.urandom(200_000),
    "tokenizer/tokenizer.json": b"[]",
}
LOAD = """
import sys
from cluster.checkpoint_cache import local_copy
from cluster.storage import S3Options
print(local_copy(sys.argv[1], S3Options(endpoint_url=sys.argv[2]), sys.argv[3]))
"""


@pytest.fixture
def checkpoint(bucket):
    url = f"{bucket.url}/models/show-o2"
    storage = open_storage(url, S3Options(endpoint_url=bucket.endpoint_url))
    for key, data in FILES.items():
        storage.put(key, data)
    return url


@pytest.fixture
def through_proxy(fault_proxy):
    return S3Options(endpoint_url=fault_proxy.endpoint_url)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def start_loading(url, options, cache):
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, url, options.endpoint_url, str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_three_workers_of_a_node_fetch_each_object_once(checkpoint, through_proxy, fault_proxy, tmp_path):
    workers = [start_loading(checkpoint, through_proxy, tmp_path) for _ in range(3)]
    answers = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 3, answers
    folders = {answer.strip() for answer, _ in answers}
    assert len(folders) == 1
    assert contents(folders.pop()) == FILES
    assert len([request for request in fault_proxy.requests("GET") if "list-type" not in request.query]) == len(FILES)


def test_a_copy_is_used_again_and_a_changed_source_fetched_anew(checkpoint, through_proxy, fault_proxy, tmp_path):
    first = local_copy(checkpoint, through_proxy, tmp_path)
    fault_proxy.log.clear()
    assert local_copy(checkpoint + "/", through_proxy, tmp_path) == first
    assert len(fault_proxy.log) == 1  # the listing

    open_storage(checkpoint, through_proxy).put("config.json", b'{"a": 1}')
    second = local_copy(checkpoint, through_proxy, tmp_path)
    assert contents(second) == {**FILES, "config.json": b'{"a": 1}'}
    assert contents(first) == FILES


def test_a_single_object_keeps_its_name(checkpoint, through_proxy, tmp_path):
    path = Path(local_copy(f"{checkpoint}/vae/model.safetensors", through_proxy, tmp_path))
    assert path.name == "model.safetensors"
    assert path.read_bytes() == FILES["vae/model.safetensors"]


def test_what_is_not_in_s3_is_left_to_others():
    for path in ("showlab/show-o2-1.5B", "./models/show-o2", "embedded"):
        assert local_copy(path) == path


def test_a_worker_killed_halfway_leaves_nothing_that_counts(checkpoint, through_proxy, fault_proxy, tmp_path):
    fault_proxy.inject(UNAVAILABLE, methods=["GET", "HEAD"], path_end="vae/model.safetensors")
    worker = start_loading(checkpoint, through_proxy, tmp_path)
    while not list(tmp_path.glob("s3/*.partial/model.safetensors")):
        assert worker.poll() is None, worker.communicate()
        time.sleep(0.02)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert not [path for path in tmp_path.glob("s3/*") if path.suffix == ""]

    fault_proxy.heal()
    assert contents(local_copy(checkpoint, through_proxy, tmp_path)) == FILES


def test_passing_faults_are_sat_out(checkpoint, through_proxy, fault_proxy, tmp_path):
    fault_proxy.inject(UNAVAILABLE, probability=0.3)
    assert contents(local_copy(checkpoint, through_proxy, tmp_path)) == FILES


def test_a_missing_checkpoint_is_named(checkpoint, through_proxy, tmp_path):
    with pytest.raises(StorageError, match="show-o3: there is neither a folder nor an object of that name"):
        local_copy(checkpoint.replace("show-o2", "show-o3"), through_proxy, tmp_path)


def test_a_forbidden_checkpoint_is_named(checkpoint, through_proxy, fault_proxy, tmp_path):
    fault_proxy.inject(Answer(403, "AccessDenied"))
    with pytest.raises(StorageError, match=r"cannot list .*show-o2: these credentials may not do that"):
        local_copy(checkpoint, through_proxy, tmp_path)


def test_a_disk_that_is_too_small_is_named_before_anything_is_fetched(
    checkpoint, through_proxy, fault_proxy, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(StorageError, match=r"0.0 GB left; make room, or set FLASHU_CACHE"):
        local_copy(checkpoint, through_proxy, tmp_path)
    assert len(fault_proxy.log) == 1


def test_a_cache_that_cannot_be_made_is_named(checkpoint, through_proxy, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FLASHU_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot write .*file.s3: a part of this path is a file"):
        local_copy(checkpoint, through_proxy)


def test_a_bucket_cannot_name_files_outside_the_cache(bucket, through_proxy, fault_proxy, s3_server, tmp_path):
    s3_server.client.put_object(Bucket=bucket.name, Key="evil/a/../../../x", Body=b"x")
    with pytest.raises(StorageError, match="which is no name of a file"):
        local_copy(f"{bucket.url}/evil", through_proxy, tmp_path)
