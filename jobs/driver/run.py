"""The batch job: a manifest in, a committed dataset out. `flashu run CONFIG`.

`prepare` checks first all that can be checked; the job here then drives the workers, each of which does what
`jobs.worker.shard` says.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, replace

from cluster.metrics import Gauges
from cluster.pool import PoolError
from cluster.queue_actor import Snapshot
from cluster.stop import Stop
from cluster.storage import StorageError
from jobs.dataset.keys import FAILURES, write_run
from jobs.driver.pool import workers_for
from jobs.driver.prepare import PreparedRun, prepare
from jobs.driver.progress import Progress, ProgressUpdate, duration
from jobs.driver.stop_signals import StopSignals
from jobs.driver.tracebacks import Tracebacks
from jobs.report.builder import write_report
from jobs.settings.config import RunConfig
from jobs.settings.inputs import absolute, absolute_model
from jobs.statistics.collect import ShardSet, collect_statistics
from jobs.statistics.run import RunStatistics
from jobs.statistics.summary import SUMMARY_EVERY_S, write_summary
from jobs.worker.shard import GenerationWork

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


def run_job(config: RunConfig) -> int:
    """Run, or go on with a run, to its end. Returns the exit code.

    Raises `InputError`, `ManifestError`, `StorageError` or `SessionError` for what a user can mend, before any worker
    is started.
    """
    prepared = prepare(config)
    with Progress() as progress:
        return GenerationJob(prepared, progress).run()


def generation_work(prepared: PreparedRun) -> GenerationWork:
    """What workers do: by the config with paths that mean something in another folder, and the steps that count."""
    config, settings = prepared.config, prepared.settings
    steps = settings.total_steps if settings else config.sampling.num_inference_steps
    for_workers = replace(
        config,
        sampling=replace(config.sampling, num_inference_steps=steps),
        model=absolute_model(asdict(config.model)),
        flashu=replace(config.flashu, scores=absolute(config.flashu.scores)),
        output=replace(config.output, path=absolute(config.output.path)),
        quality=replace(config.quality, clip=absolute(config.quality.clip)),
    )
    return GenerationWork(for_workers, prepared.manifest, settings)


class GenerationJob:
    """Drives a prepared run: workers, statistics, progress, and the report at the end."""

    def __init__(self, prepared: PreparedRun, progress: Progress):
        self.prepared, self.progress = prepared, progress
        self.storage, self.run_json, self.manifest = prepared.storage, prepared.run_json, prepared.manifest
        self.statistics = RunStatistics()
        self.counted = ShardSet(prepared.committed)  # the shards that the statistics are of
        self.hopeless = ""
        self.images = 0  # of this start; the statistics are of the whole run
        self.raised = 0  # prompts of this start that failed for another reason than what their row says
        self.workers_lost = 0
        self.next_summary = time.monotonic() + SUMMARY_EVERY_S
        self.state = "running"  # then complete (if with failures), stopped or failed
        self.gauges: Gauges | None = None
        self.tracebacks = Tracebacks(self.storage)

    def run(self) -> int:
        prepared, note = self.prepared, self.progress.note
        count, total = len(prepared.committed), self.manifest.num_shards
        note(f"{prepared.config.manifest.path}: {self.manifest.num_rows:,} prompts in {total:,} shards")
        note(f"{self.storage.url}: {count:,} shards committed" if count else f"{self.storage.url}: a new run")
        for text in prepared.notes:
            note(text)
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
        self.state = state
        unknown = self.manifest.num_rows - self.statistics.prompts if state == "complete" else 0
        self._tell_outcome(state, error, abandoned, unknown)
        reported = self._report(state)
        if state == "stopped":
            return signals.exit_code
        whole = state == "complete" and not self.statistics.failed_prompts and not unknown
        return 0 if whole and reported else EXIT_INCOMPLETE

    def _report(self, state: str) -> bool:
        """Write the report, and whether that went well: what is committed does not depend on it."""
        try:
            write_run(self.storage, self.run_json)
            write_report(self.storage, self.statistics, self.run_json, state=state, counted=self.counted)
        except StorageError as error:
            self.progress.note(f"The report could not be written: {error}. `flashu report` writes it anew")
            return False
        self.progress.note(f"Report: {self.storage.url}/report.html")
        return True

    def _work(self, signals: StopSignals) -> Snapshot:
        prepared = self.prepared
        model, note = self.run_json.get("model"), self.progress.note
        work, shards = generation_work(prepared), (self.manifest.num_shards, prepared.committed)
        with workers_for(work, *shards, prepared.config, note, model and model["identity"]) as pool:
            with suppress(StorageError):  # which is retried where it matters
                self._write_summary()
            self.gauges = Gauges("flashu", self.storage.url, METRICS)
            return pool.run(self._watch, lambda: Stop.NOW if self.hopeless else signals.stop)

    def _write_summary(self) -> None:
        write_summary(self.storage, self.statistics, self.run_json, state="running", counted=self.counted)

    def _watch(self, snapshot: Snapshot) -> None:
        """Take in what the pool tells, and show it."""
        for report in snapshot.reports:
            self.statistics.merge(RunStatistics.from_json(report["statistics"]))
            self.counted.add(report["shard"])
            self.images += report["images"]
            self.raised += report["raised"]
        if snapshot.identity and not self.run_json.get("model"):
            self.run_json["model"] = {"identity": snapshot.identity}
            self.progress.note(f"Loaded: {snapshot.identity}")
            with suppress(StorageError):  # it is written again with the report
                write_run(self.storage, self.run_json)
        self.tracebacks.keep(snapshot.tracebacks)
        for lost in snapshot.lost:
            self.progress.note(f"Lost {self.tracebacks.beside(lost)}")
        self.workers_lost += len(snapshot.lost)
        self._show(snapshot)
        if self.raised >= HOPELESS and not self.images:
            last = self.statistics.failures[-1]["error"]
            self.hopeless = f"{self.raised} prompts failed and none succeeded, as with: {last}"
        if time.monotonic() >= self.next_summary:
            self.next_summary = time.monotonic() + SUMMARY_EVERY_S
            with suppress(StorageError):  # a later one, or the end, will do
                self._write_summary()

    def _show(self, snapshot: Snapshot) -> None:
        statistics = self.statistics
        each = statistics.images / statistics.prompts if statistics.prompts else 0
        left = max(self.manifest.num_rows - statistics.prompts, 0)
        update = ProgressUpdate(
            prompts=statistics.prompts,
            total_prompts=self.manifest.num_rows,
            images=statistics.images,
            failed_prompts=statistics.failed_prompts,
            images_per_second=statistics.images_per_second,
            eta_s=statistics.eta_s(round(left * each)),
            workers=len(snapshot.ready),
            starting=snapshot.starting,
        )
        self.progress.show(update)
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
            note(f"Failed: row {failure['row']}, {prompt_id}: {self.tracebacks.beside(failure['error'])}")
        if statistics.failed_prompts > SHOWN_FAILURES:
            note(f"… and {statistics.failed_prompts - SHOWN_FAILURES:,} more, in {self.storage.url}/{FAILURES}")
        for shard, why in list(abandoned.items())[:SHOWN_FAILURES]:
            rows = self.manifest.rows(shard)
            note(f"Left out: shard {shard} (rows {rows.start} to {rows.stop - 1}): {self.tracebacks.beside(why)}")
        if unknown:
            note(f"Of {unknown:,} prompts nothing is known: some metadata could not be read, or ids are there twice")
        if error:
            note(f"The run cannot go on: {self.tracebacks.beside(error)}")
        if state in ("failed", "stopped"):
            note("What is committed stays. Run the same command again to go on.")
        took = f" in {duration(statistics.active_s)}" if statistics.active_s else ""
        note(f"{state}: {statistics.images:,} images, {statistics.failed_prompts:,} failed prompts{took}")
