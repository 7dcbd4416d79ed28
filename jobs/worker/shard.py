"""What a worker does with a shard of a manifest: prompts to images, images to files, files to a commit.

Where workers run and what becomes of a shard whose worker dies is `cluster`'s; how a batch is computed is `flashu`'s.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

import flashu
from cluster.checkpoint_cache import local_copy
from cluster.node_cache import cache_folder
from cluster.open_storage import open_storage
from cluster.storage import S3Options, StorageError
from cluster.tracebacks import Traceback, describe, traceback_of
from cluster.work import Lease, Place, SetupError, ShardWork, Times, WorkerBrokenError
from flashu.acceleration.guidance_schedule import is_guided
from flashu.config import FlashUConfig
from flashu.devices import is_device_error, is_out_of_memory
from flashu.errors import InputError, OutOfMemoryError
from flashu.models import geometry
from flashu.pending import PendingPictures
from jobs.dataset.encoding import ImageEncoder
from jobs.dataset.formats import FORMATS
from jobs.dataset.keys import RUN, failures_key, metadata_key
from jobs.dataset.records import FAILURE, EncodedImage, file_name, metadata_schema, parquet_file, record_schema
from jobs.metrics.clip import ClipScorer
from jobs.metrics.pixels import METRICS, measure
from jobs.metrics.vqa import VqaScorer
from jobs.settings.config import AUTO, RunConfig
from jobs.statistics.run import FOOTER_KEY, RunStatistics
from jobs.worker import batch_size, warm_up
from jobs.worker import model as worker_model
from jobs.worker.batch_maker import BatchMaker, Scorer
from jobs.worker.batches import Defaults, ImageRequest, batches_of, requests_of
from manifests.errors import ManifestError, UnreachableError
from manifests.plan import Manifest
from manifests.schema import row_problem

ENCODERS = 2  # threads that encode images, beside the one that writes
ARROW_TYPES = {float: pa.float64(), bool: pa.bool_(), str: pa.string()}

log = logging.getLogger(__name__)


@dataclass
class _Made:
    """An image on its way to a file."""

    request: ImageRequest
    encoding: Future[tuple[EncodedImage, float]]  # and the seconds that encoding took


@dataclass
class _Results:
    """A shard's images and failures, by item."""

    made: list[_Made]
    failures: dict[int, str]
    rows: dict[int, dict[str, Any]]
    bad_rows: int = 0  # failures of which nothing could be made
    under_way: tuple[set[int], PendingPictures] | None = (
        None  # the last batch and its items, if a GPU still works at it
    )

    @property
    def items_under_way(self) -> set[int]:
        return self.under_way[0] if self.under_way else set()

    def finish(self) -> bool:
        """Wait for the batch that is under way; whether there was one. Raises what failed on the device."""
        batch, self.under_way = self.under_way, None
        if batch:
            batch[1].wait()
        return batch is not None


@dataclass
class _Encoded:
    images: list[EncodedImage]
    failures: list[dict[str, Any]]
    bad_rows: int
    encode_s: float


class GenerationWork(ShardWork):
    """`settings` are FlashU's, None for stock; `size` is (height, width) in pixels or None for the model's own."""

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        settings: FlashUConfig | None,
        size: tuple[int, int] | None,
        s3: S3Options,
    ):
        self.config, self.manifest, self.settings, self.size, self.s3 = config, manifest, settings, size, s3

    # ------------------------------------------------------------------------------------------------------- setup

    def setup(self, place: Place) -> str:
        config = self.config
        self.place = place
        self.last_traceback: Traceback | None = None  # by the last batch that could not be made
        self.storage = open_storage(config.output.path, self.s3)
        self.encoder = ImageEncoder(config.output.image_format, config.output.quality)
        self.encoders = ThreadPoolExecutor(ENCODERS, "encoder")
        try:
            if not self.storage.exists(RUN):
                raise SetupError(
                    f"{self.storage.url} on node {place.node} is not the driver's; workers on several nodes need a "
                    "file system that they share, or s3://"
                )
            self.manifest.read(0)
            device = None if place.gpus else "cpu"  # Ray hides no GPU from workers that asked for none
            self.model = worker_model.load(
                config.model, config.flashu, self.settings, self.storage, self.s3, device, self._first_prompt
            )
            device = self.model.pipe.model.device
            self.defaults = self._defaults()
            scorers = self._scorers(device)
            self.maker = BatchMaker(self.model.pipe, config.sampling, self.size, self.defaults, scorers)
            self.max_tokens = self._max_tokens()
            self.one_at_a_time = False  # whether there is too little memory to begin a batch beside another
            self._warm_up()
            self.batch_size = batch_size.choose_batch_size(
                config.sampling.batch_size, device, self.maker.make_two, self._batch_setting(), config.model.cache_dir
            )
        except (InputError, ManifestError, StorageError, OutOfMemoryError) as error:
            raise SetupError(str(error)) from None
        self.schema = record_schema(
            self._quality_fields(), [self.manifest.schema.field(n) for n in self.manifest.carried]
        )
        return self.model.identity

    def _first_prompt(self) -> str:
        for _, rows in self.manifest.batches(["prompt"]):
            for prompt in rows["prompt"].to_pylist():
                if prompt:
                    return prompt
        raise InputError("flashu.calibration=release goes by the first prompt, and the manifest has none")

    def _defaults(self) -> Defaults:
        sampling, own = self.config.sampling, self.model.pipe.model.config.guidance_scale
        guidance = own if sampling.guidance_scale is None else sampling.guidance_scale
        return Defaults(sampling.seed, sampling.num_images, guidance, sampling.negative_prompt)

    def _scorers(self, device: torch.device) -> dict[str, Scorer]:
        quality, scorers = self.config.quality, {}
        if quality.enabled and quality.clip:
            checkpoint = local_copy(quality.clip, self.s3, self.config.model.cache_dir)
            scorers["clip_score"] = ClipScorer(checkpoint, device)
        if quality.enabled and quality.vqa:
            scorers["vqa_score"] = VqaScorer(self.model.pipe)
        return scorers

    def _max_tokens(self) -> int:
        config = self.model.pipe.model.config
        height, width = geometry.parse_size(self.size, config.native_grid)
        return config.max_text_tokens(height * width)

    def _quality_fields(self) -> list[pa.Field]:
        if not self.config.quality.enabled:
            return []
        fields = [pa.field(f"quality_{name}", ARROW_TYPES[metric.type]) for name, metric in METRICS.items()]
        return fields + [pa.field(f"quality_{name}", pa.float64()) for name in self.maker.scorers]

    def _warm_up(self) -> None:
        """Have blocks compile, now, where no lease waits for it; with `compile: auto`, do without where they cannot."""
        pipe, config, given = self.model.pipe, self.config, self.manifest.schema.names
        if not pipe.blocks.compiled:
            return
        kinds = warm_up.Kinds(
            self.defaults.guidance_scale,
            self.defaults.negative_prompt,
            own_negatives="negative_prompt" in given,
            own_guidance="guidance_scale" in given,
        )
        images = warm_up.IMAGES
        if config.sampling.batch_size != AUTO:
            images = min(images, config.sampling.batch_size)
        setting = {**self._batch_setting(), **asdict(kinds), "images": images, **worker_model.compiling_facts(pipe)}
        folder = cache_folder(config.model.cache_dir) / "warmed-up"
        try:
            warm_up.first_on_node(folder, setting, lambda: warm_up.warm_up(self.maker.make, kinds, images))
        except Exception as error:
            if config.model.compile != AUTO or is_device_error(error) or is_out_of_memory(error):
                raise
            pipe.compile("off")
            warm_up.warm_up(self.maker.make, kinds, 1)  # which raises what has another reason
            log.warning("running uncompiled, as blocks do not compile here", exc_info=error)

    def _batch_setting(self) -> dict[str, Any]:
        """What the best batch size depends on, beside the GPU."""
        config, sampling = self.config, self.config.sampling
        return {
            "model": self.model.fingerprint,
            "vae": asdict(self.model.pipe.vae.geometry),
            "dtype": self.model.dtype,
            "size": self.size,
            "num_inference_steps": sampling.num_inference_steps,
            "guided": is_guided(self.defaults.guidance_scale),
            "negative_prompt": self.defaults.negative_prompt,
            "flashu": self.settings and asdict(self.settings),
            "scores": list(self.maker.scorers),
            "compiled": config.model.compile if self.model.pipe.blocks.compiled else None,
            "version": flashu.__version__,
        }

    # ------------------------------------------------------------------------------------------- prefetch thread

    def read(self, lease: Lease) -> list[tuple[int, dict[str, Any]]]:
        try:
            table = self.manifest.read(lease.shard)
        except UnreachableError as error:
            raise StorageError(str(error)) from None
        return list(zip(self.manifest.rows(lease.shard), table.to_pylist(), strict=True))

    # ----------------------------------------------------------------------------------------------- main thread

    def process(
        self, lease: Lease, inputs: list[tuple[int, dict[str, Any]]], running: Callable[[Sequence[int]], None]
    ) -> _Results:
        results = _Results([], {}, dict(inputs))
        requests: list[ImageRequest] = []
        for item, row in inputs:
            if problem := row_problem(row):
                results.failures[item] = problem
                results.bad_rows += 1
                continue
            if item in lease.given_up:
                results.failures[item] = lease.given_up[item]
                continue
            try:
                requests += requests_of(item, row, self.defaults, self._count_tokens)
            except Exception as error:
                results.failures[item] = describe(error)
        for batch in batches_of(requests, lease.alone, self.batch_size):
            if batch[0].item in lease.alone:  # which may bring down the device, and nothing else with it
                self._finish(results)
            self._run(batch, results, running)
        self._finish(results)
        return results

    def _count_tokens(self, text: str) -> int:
        return len(self.model.pipe.tokenizer.encode_prompt(text, self.max_tokens).prefix)

    def _run(self, batch: list[ImageRequest], results: _Results, running: Callable[[Sequence[int]], None]) -> None:
        """Make a batch's images; halve it when memory runs out, and run its prompts one by one when it raises."""
        batch = [request for request in batch if request.item not in results.failures]
        if len(batch) > self.batch_size:  # which has shrunk since, and may shrink again here
            size = self.batch_size
            for start in range(0, len(batch), size):
                self._run(batch[start : start + size], results, running)
            return
        items = sorted({request.item for request in batch})
        if not items:
            return
        if self.one_at_a_time:
            self._finish(results)
        running(sorted(results.items_under_way.union(items)))
        error = self._attempt(batch, results)
        if error and is_out_of_memory(error) and self._finish(results):  # what was under way took memory too
            self.one_at_a_time = True
            error = self._attempt(batch, results)
        if error and is_out_of_memory(error):
            if len(batch) == 1:
                raise WorkerBrokenError(str(error))
            self.batch_size = max(1, len(batch) // 2)
            self._run(batch, results, running)
        elif error and len(items) > 1:
            for item in items:
                self._run([request for request in batch if request.item == item], results, running)
        elif error:
            self._try_again(items[0], batch, error, results)

    def _try_again(self, item: int, batch: list[ImageRequest], error: Exception, results: _Results) -> None:
        """A prompt that raised by itself gets a second chance, and is given up after that."""
        if not isinstance(error, InputError):
            self._finish(results)
            error = self._attempt(batch, results)
        if error and is_out_of_memory(error):
            raise WorkerBrokenError(str(error))
        if error:
            if self.last_traceback and not isinstance(error, InputError):
                self.place.tell(self.last_traceback)
            results.failures[item] = describe(error)
            results.made = [made for made in results.made if made.request.item != item]

    def _attempt(self, batch: list[ImageRequest], results: _Results) -> Exception | None:
        """Make a batch's images, or return why not. Raises `WorkerBrokenError` when the device failed."""
        try:
            with _device_that_may_fail():
                self._keep(batch, results)
        except WorkerBrokenError:
            raise
        except Exception as error:
            self.last_traceback = traceback_of(error, "prompt", "", self.place.worker)
            return error.with_traceback(None)  # which would hold on to the batch's tensors
        return None

    def _finish(self, results: _Results) -> bool:
        """As `_Results.finish`. Raises `WorkerBrokenError` when the device failed."""
        with _device_that_may_fail():
            return results.finish()

    def _keep(self, batch: list[ImageRequest], results: _Results) -> None:
        """Make a batch's images and send them off to be encoded. On return, the device works at no other batch."""
        pending = self.maker.submit(
            [request.prompt for request in batch],
            [request.negative_prompt for request in batch],
            [request.seed for request in batch],
            batch[0].guidance_scale,
        )
        results.finish()
        scores = self.maker.scores(pending, [request.prompt for request in batch])
        for index, (request, score) in enumerate(zip(batch, scores, strict=True)):
            encoding = self.encoders.submit(self._encode, request, pending, index, score)
            results.made.append(_Made(request, encoding))
        if not pending.done:
            results.under_way = {request.item for request in batch}, pending

    def _record(self, request: ImageRequest, picture: Image.Image) -> dict[str, Any]:
        info, row = picture.info, request.row
        scheduled = self.settings is not None and self.settings.schedule is not None
        return {name: row[name] for name in self.manifest.carried} | {
            "prompt_id": row["prompt_id"],
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "image_index": request.index,
            "seed": request.seed,
            "width": picture.width,
            "height": picture.height,
            "file_name": file_name(row["prompt_id"], request.index, self.encoder.suffix),
            "truncated": info["truncated"],
            "model": self.config.model.path,
            "model_fingerprint": self.model.fingerprint,
            "dtype": self.model.dtype,
            "num_inference_steps": info["num_inference_steps"],
            "guidance_scale": None if scheduled else request.guidance_scale,
            "time_shift": info["time_shift"],
            "flashu": worker_model.OFF if self.settings is None else json.dumps(asdict(self.settings)),
        }

    # ------------------------------------------------------------------------------------------- encoder threads

    def _encode(
        self, request: ImageRequest, pending: PendingPictures, index: int, scores: dict[str, float]
    ) -> tuple[EncodedImage, float]:
        picture = pending.picture(index)
        start = time.perf_counter()
        data = self.encoder.encode(picture)
        quality = measure(picture) if self.config.quality.enabled else {}
        attempt = {"seconds": pending.wait() / len(pending), "batch_size": len(pending)}
        columns = scores | {f"quality_{name}": value for name, value in quality.items()}
        file = {"sha256": _sha256(data), "size_bytes": len(data)}
        record = self._record(request, picture) | attempt | columns | file
        return EncodedImage(data, record), time.perf_counter() - start

    # -------------------------------------------------------------------------------------------- writer thread

    def encode(self, results: _Results) -> _Encoded:
        images, encode_s = [], 0.0
        for made in sorted(results.made, key=lambda made: made.request.order):
            image, seconds = made.encoding.result()
            images.append(image)
            encode_s += seconds
        failures = [
            {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "error": results.failures[item], "row": item}
            for item, row in results.rows.items()
            if item in results.failures
        ]
        return _Encoded(images, failures, results.bad_rows, encode_s)

    def write(self, lease: Lease, encoded: _Encoded, times: Times) -> dict:
        """Images first, then failures, then the metadata, which is the commit."""
        start = time.perf_counter()
        place, shard = self.place, lease.shard
        if self.config.output.retry_failures:
            self.storage.delete(metadata_key(shard))  # it may be committed; until it is again, it does not count
        FORMATS[self.config.output.format].write(self.storage, shard, encoded.images, self.schema)
        attempt = {"worker": place.worker, "node": place.node, "attempt": lease.attempt}
        rows = [image.record | attempt for image in encoded.images]
        failures = [failure | {"shard": shard} for failure in encoded.failures]
        if failures:
            self.storage.put(failures_key(shard), parquet_file(failures, FAILURE))
        work = {
            **attempt,
            "shard": shard,
            "gpus": place.gpus,
            "started_at": times.started_at,
            "finished_at": time.time(),
            "read_s": times.read_s,
            "wait_s": times.wait_s,
            "generate_s": times.process_s,
            "encode_s": encoded.encode_s,
            "write_s": time.perf_counter() - start,
        }
        statistics = RunStatistics.of_shard(rows, failures, work).to_json()
        footer = {FOOTER_KEY: statistics}
        self.storage.put(metadata_key(shard), parquet_file(rows, metadata_schema(self.schema), footer))
        if not failures:  # an attempt before may have left some
            self.storage.delete(failures_key(shard))
        raised = len(failures) - encoded.bad_rows
        return {"shard": shard, "statistics": statistics, "images": len(rows), "raised": raised}


@contextmanager
def _device_that_may_fail() -> Iterator[None]:
    """What it raises when it does, as `WorkerBrokenError`."""
    try:
        yield
    except Exception as error:
        if is_device_error(error):
            raise WorkerBrokenError(describe(error)) from error
        raise


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
