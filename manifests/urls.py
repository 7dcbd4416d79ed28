"""What a URL must not hold: one rule for manifests, results and models."""

from __future__ import annotations


def holds_credentials(url: str) -> bool:
    """Whether a URL carries a user, password or key.

    An object's or a file's name may have an @ in it, a bucket's has none. Keys and passwords may have slashes. Of an
    endpoint, which may be given without a scheme, any @ is one too many.
    """
    scheme, _, rest = url.partition("://")
    kind, authority = scheme.rpartition(":")[2], rest.partition("/")[0]
    if kind == "s3" and authority:
        return "@" in authority or ":" in authority
    return "@" in (authority if kind == "file" else rest)
