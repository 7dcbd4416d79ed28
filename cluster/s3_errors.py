"""What boto3's exceptions mean: whether trying again may help, and what to tell the user.

The texts are our own. botocore's may hold key ids, signed URLs or an endpoint's password, so none of it is passed on
but the server's error code.
"""

from __future__ import annotations

import botocore.exceptions as aws
from boto3.exceptions import Boto3Error
from s3transfer.exceptions import RetriesExceededError

# What boto3 raises; anything else that comes out of it is a bug of ours.
S3_ERRORS = (aws.ClientError, aws.BotoCoreError, Boto3Error, RetriesExceededError)

_BUSY = ("SlowDown", "RequestTimeout", "ConditionalRequestConflict", "Throttling", "TooManyRequests")
_FULL = ("XMinioStorageFull", "QuotaExceeded", "InsufficientStorage")
_WRONG_REGION = ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_REASONS = {
    "NoSuchKey": "it does not exist",
    "404": "it does not exist",
    "InvalidAccessKeyId": "the server does not know these credentials (InvalidAccessKeyId); check AWS_ACCESS_KEY_ID, "
    "and that storage.endpoint_url is the server they are for",
    "SignatureDoesNotMatch": "the credentials are wrong (SignatureDoesNotMatch); check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired (ExpiredToken); get new ones",
    "InvalidToken": "the session token is wrong (InvalidToken); check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong (RequestTimeTooSkewed)",
    "PreconditionFailed": "it was replaced while it was read",
    "412": "it was replaced while it was read",
    "NotImplemented": "the server cannot do this (NotImplemented); conditional writes need a newer one",
    **dict.fromkeys(_FULL, "the store is full or over its quota"),
}


def error_code(error: Exception) -> str:
    """The server's code, such as NoSuchKey; for a HEAD request, which has no body, the HTTP status."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, aws.ClientError) else ""


def is_missing(error: Exception) -> bool:
    """Whether the object is not there."""
    return error_code(error) in ("NoSuchKey", "404")


def is_passing(error: Exception) -> bool:
    """Whether the same request may well succeed later."""
    if isinstance(error, aws.ClientError):
        if error_code(error) in _FULL or _status(error) == 501:
            return False
        return error_code(error) in _BUSY or _status(error) == 429 or _status(error) >= 500
    broken = (aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError, aws.FlexibleChecksumError)
    return isinstance(error, (*broken, RetriesExceededError))


def reason(error: Exception, bucket: str, endpoint: str) -> str:
    """What was wrong, and what would be right."""
    if isinstance(error, aws.ClientError):
        return _answer(error, bucket, endpoint)
    if isinstance(error, (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError)):
        return (
            "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, "
            "or AWS_PROFILE, or give the machine a role"
        )
    if isinstance(error, aws.ProfileNotFound):
        return "the profile that AWS_PROFILE names does not exist"
    if isinstance(error, aws.SSLError):
        return f"the certificate of {endpoint} is not trusted; set AWS_CA_BUNDLE, or check http or https"
    if isinstance(error, (aws.ConnectTimeoutError, aws.EndpointConnectionError, aws.ProxyConnectionError)):
        return f"{endpoint} cannot be reached; check storage.endpoint_url and the network"
    if is_passing(error):
        return f"the connection to {endpoint} broke off again and again"
    return f"the request to {endpoint} failed ({type(error).__name__})"


def _answer(error: aws.ClientError, bucket: str, endpoint: str) -> str:
    code, status = error_code(error), _status(error)
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket!r} at {endpoint}; create it or correct the name"
    if code in _WRONG_REGION or status == 301:
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = error.response["Error"].get("Region") or headers.get("x-amz-bucket-region")
        return f"the bucket is in another region; set storage.region to {region or 'that of the bucket'}"
    if code in _REASONS:
        return _REASONS[code]
    if status == 403:
        return f"these credentials may not do that (403 {code}); allow it for this bucket, or use others"
    return f"{endpoint} answered {status} {code}"


def _status(error: aws.ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
