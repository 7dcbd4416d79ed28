"""Checkpoints by a name: a folder here, a repository on the hub, or the one that ships with the package."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from flashu.checkpoints import weight_names
from flashu.checkpoints.files import CONFIG, EMBEDDED, EMBEDDED_FOLDER, weight_files
from flashu.errors import CheckpointError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_folder(
    path_or_hub_id: str | Path, patterns: Iterable[str], *, weights: bool = False, variant: str | None = None
) -> Path:
    """A local folder as it is, or a hub repository's files that match `patterns`, downloaded or cached.

    weights: whether the patterns are of a model's weights too: of several formats and variants, only those that
        `weight_files` would choose for `variant` are downloaded, and a repository without them is an error.
    `"embedded"` is the folder that ships with the package. Raises `CheckpointError` when it is none of these.
    """
    name = str(path_or_hub_id)
    if name == EMBEDDED:
        return EMBEDDED_FOLDER
    try:
        folder = Path(name).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path; no home of that name; a null character
        is_folder = exists = False
    if is_folder:
        return folder
    if exists:
        raise CheckpointError(f"{name} is a file; give the checkpoint's folder")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"no such checkpoint folder: {name}")
    needless, cached = _needless_weights(name, variant) if weights else ([], None)
    return cached or _download(name, list(patterns), needless)


def _needless_weights(repo: str, variant: str | None) -> tuple[list[str], Path | None]:
    """The weights of a repository that its best copy makes needless; or, where the hub cannot be asked, the folder in
    the cache that holds a copy. Raises `CheckpointError` where the repository has no such weights."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = [name for name in HfApi().list_repo_files(repo) if "/" not in name]
    except Exception:  # offline, or not to be had: the download then says why, unless the cache has all that is needed
        with suppress(Exception):
            folder = Path(snapshot_download(repo, allow_patterns=[CONFIG], local_files_only=True))
            if weight_files(folder, variant):
                return [], folder
        return [], None
    chosen = weight_names.find_weights(files, repo, variant)
    return [name for name in files if weight_names.is_weights(name) and not chosen.holds(name)], None


def _download(repo: str, patterns: list[str], needless: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=needless))
    except HFValidationError:
        raise CheckpointError(f"no such checkpoint folder: {repo}") from None
    except GatedRepoError:
        reason = "access to it must be asked for on its page; then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such repository (if it is private, log in with `hf auth login`)"
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the files are not in the local cache"
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answered {status}" + ("; log in again with `hf auth login`" if status in (401, 403) else "")
    except OSError as error:  # connections, proxies, full disks; the class name carries no URL and no token
        reason = f"the download failed ({type(error).__name__})"
    except Exception as error:  # httpx's transport errors are no OSErrors
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "huggingface_hub", "requests"):
            raise
        reason = f"the hub cannot be reached ({type(error).__name__})"
    raise CheckpointError(f"{repo!r} is neither a local folder nor a hub id that can be loaded: {reason}")
