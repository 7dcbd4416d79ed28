"""The batch job: a manifest in, a committed dataset out. `flashu run CONFIG`, or `python -m jobs.generate CONFIG`.

`prepare` checks all that can be checked before any worker starts; `GenerationJob` then drives the workers. What a
worker does is in `jobs.generation`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import flashu
from cluster.metrics import Gauges
from cluster.pool import PoolError, PoolOptions, Snapshot, Stop, WorkerPool, capacity
from cluster.session import Session, session
from cluster.storage import S3Options, Storage, StorageError, open_storage
from flashu import arguments
from flashu.acceleration.plan import make_plan
from flashu.config import NUM_INFERENCE_STEPS, FlashUConfig
from flashu.errors import InputError
from flashu.models.geometry import parse_size as token_grid
from flashu.sampler import time_grid
from jobs.batch_size import check_batch_size
from jobs.config import AUTO, RunConfig, check_no_credentials
from jobs.encoding import ImageEncoder
from jobs.formats import FORMATS
from jobs.generation import GenerationWork
from jobs.image_size import parse_size
from jobs.progress import Progress, Standing, duration
from jobs.report import SUMMARY_EVERY_S, collect_statistics, write_report, write_summary
from jobs.run_folder import FAILURES, METADATA, read_run, shards_with, write_run
from jobs.statistics import RunStatistics
from jobs.stop_signals import StopSignals
from jobs.worker_model import flashu_settings
from manifests import DEMO
from manifests.plan import Manifest

EXIT_INCOMPLETE = 1  # some prompts have no images; 2 is for input that cannot be used
SHOWN_FAILURES = 10
HOPELESS = 50  # prompts: when so many failed since the start and none succeeded, the rest is not tried
METRICS = {
    "images": "Images committed.",
    "images_per_second": "Images per second of the whole run.",
    "failed_prompts": "Prompts given up on.",
    "shards_remaining": "Shards that are not committed.",
    "shards_in_flight": "Shards in workers' hands.",
    "shards_run_again": "Shards started a second time.",
    "workers": "Workers that are set up.",
    "workers_lost": "Workers that died or were stopped.",
}


@dataclass
class PreparedRun:
    """A run whose inputs were all found good."""

    config: RunConfig
    manifest: Manifest
    storage: Storage
    run_json: dict[str, Any]
    committed: list[int]
    work: GenerationWork
    pool: PoolOptions


def run_job(config: RunConfig) -> int:
    """Run, or go on with a run, to its end. Returns the exit code.

    Raises `InputError`, `ManifestError`, `StorageError` or `SessionError` for what a user can mend, before any worker
    is started.
    """
    prepared = prepare(config)
    with Progress() as progress:
        return GenerationJob(prepared, progress).run()


# ---------------------------------------------------------------------------------------------------------- prepare


def prepare(config: RunConfig) -> PreparedRun:
    """Check settings, manifest, output and what the output holds already; write `run.json`. Raises as `run_job`."""
    check_no_credentials(config)
    settings = _check_settings(config)
    s3 = S3Options(config.storage.endpoint_url, config.storage.region, config.storage.path_style)
    _check_paths(config)
    manifest = Manifest.open(
        str(DEMO) if config.manifest.path == "demo" else config.manifest.path,
        shard_size=config.manifest.shard_size,
        limit=config.manifest.limit,
        columns=config.manifest.columns,
        endpoint_url=config.storage.endpoint_url,
        region=config.storage.region,
    )
    if config.manifest.check_ids and not manifest.ids_checked:
        manifest.check_ids()
    storage = open_storage(config.output.path, s3)
    storage.check()
    run = _describe(config, manifest)
    earlier = read_run(storage)
    if earlier is None:
        if next(iter(storage.list(METADATA)), None):
            raise InputError(f"{storage.url} holds shards but no run.json; give another output.path")
    else:
        _compare(earlier, run, storage.url)
        run |= {"created": earlier["created"], "model": earlier.get("model")}
    write_run(storage, run)
    committed = set(shards_with(storage, METADATA))
    if config.output.retry_failures:
        committed -= set(shards_with(storage, FAILURES))
    size = parse_size("sampling.size", config.sampling.size)
    work = GenerationWork(_with_absolute_paths(config), manifest, settings, size, s3)
    return PreparedRun(config, manifest, storage, run, sorted(committed), work, _pool_options(config))


def _check_settings(config: RunConfig) -> FlashUConfig | None:
    sampling, output = config.sampling, config.output
    settings = flashu_settings(config.flashu, sampling.num_inference_steps)
    steps = settings.total_steps if settings else sampling.num_inference_steps or NUM_INFERENCE_STEPS
    time_grid(steps, sampling.time_shift)
    make_plan(settings, steps, arguments.finite("sampling.guidance_scale", sampling.guidance_scale, zero=True))
    size = parse_size("sampling.size", sampling.size)
    if size is not None:
        token_grid(size, (1, 1))
    arguments.whole("sampling.num_images", sampling.num_images, least=1)
    check_batch_size(sampling.batch_size)
    if output.format not in FORMATS:
        raise InputError(f"output.format is {output.format!r}; choose one of: {', '.join(FORMATS)}")
    ImageEncoder(output.image_format, output.quality)
    cluster = config.cluster
    if cluster.workers != AUTO:
        arguments.whole("cluster.workers", cluster.workers, least=1)
    for name in ("cpus_per_worker", "lease_timeout_s", "start_timeout_s"):
        arguments.finite(f"cluster.{name}", getattr(cluster, name), zero=False)
    arguments.whole("cluster.max_attempts", cluster.max_attempts, least=1)
    if cluster.gpus_per_worker is not None:
        arguments.finite("cluster.gpus_per_worker", cluster.gpus_per_worker, zero=True)
    arguments.finite("storage.retry_for_s", config.storage.retry_for_s, zero=True)
    return settings


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


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config for workers, which run in another folder: local paths that mean something here, made absolute."""

    def absolute(path: str | None) -> str | None:
        is_local = path and "://" not in path and Path(path).expanduser().exists()
        return os.path.abspath(os.path.expanduser(path)) if is_local else path

    model, flashu_, quality = config.model, config.flashu, config.quality
    return replace(
        config,
        model=replace(model, path=absolute(model.path), vae=absolute(model.vae), tokenizer=absolute(model.tokenizer)),
        flashu=replace(flashu_, scores=absolute(flashu_.scores)),
        output=replace(config.output, path=absolute(config.output.path)),
        quality=replace(quality, clip=absolute(quality.clip)),
    )


def _pool_options(config: RunConfig) -> PoolOptions:
    cluster = config.cluster
    return PoolOptions(
        workers=None if cluster.workers == AUTO else cluster.workers,
        gpus_per_worker=cluster.gpus_per_worker or 0.0,
        cpus_per_worker=cluster.cpus_per_worker,
        max_attempts=cluster.max_attempts,
        lease_timeout_s=cluster.lease_timeout_s,
        start_timeout_s=cluster.start_timeout_s,
        storage_patience_s=config.storage.retry_for_s,
        hedge=cluster.hedge,
    )


def _describe(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """What goes into `run.json`. No secrets: a config holds none."""
    return {
        "version": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": config.to_dict(),
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
    config = run["config"]
    essence = {
        f"{section}.{name}": value
        for section in ("model", "flashu", "sampling", "output", "quality")
        for name, value in config[section].items()
    }
    for name in ("sampling.batch_size", "model.cache_dir", "output.path", "output.retry_failures"):
        essence.pop(name, None)
    essence |= {f"manifest.{name}": config["manifest"][name] for name in ("shard_size", "limit")}
    return essence | {"the manifest's fingerprint": run["manifest"]["fingerprint"]}


# -------------------------------------------------------------------------------------------------------------- run


class GenerationJob:
    """Drives a prepared run: workers, statistics, progress, and the report at the end."""

    def __init__(self, prepared: PreparedRun, progress: Progress):
        self.prepared, self.progress = prepared, progress
        self.storage, self.run_json, self.manifest = prepared.storage, prepared.run_json, prepared.manifest
        self.statistics = RunStatistics()
        self.hopeless = ""
        self.images = 0  # of this start; the statistics are of the whole run
        self.raised = 0  # prompts of this start that failed for another reason than what their row says
        self.workers_lost = 0
        self.next_summary = time.monotonic() + SUMMARY_EVERY_S
        self.gauges: Gauges | None = None

    def run(self) -> int:
        prepared, note = self.prepared, self.progress.note
        count, total = len(prepared.committed), self.manifest.num_shards
        note(f"{prepared.config.manifest.path}: {self.manifest.num_rows:,} prompts in {total:,} shards")
        note(f"{self.storage.url}: {count:,} shards committed" if count else f"{self.storage.url}: a new run")
        if count:
            self.statistics = collect_statistics(self.storage, prepared.committed)
        state, error, last = "complete", "", None
        with StopSignals(note) as signals:
            if count < total:
                try:
                    last = self._work(signals)
                except PoolError as pool_error:
                    state, error = "failed", str(pool_error)
            if signals.stop is not Stop.NO and (last is None or last.remaining):
                state = "stopped"
        abandoned = last.abandoned if last else {}
        if state == "complete" and (self.hopeless or abandoned):
            state, error = "failed", self.hopeless
        reported = self._report(state)
        unknown = self.manifest.num_rows - self.statistics.prompts if state == "complete" else 0
        self._tell_outcome(state, error, abandoned, unknown)
        if state == "stopped":
            return signals.exit_code
        whole = state == "complete" and not self.statistics.failed_prompts and not unknown
        return 0 if whole and reported else EXIT_INCOMPLETE

    def _report(self, state: str) -> bool:
        """Write the report, and whether that went well: what is committed does not depend on it."""
        try:
            write_run(self.storage, self.run_json)
            write_report(self.storage, self.statistics, self.run_json, state=state)
        except StorageError as error:
            self.progress.note(f"The report could not be written: {error}. `flashu report` writes it anew")
            return False
        return True

    def _work(self, signals: StopSignals) -> Snapshot:
        prepared = self.prepared
        options, cluster = prepared.pool, prepared.config.cluster
        with session(cluster.address, local_cpus=(options.workers or 1) * options.cpus_per_worker) as where:
            self.progress.note(str(where))
            if cluster.gpus_per_worker is None and where.gpus:
                options = replace(options, gpus_per_worker=1.0)
            self._check_capacity(options, where)
            with suppress(StorageError):  # which is retried where it matters
                write_summary(self.storage, self.statistics, self.run_json, state="running")
            self.gauges = Gauges("flashu", self.storage.url, METRICS)
            model = self.run_json.get("model")
            pool = WorkerPool(
                prepared.work,
                self.manifest.num_shards,
                prepared.committed,
                options,
                identity=model and model["identity"],
            )
            return pool.run(self._watch, lambda: Stop.NOW if self.hopeless else signals.stop)

    def _check_capacity(self, options: PoolOptions, where: Session) -> None:
        """Warn of workers that find no place now. Raises `InputError` where none ever will."""
        room = capacity(options)
        wanted = min(options.workers or 1, self.manifest.num_shards - len(self.prepared.committed))
        if wanted <= room:
            return
        gpus = f" and {options.gpus_per_worker:g} GPUs" if options.gpus_per_worker else ""
        text = (
            f"{wanted} workers of {options.cpus_per_worker:g} CPUs{gpus} each are asked for, and there is room for "
            f"{room} ({where})"
        )
        if not room and not where.joined:
            raise InputError(f"{text}; lower cluster.gpus_per_worker, or name a cluster with cluster.address")
        self.progress.note(f"Warning: {text}; the others wait until nodes join")

    def _watch(self, snapshot: Snapshot) -> None:
        """Take in what the pool tells, and show it."""
        for report in snapshot.reports:
            self.statistics.merge(RunStatistics.from_json(report["statistics"]))
            self.images += report["images"]
            self.raised += report["raised"]
        if snapshot.identity and not self.run_json.get("model"):
            self.run_json["model"] = {"identity": snapshot.identity}
            with suppress(StorageError):  # it is written again with the report
                write_run(self.storage, self.run_json)
        for lost in snapshot.lost:
            self.progress.note(f"Lost {lost}")
        self.workers_lost += len(snapshot.lost)
        self._show(snapshot)
        if self.raised >= HOPELESS and not self.images:
            last = self.statistics.failures[-1]["error"]
            self.hopeless = f"{self.raised} prompts failed and none succeeded, as with: {last}"
        if time.monotonic() >= self.next_summary:
            self.next_summary = time.monotonic() + SUMMARY_EVERY_S
            with suppress(StorageError):  # a later one, or the end, will do
                write_summary(self.storage, self.statistics, self.run_json, state="running")

    def _show(self, snapshot: Snapshot) -> None:
        statistics = self.statistics
        each = statistics.images / statistics.prompts if statistics.prompts else 0
        left = max(self.manifest.num_rows - statistics.prompts, 0)
        standing = Standing(
            prompts=statistics.prompts,
            total_prompts=self.manifest.num_rows,
            images=statistics.images,
            failed_prompts=statistics.failed_prompts,
            images_per_second=statistics.images_per_second,
            eta_s=statistics.eta_s(round(left * each)),
            workers=len(snapshot.ready),
            starting=snapshot.starting,
        )
        self.progress.show(standing)
        if self.gauges:
            self.gauges.set(
                images=statistics.images,
                images_per_second=statistics.images_per_second or 0,
                failed_prompts=statistics.failed_prompts,
                shards_remaining=snapshot.remaining,
                shards_in_flight=snapshot.in_flight,
                shards_run_again=snapshot.run_again,
                workers=len(snapshot.ready),
                workers_lost=self.workers_lost,
            )

    def _tell_outcome(self, state: str, error: str, abandoned: dict[int, str], unknown: int) -> None:
        statistics, note = self.statistics, self.progress.note
        for failure in statistics.failures[:SHOWN_FAILURES]:
            prompt_id = json.dumps(failure["prompt_id"], ensure_ascii=False)
            note(f"Failed: row {failure['row']}, {prompt_id}: {failure['error']}")
        if statistics.failed_prompts > SHOWN_FAILURES:
            note(f"… and {statistics.failed_prompts - SHOWN_FAILURES:,} more, in {self.storage.url}/{FAILURES}")
        for shard, why in list(abandoned.items())[:SHOWN_FAILURES]:
            rows = self.manifest.rows(shard)
            note(f"Left out: shard {shard} (rows {rows.start} to {rows.stop - 1}): {why}")
        if unknown:
            note(f"Of {unknown:,} prompts nothing is known: some metadata could not be read, or ids are there twice")
        if error:
            note(f"The run cannot go on: {error}")
        if state in ("failed", "stopped"):
            note("What is committed stays. Run the same command again to go on.")
        took = f" in {duration(statistics.active_s)}" if statistics.active_s else ""
        note(f"{state}: {statistics.images:,} images, {statistics.failed_prompts:,} failed prompts{took}")
        note(f"Report: {self.storage.url}/report.html")


def main(arguments_: Sequence[str] | None = None) -> None:
    """`python -m jobs.generate CONFIG [key=value …]`: the same as `flashu run`."""
    from jobs.cli import main as cli

    sys.argv[1:] = ["run", *(sys.argv[1:] if arguments_ is None else arguments_)]
    cli()


if __name__ == "__main__":
    main()
