"""Of one error of S3, boto3's reader and Arrow's tell the same, and agree on whether it may pass."""

import socket
from functools import cache

import boto3
import pytest
from botocore.config import Config
from pyarrow import fs

from cluster.s3_errors import S3_ERRORS, is_missing, is_passing, reason
from manifests.files import reason_of
from manifests.s3_errors import MEANINGS, MISSING
from tests.s3_server import DROP, Answer, FaultProxy, set_s3_environment

# Of the codes in the table; others come with 400.
STATUSES = {
    "NoSuchKey": 404,
    "NoSuchBucket": 404,
    "AccessDenied": 403,
    "InvalidAccessKeyId": 403,
    "InvalidClientTokenId": 403,
    "SignatureDoesNotMatch": 403,
    "RequestTimeTooSkewed": 403,
    "PermanentRedirect": 301,
    "PreconditionFailed": 412,
    "NotImplemented": 501,
    "XMinioStorageFull": 507,
    "QuotaExceeded": 403,
    "InsufficientStorage": 507,
    "SlowDown": 503,
    "TooManyRequests": 429,
    "ServiceUnavailable": 503,
    "ConditionalRequestConflict": 409,
    "InternalError": 500,
}
ARROWS_OWN = ("ResourceNotFound", "NetworkConnection", "InternalFailure")  # no server says these
CODES = [code for code in MEANINGS if not code.isdigit() and code not in ARROWS_OWN]
STATUSES_ALONE = (301, 400, 401, 403, 408, 412, 429, 500, 501, 503, 507)  # 404 is no error to Arrow


@cache
def clients(url, patience_s):
    """boto3's and Arrow's, which ask once."""
    once = Config(
        retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=patience_s, s3={"addressing_style": "path"}
    )
    scheme, _, place = url.partition("://")
    filesystem = fs.S3FileSystem(
        region="us-east-1",
        scheme=scheme,
        endpoint_override=place,
        connect_timeout=1,
        request_timeout=patience_s,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    return boto3.session.Session().client("s3", endpoint_url=url, region_name="us-east-1", config=once), filesystem


def told(url, *, head=False, patience_s=5):
    """What each reader makes of listing a bucket, or asking for one object: the sentence, and whether it may pass."""
    client, filesystem = clients(url, patience_s)
    with pytest.raises(S3_ERRORS) as by_boto:
        client.head_object(Bucket="bucket", Key="key") if head else client.list_objects_v2(Bucket="bucket")
    with pytest.raises(OSError, match="AWS Error") as by_arrow:
        filesystem.get_file_info("bucket/key" if head else fs.FileSelector("bucket"))
    return (reason(by_boto.value, "S3"), is_passing(by_boto.value)), reason_of(by_arrow.value)


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_s3_environment(monkeypatch, tmp_path_factory)
        yield


@pytest.fixture(scope="module")
def answering():
    """The URL of a server that answers a listing, or a HEAD request for an object, with a fault; there is nothing else.

    A HEAD request for the bucket is how boto3 asks where it is, after a redirect.
    """
    with FaultProxy("http://127.0.0.1:9") as nothing, FaultProxy(nothing.endpoint_url) as proxy:
        nothing.inject(Answer(404, "NoSuchBucket"))

        def answering(fault, head=False):
            proxy.inject(fault, **({"path_end": "/key"} if head else {"methods": ["GET"]}))
            return proxy.endpoint_url

        yield answering


@pytest.mark.parametrize("code", CODES)
def test_both_readers_tell_the_same_of_every_code_in_the_table(answering, code):
    by_boto, by_arrow = told(answering(Answer(STATUSES.get(code, 400), code)))
    assert by_boto == by_arrow == (MEANINGS[code].told(), MEANINGS[code].passing)


@pytest.mark.parametrize("status", STATUSES_ALONE)
def test_both_readers_tell_the_same_of_an_answer_without_a_body(answering, status):
    by_boto, by_arrow = told(answering(Answer(status, "Weird"), head=True), head=True)
    assert by_boto == by_arrow
    assert by_boto[1] == (status in (408, 429, 500, 503))


@pytest.mark.parametrize(
    ("status", "sentence", "passing"),
    [
        (301, "the bucket is in another region; set storage.region to that of the bucket (or --region)", False),
        (403, "these credentials may not do that (403 Weird); allow it for this bucket, or use others", False),
        (404, "S3 answered 404 Weird", False),
        (418, "S3 answered 418 Weird", False),
        (429, "S3 is too busy or out of service; try again later, or with fewer workers", True),
        (502, "S3 failed (502 Weird); try again later", True),
        (507, "the store is full or over its quota", False),
    ],
)
def test_both_readers_judge_a_code_that_nobody_knows_by_its_status(answering, status, sentence, passing):
    assert told(answering(Answer(status, "Weird"))) == ((sentence, passing), (sentence, passing))


def test_both_readers_tell_the_same_of_a_connection_that_broke_off(answering):
    broke_off = ("the connection to S3 broke off again and again", True)
    assert told(answering(DROP)) == (broke_off, broke_off)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert told(f"http://127.0.0.1:{silent.getsockname()[1]}", patience_s=1) == (broke_off, broke_off)


def test_both_readers_tell_the_same_where_nothing_answers():
    unreachable = ("S3 cannot be reached; check storage.endpoint_url (or --endpoint-url) and the network", True)
    assert told("http://127.0.0.1:9") == (unreachable, unreachable)


def test_both_readers_tell_the_same_of_a_server_that_speaks_no_tls(answering):
    url = answering(DROP).replace("http://", "https://")
    by_boto, by_arrow = told(url)
    assert by_boto == by_arrow
    assert by_boto[0].startswith("the certificate of S3 is not trusted")


def test_only_an_object_that_is_not_there_is_missing():
    assert {code for code, meaning in MEANINGS.items() if meaning is MISSING} == {
        "NoSuchKey",
        "404",
        "ResourceNotFound",
    }
    assert not is_missing(ValueError())
