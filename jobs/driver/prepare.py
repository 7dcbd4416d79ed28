"""All that can be checked of a run before any worker starts. On the way, the run's folder gets its `run.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.open_storage import open_storage
from cluster.session import check_address
from cluster.storage import Storage
from flashu.config import FlashUConfig
from flashu.errors import InputError
from jobs.dataset.keys import FAILURES, METADATA, read_run, shards_with, write_run
from jobs.driver.image_cost import costly
from jobs.driver.run_record import describe, going_on
from jobs.settings.checks import check_paths, check_settings, overruled
from jobs.settings.config import RunConfig, check_no_credentials
from jobs.settings.inputs import check_inputs
from jobs.settings.prompts import open_manifest
from manifests.plan import Manifest


@dataclass
class PreparedRun:
    """A run whose inputs were all found good."""

    config: RunConfig
    settings: FlashUConfig | None  # FlashU's, None for stock
    manifest: Manifest
    storage: Storage
    run_json: dict[str, Any]
    committed: list[int]
    notes: list[str]  # for whoever watches the run


def prepare(config: RunConfig) -> PreparedRun:
    """Check settings, manifest, output and what the output holds already; write `run.json`. Raises as `run_job`."""
    check_no_credentials(config)
    settings = check_settings(config)
    s3 = config.storage.s3
    check_paths(config)

    manifest = open_manifest(config)
    if config.manifest.check_ids and not manifest.ids_checked:
        manifest.check_ids()

    storage = open_storage(config.output.path, s3)
    earlier = read_run(storage)
    committed = _committed(storage, config.output.retry_failures) if earlier else set()
    notes = []
    if len(committed) < manifest.num_shards:  # else nothing is loaded any more
        check_address(config.cluster.address)
        notes = check_inputs(config) + costly(config) + overruled(config, settings)
    storage.check()

    run = describe(config, settings, manifest)
    if earlier:
        run = going_on(earlier, run, storage.url)
    elif next(iter(storage.list(METADATA)), None):
        raise InputError(f"{storage.url} holds shards but no run.json; give another output.path")
    write_run(storage, run)
    return PreparedRun(config, settings, manifest, storage, run, sorted(committed), notes)


def _committed(storage: Storage, retry_failures: bool) -> set[int]:
    """The shards that are not to be made."""
    committed = set(shards_with(storage, METADATA))
    return committed - set(shards_with(storage, FAILURES)) if retry_failures else committed
