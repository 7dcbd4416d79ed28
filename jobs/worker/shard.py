"""What a worker does with a shard of a manifest: prompts to images, images to files, files to a commit.

What it has before its first shard is in `equipment`, what becomes of a batch that raises in `second_chances`. Where
workers run and what becomes of a shard whose worker dies is `cluster`'s; how a batch is computed is `flashu`'s.
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from cluster.open_storage import open_storage
from cluster.storage import StorageError
from cluster.tracebacks import describe
from cluster.work import Lease, Place, SetupError, ShardWork, Times
from flashu.config import FlashUConfig
from flashu.errors import InputError, OutOfMemoryError
from flashu.pending import PendingPictures
from jobs.dataset.formats import FORMATS
from jobs.dataset.images import ImageEncoder
from jobs.dataset.keys import RUN, failures_key, metadata_key
from jobs.dataset.records import FAILURE, EncodedImage, file_name, metadata_schema, parquet_file, record_schema
from jobs.metrics.pixels import METRICS, measure
from jobs.settings.acceleration import OFF
from jobs.settings.config import RunConfig, parse_size
from jobs.statistics.run import FOOTER_KEY, RunStatistics
from jobs.worker.batches import ImageRequest, batches_of, requests_of
from jobs.worker.equipment import set_up
from jobs.worker.second_chances import Running, SecondChances
from manifests.errors import ManifestError, UnreachableError
from manifests.plan import Manifest
from manifests.schema import row_problem

ENCODERS = 2  # threads that encode images, beside the one that writes
ARROW_TYPES = {float: pa.float64(), bool: pa.bool_(), str: pa.string()}


@dataclass
class _Results:
    """A shard's images, on their way to files, and failures, by item."""

    made: list[tuple[ImageRequest, Future[tuple[EncodedImage, float]]]]  # the seconds are those that encoding took
    failures: dict[int, str]
    rows: dict[int, dict[str, Any]]
    bad_rows: int  # failures of which nothing could be made


@dataclass
class _Encoded:
    images: list[EncodedImage]
    failures: list[dict[str, Any]]
    bad_rows: int
    encode_s: float


class GenerationWork(ShardWork):
    """`settings` are FlashU's, None for stock."""

    def __init__(self, config: RunConfig, manifest: Manifest, settings: FlashUConfig | None):
        self.config, self.manifest, self.settings = config, manifest, settings

    # ------------------------------------------------------------------------------------------------------- setup

    def setup(self, place: Place) -> str:
        config = self.config
        self.place = place
        self.storage = open_storage(config.output.path, config.storage.s3)
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
            size = parse_size("sampling.size", config.sampling.size)
            equipment = set_up(config, self.manifest, self.settings, size, self.storage, device)
        except (InputError, ManifestError, StorageError, OutOfMemoryError) as error:
            raise SetupError(str(error)) from None
        self.model, self.maker, self.max_tokens = equipment.model, equipment.maker, equipment.max_tokens
        self.batches = SecondChances(self._begin, self._keep, equipment.batch_size, place)
        self.schema = record_schema(
            self._quality_fields(), [self.manifest.schema.field(name) for name in self.manifest.carried]
        )
        return self.model.identity

    def _quality_fields(self) -> list[pa.Field]:
        if not self.config.quality.enabled:
            return []
        fields = [pa.field(f"quality_{name}", ARROW_TYPES[metric.type]) for name, metric in METRICS.items()]
        return fields + [pa.field(f"quality_{name}", pa.float64()) for name in self.maker.scorers]

    # ------------------------------------------------------------------------------------------- prefetch thread

    def read(self, lease: Lease) -> list[tuple[int, dict[str, Any]]]:
        try:
            table = self.manifest.read(lease.shard)
        except UnreachableError as error:
            raise StorageError(str(error)) from None
        return list(zip(self.manifest.rows(lease.shard), table.to_pylist(), strict=True))

    # ----------------------------------------------------------------------------------------------- main thread

    def process(self, lease: Lease, inputs: list[tuple[int, dict[str, Any]]], running: Running) -> _Results:
        requests: list[ImageRequest] = []
        failures: dict[int, str] = {}
        bad_rows = 0
        for item, row in inputs:
            if problem := row_problem(row):
                failures[item] = problem
                bad_rows += 1
            elif item in lease.given_up:
                failures[item] = lease.given_up[item]
            else:
                try:
                    requests += requests_of(item, row, self.maker.defaults, self._count_tokens)
                except Exception as error:
                    failures[item] = describe(error)
        batches = batches_of(requests, lease.alone, self.batches.batch_size)
        outcome = self.batches.make(batches, lease.alone, running)
        return _Results(outcome.made, failures | outcome.failures, dict(inputs), bad_rows)

    def _count_tokens(self, text: str) -> int:
        return len(self.model.pipe.tokenizer.encode_prompt(text, self.max_tokens).prefix)

    def _begin(self, batch: list[ImageRequest]) -> PendingPictures:
        return self.maker.submit(
            [request.prompt for request in batch],
            [request.negative_prompt for request in batch],
            [request.seed for request in batch],
            batch[0].guidance_scale,
        )

    def _keep(self, batch: list[ImageRequest], pending: PendingPictures) -> list[Future[tuple[EncodedImage, float]]]:
        """Have a batch's images scored, and send them off to be encoded."""
        scores = self.maker.scores(pending, [request.prompt for request in batch])
        return [
            self.encoders.submit(self._encode, request, pending, index, score)
            for index, (request, score) in enumerate(zip(batch, scores, strict=True))
        ]

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
            "flashu": OFF if self.settings is None else json.dumps(asdict(self.settings)),
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
        file = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        record = self._record(request, picture) | attempt | columns | file
        return EncodedImage(data, record), time.perf_counter() - start

    # -------------------------------------------------------------------------------------------- writer thread

    def encode(self, results: _Results) -> _Encoded:
        images, encode_s = [], 0.0
        for _, encoding in sorted(results.made, key=lambda made: made[0].order):
            image, seconds = encoding.result()
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
        records = [image.record | attempt for image in encoded.images]
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
        statistics = RunStatistics.of_shard(records, failures, work).to_json()
        footer = {FOOTER_KEY: statistics}
        self.storage.put(metadata_key(shard), parquet_file(records, metadata_schema(self.schema), footer))
        if not failures:  # an attempt before may have left some
            self.storage.delete(failures_key(shard))
        raised = len(failures) - encoded.bad_rows
        return {"shard": shard, "statistics": statistics, "images": len(records), "raised": raised}
