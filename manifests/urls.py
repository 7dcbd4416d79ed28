"""What a URL must not hold: one rule for manifests, results and models."""

from __future__ import annotations


def holds_credentials(url: str) -> bool:
    """Whether a URL carries a user, password or key.

    An object's or a file's name may have an @ in it, a bucket's has none. Keys and passwords may have slashes.
    """
    scheme, _, rest = url.partition("://")
    authority = rest.partition("/")[0]
    if scheme.endswith("s3"):
        return "@" in authority or ":" in authority
    return "@" in (authority if scheme.endswith("file") else rest)
