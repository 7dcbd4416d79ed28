"""All that can be checked of a run before any worker starts, and `run.json`, which says what it is a run of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import flashu
from cluster.open_storage import open_storage
from cluster.session import check_address
from cluster.storage import S3Options, Storage
from flashu.config import FLASHU_PRESETS, FlashUConfig
from flashu.errors import InputError
from jobs.dataset.keys import FAILURES, METADATA, read_run, shards_with, write_run
from jobs.driver.image_cost import costly
from jobs.settings.checks import check_settings
from jobs.settings.config import ModelSection, RunConfig, check_no_credentials
from jobs.settings.image_size import parse_size
from jobs.settings.inputs import check_inputs
from jobs.worker.shard import GenerationWork
from manifests import DEMO
from manifests.plan import Manifest


@dataclass
class PreparedRun:
    """A run whose inputs were all found good."""

    config: RunConfig
    manifest: Manifest
    storage: Storage
    run_json: dict[str, Any]
    committed: list[int]
    work: GenerationWork
    notes: list[str]  # for whoever watches the run


def prepare(config: RunConfig) -> PreparedRun:
    """Check settings, manifest, output and what the output holds already; write `run.json`. Raises as `run_job`."""
    check_no_credentials(config)
    settings = check_settings(config)
    s3 = S3Options(config.storage.endpoint_url, config.storage.region, config.storage.path_style)
    _check_paths(config)
    manifest = open_manifest(config)
    if config.manifest.check_ids and not manifest.ids_checked:
        manifest.check_ids()
    storage = open_storage(config.output.path, s3)
    earlier = read_run(storage)
    committed = _committed(config, storage) if earlier else set()
    notes = []
    if len(committed) < manifest.num_shards:
        check_address(config.cluster.address)
        notes = check_inputs(config) + costly(config) + _overruled(config, settings)
    storage.check()
    run = _describe(config, settings, manifest)
    if earlier is None:
        if next(iter(storage.list(METADATA)), None):
            raise InputError(f"{storage.url} holds shards but no run.json; give another output.path")
    elif earlier.get("filter"):
        raise InputError(f"{storage.url} holds a filtered copy of a run; give another output.path")
    else:
        _compare(earlier, run, storage.url)
        run |= {"created": earlier["created"], "model": earlier.get("model")}
    write_run(storage, run)
    size = parse_size("sampling.size", config.sampling.size)
    work = GenerationWork(_for_workers(config, settings), manifest, settings, size, s3)
    return PreparedRun(config, manifest, storage, run, sorted(committed), work, notes)


def _committed(config: RunConfig, storage: Storage) -> set[int]:
    """The shards that are not to be made."""
    committed = set(shards_with(storage, METADATA))
    if config.output.retry_failures:
        committed -= set(shards_with(storage, FAILURES))
    return committed


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


def _check_paths(config: RunConfig) -> None:
    for name in ("manifest", "output"):
        if not getattr(config, name).path:
            raise InputError(f"{name}.path is not set; put it into the config, or add {name}.path=…")
    output = config.output.path
    if "working_dir_files" in Path.cwd().parts and "://" not in output and not os.path.isabs(output):
        raise InputError(
            f"output.path {output} is relative to a working directory that Ray removes with the job; "
            "give an absolute path or s3://…"
        )


def _absolute(path: str | None) -> str | None:
    """For workers, which run in another folder: a local path that means something here, made absolute."""
    is_local = path and "://" not in path and Path(path).expanduser().exists()
    return os.path.abspath(os.path.expanduser(path)) if is_local else path


def absolute_paths(model: Mapping[str, Any]) -> ModelSection:
    """The model section of a run.json as workers take it."""
    return ModelSection(**model | {name: _absolute(model[name]) for name in ("path", "vae", "tokenizer")})


def _overruled(config: RunConfig, settings: FlashUConfig | None) -> list[str]:
    """Settings that another one goes before, where both are set, or that nothing needs."""
    if not settings:
        return []
    notes, steps, guidance = [], config.sampling.num_inference_steps, config.sampling.guidance_scale
    if steps not in (None, settings.total_steps):
        notes.append(
            f"FlashU is on, so its own {settings.total_steps} inference steps count (flashu.num_inference_steps), and "
            f"not sampling.num_inference_steps={steps}"
        )
    if config.flashu.schedule and guidance is not None:
        notes.append(f"flashu.schedule says how images are guided, and not sampling.guidance_scale={guidance:g}")
    if config.flashu.calibration and not (settings.r_p or settings.head_prune_ratio):
        notes.append("Nothing is pruned with these settings, so flashu.calibration does nothing")
    return notes


def _for_workers(config: RunConfig, settings: FlashUConfig | None) -> RunConfig:
    """The config as workers take it: paths that mean something elsewhere, and the steps that count."""
    steps = settings.total_steps if settings else config.sampling.num_inference_steps
    return replace(
        config,
        sampling=replace(config.sampling, num_inference_steps=steps),
        model=absolute_paths(asdict(config.model)),
        flashu=replace(config.flashu, scores=_absolute(config.flashu.scores)),
        output=replace(config.output, path=_absolute(config.output.path)),
        quality=replace(config.quality, clip=_absolute(config.quality.clip)),
    )


def _describe(config: RunConfig, settings: FlashUConfig | None, manifest: Manifest) -> dict[str, Any]:
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
        "code": {"version": flashu.__version__, "fingerprint": code_fingerprint()},
    }


def code_fingerprint() -> str:
    """SHA-256 over the source of the `flashu` package, on which images depend."""
    folder = Path(flashu.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _schedule_of_old(config: dict[str, Any]) -> list[list[float]] | None:
    """The schedule of a run whose run.json does not say it: a preset's was as it stands, whatever else was set."""
    section = config["flashu"]
    if section["schedule"] is not None or section["preset"] not in FLASHU_PRESETS:
        return _listed(section["schedule"])
    return _listed(FLASHU_PRESETS[section["preset"]].schedule)


def _listed(schedule: Any) -> list[list[float]] | None:
    """A schedule as JSON has it."""
    return [[steps, float(scale)] for steps, scale in schedule] if schedule else None


def _compare(earlier: dict[str, Any], now: dict[str, Any], url: str) -> None:
    """Refuse to mix two runs in one folder."""
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
