"""Which URLs are refused, as whoever reads a log would know the key."""

import pytest

from manifests.urls import holds_credentials


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:word@bucket/run", "s3://AKIA:wo/rd@bucket", "s3://AKIA@bucket", "hf:s3://AKIA:word@bucket/model",
        "https://user:pass@host/x", "https://user:pa/ss@host", "https://user@host", "hf:https://user:pass@host",
        "ftp://user:pa/ss@host/x", "file://user@host/prompts", "s3:///AKIA:word@bucket/x", "profile://a/user:pass@host",
    ],
)  # fmt: skip
def test_a_user_or_key_is_seen(url):
    assert holds_credentials(url)


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/of@me/a:b", "s3://bucket", "file:///home/me@here/p.parquet", "/home/me@here", "a:b@c", "https://h/x"],
)
def test_names_of_files_and_objects_are_free(url):
    assert not holds_credentials(url)
