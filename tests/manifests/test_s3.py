"""Manifests in S3: built there, read from there, and what is told when it does not work."""

import os

import pytest

from manifests.build import build
from manifests.errors import ManifestError
from manifests.files import _s3
from manifests.plan import Manifest
from tests.s3_server import DROP, UNAVAILABLE, Answer


@pytest.fixture
def prompts(tmp_path, hostile):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(f"prompt {row}" for row in range(100)))
    return str(file)


def test_a_manifest_goes_to_s3_and_back(bucket, prompts):
    place = {"endpoint_url": bucket.endpoint_url}
    report = build([prompts], f"{bucket.url}/sets/first", rows_per_file=30, **place)
    assert report.files == 4
    manifest = Manifest.open(f"{bucket.url}/sets/first", shard_size=16, **place)
    assert [row["prompt"] for shard in range(7) for row in manifest.read(shard).to_pylist()] == [
        f"prompt {row}" for row in range(100)
    ]
    manifest.check_ids()
    assert manifest.ids_checked
    assert Manifest.open(f"{bucket.url}/sets/*/part-0000[12].parquet", shard_size=16, **place).num_rows == 60
    build([f"{bucket.url}/sets/first"], f"{bucket.url}/one.parquet", **place)
    assert Manifest.open(f"{bucket.url}/one.parquet", shard_size=16, **place).num_rows == 100


def test_the_endpoint_may_come_from_the_environment(bucket, prompts, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", bucket.endpoint_url)
    build([prompts], f"{bucket.url}/m")
    assert Manifest.open(f"{bucket.url}/m", shard_size=16).num_rows == 100


def test_force_replaces_all_old_files(bucket, prompts):
    place = {"endpoint_url": bucket.endpoint_url}
    build([prompts], f"{bucket.url}/m", rows_per_file=10, **place)
    with pytest.raises(ManifestError, match="holds files already; --force replaces them"):
        build([prompts], f"{bucket.url}/m", **place)
    build([prompts], f"{bucket.url}/m", rows_per_file=60, force=True, **place)
    manifest = Manifest.open(f"{bucket.url}/m", shard_size=16, **place)
    assert (len(manifest.files), manifest.num_rows, manifest.ids_checked) == (2, 100, True)
    with pytest.raises(ManifestError, match="overlap; name another destination"):
        build([f"{bucket.url}/m/*.parquet"], f"{bucket.url}/m", force=True, **place)


def test_passing_faults_are_waited_out(bucket, prompts, fault_proxy):
    place = {"endpoint_url": fault_proxy.endpoint_url}
    build([prompts], f"{bucket.url}/m", **place)
    fault_proxy.inject(UNAVAILABLE, DROP, times=2)
    assert len(Manifest.open(f"{bucket.url}/m", shard_size=16, **place).read(3)) == 16


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        (Answer(403, "AccessDenied"), "these credentials may not do that"),
        (Answer(403, "InvalidAccessKeyId"), "the server does not know these credentials"),
        (Answer(403, "SignatureDoesNotMatch"), "check AWS_SECRET_ACCESS_KEY"),
        (Answer(400, "ExpiredToken"), "the credentials have expired"),
    ],
)
def test_refusals_are_told_in_one_line_without_credentials(bucket, prompts, fault_proxy, answer, meaning):
    fault_proxy.inject(answer)
    for attempt in (
        lambda: Manifest.open(f"{bucket.url}/m", shard_size=1, endpoint_url=fault_proxy.endpoint_url),
        lambda: build([prompts], f"{bucket.url}/m", endpoint_url=fault_proxy.endpoint_url),
    ):
        with pytest.raises(ManifestError) as error:
            attempt()
        text = str(error.value)
        assert meaning in text
        assert "\n" not in text
        assert os.environ["AWS_ACCESS_KEY_ID"] not in text
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text


def test_what_is_not_there_is_told(bucket, prompts):
    place = {"endpoint_url": bucket.endpoint_url}
    with pytest.raises(ManifestError, match=r"/m does not exist$"):
        Manifest.open(f"{bucket.url}/m", shard_size=1, **place)
    with pytest.raises(ManifestError, match="there is no such bucket"):
        Manifest.open("s3://flashu-no-such-bucket/m", shard_size=1, **place)
    with pytest.raises(ManifestError, match="there is no such bucket"):
        build([prompts], "s3://flashu-no-such-bucket/m", **place)


def test_an_endpoint_that_does_not_answer_is_told(s3_environment, monkeypatch):
    _s3.cache_clear()
    with pytest.raises(ManifestError, match="s3://bucket/m cannot be read: S3 cannot be reached; check storage"):
        Manifest.open("s3://bucket/m", shard_size=1, endpoint_url="http://127.0.0.1:9")
