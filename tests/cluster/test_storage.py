"""Storage: what a put, a listing and a read promise, on disk and in S3, and what the user is told when it fails."""

import errno
import os
import pickle
import random
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import s3_storage
from cluster.open_storage import open_storage
from cluster.storage import NotFound, S3Options, StorageError
from tests.s3_server import (
    BREAK_OFF,
    DROP,
    INTERNAL_ERROR,
    LOSE_ANSWER,
    UNAVAILABLE,
    Answer,
    moto_server,
)

HOSTILE = ["a b", "ümlaut-🦊", "50%25", "a+b&c=d", "q?x#y", "<b>'\"", "..dots", "x" * 200]


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    if request.param == "local":
        return open_storage(str(tmp_path / "run"))
    bucket = request.getfixturevalue("bucket")
    return open_storage(f"{bucket.url}/runs/one", S3Options(endpoint_url=bucket.endpoint_url))


@pytest.fixture
def through_proxy(bucket, fault_proxy):
    return open_storage(f"{bucket.url}/run", S3Options(endpoint_url=fault_proxy.endpoint_url))


def test_an_object_reads_back_and_a_second_put_replaces_it(storage):
    storage.put("data/one.bin", b"first")
    storage.put("data/one.bin", b"second")
    assert storage.get("data/one.bin") == b"second"
    assert storage.exists("data/one.bin")


def test_put_new_keeps_the_first(storage):
    assert storage.put_new("lease", b"mine")
    assert not storage.put_new("lease", b"theirs")
    assert storage.get("lease") == b"mine"


def test_of_many_writers_of_a_new_object_one_wins(storage, s3_server):
    if storage.url.startswith("s3://") and s3_server.is_moto:
        pytest.skip("moto looks and writes in two steps, which two requests may both pass")
    won = []
    threads = [
        threading.Thread(target=lambda n=n: won.append(n) if storage.put_new("lease", b"%d" % n) else None)
        for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.get("lease") == b"%d" % won[0]


def test_a_missing_object_is_named(storage):
    for read in (storage.get, storage.open):
        with pytest.raises(NotFound, match=r"cannot read .*nothing/here.bin: it does not exist"):
            read("nothing/here.bin")
    assert not storage.exists("nothing/here.bin")
    storage.delete("nothing/here.bin")


def test_a_listing_holds_every_key_under_its_prefix(storage):
    keys = {f"metadata/shard-{n:05}.parquet" for n in range(12)} | {"data/00001/x-0.png", "run.json"}
    for key in keys:
        storage.put(key, b"")
    assert set(storage.list()) == keys
    assert len(list(storage.list("metadata/"))) == 12
    assert set(storage.list("metadata/shard-0001")) == {"metadata/shard-00010.parquet", "metadata/shard-00011.parquet"}
    assert list(storage.list("nowhere/")) == []
    storage.delete("run.json")
    assert set(storage.list()) == keys - {"run.json"}


def test_names_with_any_characters_survive(storage):
    for name in HOSTILE:
        storage.put(f"data/{name}", name.encode())
    assert set(storage.list("data/")) == {f"data/{name}" for name in HOSTILE}
    for name in HOSTILE:
        assert storage.get(f"data/{name}").decode() == name


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a\0b", "data/.tmp-x"])
def test_a_key_that_leaves_its_folder_is_a_bug(storage, key):
    for use in (storage.get, storage.delete, storage.exists, lambda key: storage.put(key, b"")):
        with pytest.raises(ValueError, match="cannot be a storage key"):
            use(key)


def test_an_open_file_reads_any_part(storage):
    data = random.Random(0).randbytes(3_000_000)
    storage.put("big.bin", data)
    with storage.open("big.bin") as file:
        assert file.seek(-8, os.SEEK_END) == len(data) - 8
        assert file.read() == data[-8:]
        assert file.read(1) == b""
        file.seek(1_234_567)
        assert file.read(100_000) == data[1_234_567:1_334_567]
        file.seek(0)
        assert file.read() == data


def test_an_empty_object_opens(storage):
    storage.put("empty", b"")
    assert storage.open("empty").read() == b""


def test_a_parquet_footer_is_read_without_the_rows(through_proxy, fault_proxy):
    buffer = pa.BufferOutputStream()
    rows = pa.table({"image": [os.urandom(100_000) for _ in range(60)]})
    pq.write_table(rows, buffer, row_group_size=10, compression="none")
    through_proxy.put("data/shard.parquet", buffer.getvalue().to_pybytes())
    with through_proxy.open("data/shard.parquet") as file:
        parquet = pq.ParquetFile(file)
        assert parquet.num_row_groups == 6
        assert len(fault_proxy.requests("GET")) <= 2
        assert parquet.read_row_group(3)["image"] == rows["image"].slice(30, 10)


def test_storage_can_be_sent_to_another_process(storage):
    storage.put("key", b"value")
    assert pickle.loads(pickle.dumps(storage)).get("key") == b"value"


def test_check_passes_and_leaves_nothing(storage):
    storage.check()
    assert list(storage.list()) == []


# On disk


def test_half_written_files_are_never_seen(tmp_path):
    storage = open_storage(str(tmp_path))
    code = "import os; os.fsync = lambda _: os.kill(os.getpid(), 9); from cluster.open_storage import open_storage"
    killed = subprocess.run([sys.executable, "-c", f"{code}; open_storage({str(tmp_path)!r}).put('data/x', b'half')"])
    assert killed.returncode == -9
    assert len(os.listdir(tmp_path / "data")) == 1
    assert list(storage.list()) == []
    assert not storage.exists("data/x")


def test_files_follow_the_umask(tmp_path):
    storage = open_storage(f"file://{tmp_path}/with%20space")
    before = os.umask(0o027)
    try:
        storage.put("a", b"")
        storage.put_new("b", b"")
    finally:
        os.umask(before)
    assert [(tmp_path / "with space" / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o640]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = open_storage(str(tmp_path))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*run.json: the disk is full \(No space left on device\)"):
        storage.put("run.json", b"{}")
    assert os.listdir(tmp_path) == []


def test_a_disk_without_hard_links_still_keeps_the_first(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    storage = open_storage(str(tmp_path))
    assert storage.put_new("lease", b"mine")
    assert not storage.put_new("lease", b"theirs")
    assert storage.get("lease") == b"mine"


def test_check_names_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for place in ("file", "file/deeper"):
        with pytest.raises(StorageError, match="a part of this path is a file, where a folder is needed"):
            open_storage(str(tmp_path / place)).check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_names_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="this user may not do that there"):
        open_storage(str(tmp_path / "run")).check()


# In S3


def test_a_large_object_goes_up_in_parts_and_arrives_whole(through_proxy, fault_proxy, monkeypatch):
    monkeypatch.setattr(s3_storage, "MULTIPART_SIZE", 20 * 2**20)
    data = random.Random(1).randbytes(22 * 2**20)
    fault_proxy.inject(DROP, UNAVAILABLE, times=2, methods=["PUT"])
    through_proxy.put("data/large.tar", data)
    assert len({request.query for request in fault_proxy.requests("PUT", "large.tar")}) == 5  # parts of 5 MiB
    assert through_proxy.get("data/large.tar") == data


def test_objects_carry_their_content_type(bucket, s3_server):
    storage = open_storage(bucket.url, S3Options(endpoint_url=bucket.endpoint_url))
    for key, kind in {
        "report.html": "text/html; charset=utf-8",
        "x.png": "image/png",
        "x.parquet": "application/vnd.apache.parquet",
        "x.nonsense": "application/octet-stream",
    }.items():
        storage.put(key, b"x")
        assert s3_server.client.head_object(Bucket=bucket.name, Key=key)["ContentType"] == kind


@pytest.mark.parametrize("fault", [INTERNAL_ERROR, UNAVAILABLE, DROP, LOSE_ANSWER, BREAK_OFF])
def test_a_passing_fault_stops_no_operation(through_proxy, fault_proxy, fault):
    data = random.Random(2).randbytes(300_000)
    for operate in (
        lambda: through_proxy.put("a", data),
        lambda: through_proxy.get("a"),
        lambda: through_proxy.open("a").read(),
        lambda: list(through_proxy.list()),
        lambda: through_proxy.exists("a"),
        lambda: through_proxy.delete("b"),
    ):
        fault_proxy.inject(fault, times=1)
        operate()
    fault_proxy.heal()
    assert through_proxy.get("a") == data


def test_putting_new_knows_its_own_object_when_the_answer_was_lost(through_proxy, fault_proxy):
    fault_proxy.inject(LOSE_ANSWER, times=1, methods=["PUT"])
    assert through_proxy.put_new("lease", b"mine")
    assert not through_proxy.put_new("lease", b"mine")


def test_a_storm_of_faults_is_sat_out(through_proxy, fault_proxy):
    fault_proxy.inject(INTERNAL_ERROR, UNAVAILABLE, DROP, LOSE_ANSWER, BREAK_OFF, probability=0.3)
    objects = {f"data/{n}": random.Random(n).randbytes(50_000) for n in range(12)}
    for key, data in objects.items():
        through_proxy.put(key, data)
    assert {key: through_proxy.get(key) for key in through_proxy.list()} == objects


def test_a_reader_never_mixes_two_versions(through_proxy):
    through_proxy.put("a", b"1" * 3_000_000)
    with through_proxy.open("a") as file:
        file.read(10)
        through_proxy.put("a", b"2" * 3_000_000)
        file.seek(2_500_000)
        with pytest.raises(StorageError, match="replaced while it was read"):
            file.read(10)


def test_check_names_a_missing_bucket(bucket):
    storage = open_storage("s3://flashu-no-such-bucket/run", S3Options(endpoint_url=bucket.endpoint_url))
    with pytest.raises(StorageError, match=r"flashu-no-such-bucket/.*: there is no such bucket at http://"):
        storage.check()


def test_check_names_a_server_that_is_not_there(s3_environment):
    storage = open_storage("s3://bucket/run", S3Options(endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StorageError, match=r"http://127.0.0.1:9 cannot be reached; check storage.endpoint_url"):
        storage.check()


def test_check_names_missing_credentials(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        open_storage(bucket.url, S3Options(endpoint_url=bucket.endpoint_url)).check()


def test_check_names_a_profile_that_does_not_exist(bucket, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="the profile that AWS_PROFILE names does not exist"):
        open_storage(bucket.url, S3Options(endpoint_url=bucket.endpoint_url)).check()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Answer(403, "AccessDenied"), "these credentials may not do that"),
        (Answer(403, "SignatureDoesNotMatch"), "check AWS_SECRET_ACCESS_KEY"),
        (Answer(400, "ExpiredToken"), "the credentials have expired"),
        (Answer(507, "XMinioStorageFull"), "the store is full"),
        (
            Answer(400, "AuthorizationHeaderMalformed", "<Region>eu-west-3</Region>"),
            "another region; set storage.region to eu-west-3",
        ),
    ],
)
def test_check_says_what_the_server_refused(through_proxy, fault_proxy, fault, told):
    fault_proxy.inject(fault, methods=["PUT", "HEAD"])
    with pytest.raises(StorageError, match=told) as caught:
        through_proxy.check()
    assert os.environ["AWS_ACCESS_KEY_ID"] not in str(caught.value)
    assert caught.value.__suppress_context__


def test_check_names_credentials_that_the_server_does_not_know(s3_environment):
    with moto_server(INITIAL_NO_AUTH_ACTION_COUNT="0") as strict:
        storage = open_storage("s3://bucket/run", S3Options(endpoint_url=strict.endpoint_url))
        with pytest.raises(StorageError, match="does not know these credentials") as caught:
            storage.check()
    assert os.environ["AWS_ACCESS_KEY_ID"] not in str(caught.value)


# Places that cannot be used, refused before anything is touched


@pytest.mark.parametrize(
    "url", ["s3://AKIA123:topsecret@bucket/run", "s3://AKIA123:top/secret@bucket/run", "s3://topsecret@bucket"]
)
def test_a_url_with_credentials_is_refused_and_not_repeated(url):
    with pytest.raises(StorageError, match="an s3:// URL holds credentials") as caught:
        open_storage(url)
    assert "secret" not in str(caught.value).lower().replace("aws_secret_access_key", "")


def test_an_endpoint_with_credentials_is_refused_and_not_repeated():
    with pytest.raises(StorageError, match="endpoint_url holds credentials") as caught:
        S3Options(endpoint_url="http://admin:hunter2@minio:9000")
    assert "hunter2" not in str(caught.value)


def test_a_password_in_the_environments_endpoint_is_not_repeated(s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://admin:hunter2@127.0.0.1:9")
    with pytest.raises(StorageError, match=r"http://127.0.0.1:9 cannot be reached") as caught:
        open_storage("s3://bucket/run").check()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "a storage path is empty"),
        ("gs://bucket/run", "kind gs:// is not known"),
        ("s3:///run", "names no bucket"),
        ("file://host/run", "names a host"),
    ],
)
def test_places_that_are_not_known_are_refused(url, told):
    with pytest.raises(StorageError, match=told):
        open_storage(url)


def test_an_endpoint_without_a_scheme_is_refused():
    with pytest.raises(StorageError, match="it must begin with http:// or https://"):
        S3Options(endpoint_url="minio:9000")
