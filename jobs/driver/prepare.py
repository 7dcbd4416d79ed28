"""All that can be checked of a run before any worker starts. On the way, the run's folder gets its `run.json`: what the
run is of, and whether one that is there already is the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import flashu
from cluster.open_storage import open_storage
from cluster.session import check_address
from cluster.storage import Storage
from flashu.config import FLASHU_PRESETS, FlashUConfig
from flashu.errors import InputError
from jobs.dataset.keys import FAILURES, METADATA, read_run, shards_with, write_run
from jobs.driver.image_cost import costly
from jobs.settings.checks import check_paths, check_settings, overruled
from jobs.settings.config import RunConfig, check_no_credentials
from jobs.settings.inputs import check_inputs, open_manifest
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
    check_paths(config)

    manifest = open_manifest(config)
    if config.manifest.check_ids and not manifest.ids_checked:
        manifest.check_ids()

    storage = open_storage(config.output.path, config.storage.s3)
    earlier = read_run(storage)
    committed = set(shards_with(storage, METADATA)) if earlier else set()  # which are not to be made
    if config.output.retry_failures:
        committed -= set(shards_with(storage, FAILURES))
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


def describe(config: RunConfig, settings: FlashUConfig | None, manifest: Manifest) -> dict[str, Any]:
    """What goes into `run.json`. No secrets: a config holds none."""
    return {
        "version": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": config.to_dict(),
        "guidance_schedule": _listed(settings and settings.schedule),
        "manifest": {
            "path": config.manifest.path,
            "num_rows": manifest.num_rows,
            "num_shards": manifest.num_shards,
            "fingerprint": manifest.fingerprint,
        },
        "model": None,  # known when the first worker has loaded it
        "code": {"version": flashu.__version__, "fingerprint": _code_fingerprint()},
    }


def going_on(earlier: dict[str, Any], now: dict[str, Any], url: str) -> dict[str, Any]:
    """The record of a run that goes on from an earlier start. Raises `InputError` rather than mix two in one folder."""
    if earlier.get("filter"):
        raise InputError(f"{url} holds a filtered copy of a run; give another output.path")
    before, after = _essence(earlier), _essence(now)
    different = [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if different:
        raise InputError(
            f"{url} holds another run: {'; '.join(different)}. Give another output.path, or the settings of that run"
        )
    return now | {"created": earlier["created"], "model": earlier.get("model")}


def _code_fingerprint() -> str:
    """SHA-256 over the source of the `flashu` package, on which images depend."""
    folder = Path(flashu.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _essence(run: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a run what it is, flat. How and where it runs may differ between two starts."""
    config, defaults = run["config"], RunConfig().to_dict()  # which a run has of settings that are newer than it
    essence = {
        f"{section}.{name}": value
        for section in ("model", "flashu", "sampling", "output", "quality")
        for name, value in (defaults[section] | config[section]).items()
    }
    for name in ("sampling.batch_size", "model.cache_dir", "model.compile", "output.path", "output.retry_failures"):
        essence.pop(name, None)
    essence |= {f"manifest.{name}": config["manifest"][name] for name in ("shard_size", "limit")}
    essence["FlashU's guidance schedule"] = run.get("guidance_schedule", _schedule_of_old(config))
    return essence | {"the manifest's fingerprint": run["manifest"]["fingerprint"]}


def _schedule_of_old(config: dict[str, Any]) -> list[list[float]] | None:
    """The schedule of a run whose run.json does not say it: a preset's was as it stands, whatever else was set."""
    section = config["flashu"]
    if section["schedule"] is not None or section["preset"] not in FLASHU_PRESETS:
        return _listed(section["schedule"])
    return _listed(FLASHU_PRESETS[section["preset"]].schedule)


def _listed(schedule: Any) -> list[list[float]] | None:
    """A schedule as JSON has it."""
    return [[steps, float(scale)] for steps, scale in schedule] if schedule else None
