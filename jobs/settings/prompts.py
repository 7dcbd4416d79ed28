"""The manifest that a run's settings name."""

from __future__ import annotations

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
