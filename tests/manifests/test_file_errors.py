"""What is told of a file system's errors, and whether they are told as ones that may pass."""

import errno

import pytest

from manifests.errors import ManifestError, UnreachableError
from manifests.files import plain_errors

NETWORK = "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode:"


def raised(error):
    with pytest.raises(ManifestError) as caught, plain_errors("s3://bucket/m"):
        raise error
    return type(caught.value), str(caught.value).removeprefix("s3://bucket/m cannot be read: ")


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("AWS Error NO_SUCH_KEY during GetObject operation: it is gone", ManifestError, "it does not exist"),
        ("AWS Error [code 136] during GetObject operation: archived", ManifestError, "S3 answered [code 136]"),
        (
            "AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response body. Looks like the "
            "configured region is 'us-east-1' while the bucket is located in 'eu-west-3'.",
            ManifestError,
            "the bucket is in another region; set storage.region to eu-west-3 (or --region)",
        ),
        (
            "When reading 'TIMEOUT': AWS Error ACCESS_DENIED during GetObject operation: AKIA123 is not welcome",
            ManifestError,
            "these credentials may not do that, or none were found; allow it for this bucket, or use others",
        ),
        (
            f"{NETWORK} 28, Timeout was reached; Details: Connection timed out after 10001 milliseconds",
            UnreachableError,
            "S3 cannot be reached; check storage.endpoint_url (or --endpoint-url) and the network",
        ),
        (
            f"{NETWORK} 60, SSL peer certificate or SSH remote key was not OK",
            UnreachableError,
            "the certificate of S3 is not trusted; set AWS_CA_BUNDLE, or check http or https",
        ),
    ],
)
def test_an_error_of_s3_is_told_in_our_own_words(text, kind, told):
    assert raised(OSError(text)) == (kind, told)


def test_a_network_mount_that_is_out_of_reach_may_come_back():
    assert raised(OSError(errno.ESTALE, "Stale file handle")) == (UnreachableError, "Stale file handle")
    assert raised(OSError(errno.EACCES, "Permission denied")) == (ManifestError, "Permission denied")
