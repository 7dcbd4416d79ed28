"""boto3's exceptions by the table of what S3's errors mean, in `manifests.s3_errors`."""

from __future__ import annotations

import botocore.exceptions as aws
from boto3.exceptions import Boto3Error
from s3transfer.exceptions import RetriesExceededError

from manifests.s3_errors import BROKEN_OFF, MISSING, UNREACHABLE, UNTRUSTED, Meaning, answer_of, meaning_of

# What boto3 raises; anything else that comes out of it is a bug of ours.
S3_ERRORS = (aws.ClientError, aws.BotoCoreError, Boto3Error, RetriesExceededError)

_NO_CREDENTIALS = Meaning(
    "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, "
    "or AWS_PROFILE, or give the machine a role"
)
_MEANINGS = (  # of exceptions that are no answer of the server; the first that fits
    ((aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError), _NO_CREDENTIALS),
    (aws.ProfileNotFound, Meaning("the profile that AWS_PROFILE names does not exist")),
    (aws.SSLError, UNTRUSTED),
    ((aws.ConnectTimeoutError, aws.EndpointConnectionError, aws.ProxyConnectionError), UNREACHABLE),
    ((aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError, aws.FlexibleChecksumError), BROKEN_OFF),
    (RetriesExceededError, BROKEN_OFF),
    (Exception, Meaning("the request to {endpoint} failed ({answer})")),
)


def error_code(error: Exception) -> str:
    """The server's code, such as NoSuchKey; for a HEAD request, which has no body, the HTTP status."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, aws.ClientError) else ""


def is_missing(error: Exception) -> bool:
    """Whether the object is not there."""
    return _meaning(error) is MISSING


def is_passing(error: Exception) -> bool:
    """Whether the same request may well succeed later."""
    return _meaning(error).passing


def reason(error: Exception, endpoint: str) -> str:
    """What was wrong, and what would be right."""
    if not isinstance(error, aws.ClientError):
        return _meaning(error).told(endpoint, answer=type(error).__name__)
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region", "")
    return _meaning(error).told(endpoint, str(region), answer_of(error_code(error), _status(error)))


def _meaning(error: Exception) -> Meaning:
    if isinstance(error, aws.ClientError):
        return meaning_of(error_code(error), _status(error))
    return next(meaning for kinds, meaning in _MEANINGS if isinstance(error, kinds))


def _status(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
