"""The manifest that a run's settings name, and its prompts."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.settings.config import RunConfig
from manifests import DEMO
from manifests.plan import Manifest


def open_manifest(config: RunConfig) -> Manifest:
    """The run's prompts. Raises `ManifestError`."""
    return Manifest.open(
        str(DEMO) if config.manifest.path == "demo" else config.manifest.path,
        shard_size=config.manifest.shard_size,
        limit=config.manifest.limit,
        columns=config.manifest.columns,
        endpoint_url=config.storage.endpoint_url,
        region=config.storage.region,
    )


def prompts_of(manifest: Manifest) -> Iterator[str]:
    """The prompts in order, those that are empty aside."""
    for _, rows in manifest.batches(["prompt"]):
        yield from filter(None, rows["prompt"].to_pylist())
