"""What S3's errors mean to a user, and which of them may pass: one table for all that reads or writes there.

An error is told here by its code, as S3 spells it (NoSuchKey) or as Arrow does (NO_SUCH_KEY), and its HTTP status. The
answer to a HEAD request has no body, and so no code: its status stands for one. What a library's exceptions hold is for
those who catch them to know. The sentences are our own. A library's may hold key ids, signed URLs or an endpoint's
password, so none of it is passed on but the server's code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """What an error comes to."""

    sentence: str  # in which {endpoint}, {region} and {answer}, the server's status and code, are filled in
    passing: bool = False  # whether the same request may well succeed later

    def told(self, endpoint: str = "S3", region: str = "", answer: str = "") -> str:
        return self.sentence.format(endpoint=endpoint, region=region or "that of the bucket", answer=answer)


MISSING = Meaning("it does not exist")
NO_BUCKET = Meaning("there is no such bucket at {endpoint}; create it or correct the name")
UNREACHABLE = Meaning(
    "{endpoint} cannot be reached; check storage.endpoint_url (or --endpoint-url) and the network", passing=True
)
BROKEN_OFF = Meaning("the connection to {endpoint} broke off again and again", passing=True)
UNTRUSTED = Meaning(  # passing, as a connection that breaks off under TLS is told like this too
    "the certificate of {endpoint} is not trusted; set AWS_CA_BUNDLE, or check http or https", passing=True
)
_FAILED = Meaning("{endpoint} failed; try again later", passing=True)
_BUSY = Meaning("{endpoint} is too busy or out of service; try again later, or with fewer workers", passing=True)
_OVERTAKEN = Meaning("another request was writing there at that moment; try again", passing=True)
_FULL = Meaning("the store is full or over its quota")
_UNABLE = Meaning("the server cannot do this (NotImplemented); conditional writes need a newer one")
_FORBIDDEN = Meaning("these credentials may not do that, or none were found; allow it for this bucket, or use others")
_WRONG_REGION = Meaning("the bucket is in another region; set storage.region to {region} (or --region)")
_UNKNOWN_KEY = Meaning(
    "the server does not know these credentials (InvalidAccessKeyId); check AWS_ACCESS_KEY_ID, "
    "and that storage.endpoint_url is the server they are for"
)

_CODES = {
    MISSING: ("NoSuchKey", "ResourceNotFound", "404"),  # the second is Arrow's name for 404
    NO_BUCKET: ("NoSuchBucket",),
    _FORBIDDEN: ("AccessDenied", "401", "403"),
    _UNKNOWN_KEY: ("InvalidAccessKeyId", "InvalidClientTokenId"),
    Meaning("the credentials are wrong (SignatureDoesNotMatch); check AWS_SECRET_ACCESS_KEY"): (
        "SignatureDoesNotMatch",
    ),
    Meaning("the credentials have expired (ExpiredToken); get new ones"): ("ExpiredToken",),
    Meaning("the session token is wrong (InvalidToken); check AWS_SESSION_TOKEN"): ("InvalidToken",),
    Meaning("this machine's clock is wrong (RequestTimeTooSkewed)"): ("RequestTimeTooSkewed",),
    _WRONG_REGION: ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
    Meaning("it was replaced while it was read"): ("PreconditionFailed", "412"),
    _UNABLE: ("NotImplemented",),
    _FULL: ("XMinioStorageFull", "QuotaExceeded", "InsufficientStorage"),
    _BUSY: ("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "ServiceUnavailable"),
    _OVERTAKEN: ("ConditionalRequestConflict",),
    BROKEN_OFF: ("RequestTimeout",),
    _FAILED: ("InternalError", "InternalFailure"),  # the second is Arrow's name for it
    UNREACHABLE: ("NetworkConnection",),  # Arrow's name for what has no answer
}
MEANINGS = {code: meaning for meaning, codes in _CODES.items() for code in codes}

_BY_STATUS = {  # for codes that are not above
    301: _WRONG_REGION,
    403: Meaning("these credentials may not do that ({answer}); allow it for this bucket, or use others"),
    408: BROKEN_OFF,
    429: _BUSY,
    501: _UNABLE,
    507: _FULL,
}
_ANY_FAILURE = Meaning("{endpoint} failed ({answer}); try again later", passing=True)
_ANY_REFUSAL = Meaning("{endpoint} answered {answer}")


def meaning_of(code: str, status: int = 0) -> Meaning:
    """Of what a server answered. Without a code, give the status for one; without a status, 0."""
    found = _BY_SIGN.get(_sign(code)) or _BY_STATUS.get(status)
    return found or (_ANY_FAILURE if status >= 500 else _ANY_REFUSAL)


def answer_of(code: str, status: int = 0) -> str:
    """A server's answer in a word or two, such as '400 BadDigest'."""
    return code if not status or code == str(status) else f"{status} {code}".strip()


def _sign(code: str) -> str:
    """The same for both spellings."""
    return code.replace("_", "").casefold()


_BY_SIGN = {_sign(code): meaning for code, meaning in MEANINGS.items()}
