"""Run folders with many small images, made without a model: what tests read that need a large run."""

import hashlib
import io
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.local_storage import LocalStorage
from jobs.dataset.formats import FORMATS
from jobs.dataset.keys import failures_key, metadata_key, write_run
from jobs.dataset.records import ATTEMPT, RECORD, EncodedImage, file_name, metadata_schema, record_schema
from jobs.metrics.pixels import METRICS
from jobs.report.builder import write_report
from jobs.settings.config import RunConfig
from jobs.statistics.collect import collect_statistics
from jobs.statistics.run import FOOTER_KEY, RunStatistics

START = 1_760_000_000.0
STYLES = ["photo", "sketch", "oil", None]
CARRIED = [
    pa.field("style", pa.string()),
    pa.field("aesthetic score", pa.float32()),
    pa.field("tags", pa.list_(pa.field("element", pa.string()))),
]
ARROW_TYPES = {float: pa.float64(), bool: pa.bool_(), str: pa.string()}
QUALITY = [pa.field(f"quality_{name}", ARROW_TYPES[metric.type]) for name, metric in METRICS.items()]
VQA_SCORE = pa.field("quality_vqa_score", pa.float64())


def make_run(storage, images, per_shard=32, payload="parquet", quality=True, vqa=True, seed=0, side=16, omit=()):
    """A complete run of `images` images, but for the shards to `omit`. Every seventh shard has a prompt given up; a
    third of the images looks like an earlier one, more or less."""
    if not hasattr(storage, "put"):
        storage = LocalStorage(storage)
    columns = [*QUALITY, *([VQA_SCORE] if vqa else [])] if quality else []
    schema = record_schema(columns, CARRIED)
    rng = np.random.default_rng(seed)
    hashes = _hashes(rng, images)
    shards = -(-images // per_shard)
    for shard in range(shards):
        rows = [
            _image(rng, number, hashes[number], side)
            for number in range(shard * per_shard, min(images, (shard + 1) * per_shard))
        ]
        if shard not in omit:
            commit(storage, payload, shard, rows, schema)
    config = RunConfig().to_dict()
    config["output"] |= {"path": storage.url, "format": payload}
    config["quality"] |= {"enabled": quality, "vqa": vqa}
    run = {
        "version": 1,
        "created": "2026-11-22T10:00:00+00:00",
        "config": config,
        "manifest": {"path": "prompts.parquet", "num_rows": images, "num_shards": shards, "fingerprint": "abc"},
        "model": {"identity": "def"},
        "code": {"version": "0.1", "fingerprint": "ghi"},
    }
    write_run(storage, run)
    write_report(storage, collect_statistics(storage), run, state="complete")
    return storage


def commit(storage, payload, shard, images, schema):
    """A shard as a worker writes it: payload, failures, metadata with statistics."""
    images = [
        EncodedImage(image.data, {name: image.record[name] for name in [*schema.names, *ATTEMPT.names]})
        for image in images
    ]
    FORMATS[payload].write(storage, shard, images, schema)
    failure = {"prompt_id": f"bad{shard}", "prompt": "x", "error": "ValueError: odd", "shard": shard, "row": 0}
    failures = [failure] if shard % 7 == 3 else []
    if failures:
        storage.put(failures_key(shard), _parquet(pa.Table.from_pylist(failures)))
    rows = [image.record for image in images]
    work = {
        "shard": shard,
        "worker": f"generator-{shard % 3}",
        "node": f"10.0.0.{shard % 2}",
        "attempt": 1 + (shard % 5 == 0),
        "gpus": 1.0,
        "started_at": START + shard * 4,
        "finished_at": START + shard * 4 + 11,
        "read_s": 0.2,
        "wait_s": 0.4,
        "generate_s": 8.0,
        "encode_s": 1.1,
        "write_s": 0.7,
    }
    statistics = RunStatistics.of_shard(rows, failures, work).to_json()
    table = pa.Table.from_pylist(rows, metadata_schema(schema))
    storage.put(metadata_key(shard), _parquet(table.replace_schema_metadata({FOOTER_KEY: statistics})))


def _image(rng, number, phash, side):
    pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    data = buffer.getvalue()
    draw = random.Random(number)
    record = dict.fromkeys(RECORD.names) | {
        "prompt_id": f"p{number // 2}",
        "prompt": f"prompt {number // 2}: <b>é | `x`",
        "image_index": number % 2,
        "seed": draw.getrandbits(63),
        "width": draw.choice([256, 512, 1024]),
        "height": 512,
        "file_name": file_name(f"p{number // 2}", number % 2, "png"),
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
        "truncated": draw.random() < 0.1,
        "model": "embedded",
        "flashu": "off",
        "quality_brightness": draw.random(),
        "quality_contrast": draw.random() / 2,
        "quality_sharpness": draw.lognormvariate(5, 1),
        "quality_colourfulness": draw.random() * 100,
        "quality_entropy": None if draw.random() < 0.05 else draw.random() * 8,
        "quality_broken": draw.random() < 0.02,
        "quality_phash": f"{phash:016x}",
        "quality_vqa_score": None if draw.random() < 0.01 else draw.random(),
        "style": draw.choice(STYLES),
        "aesthetic score": draw.randrange(80) / 8,
        "tags": ["a", "b"][: draw.randrange(3)],
        "batch_size": 8,
        "seconds": draw.lognormvariate(0, 0.3),
        "worker": "w",
        "node": "n",
        "attempt": 1,
    }
    return EncodedImage(data, record)


def _hashes(rng, count):
    """Random ones, a third of them an earlier one with up to six bits turned."""
    hashes = [int(value) for value in rng.integers(0, 2**64, count, np.uint64)]
    for index in range(1, count):
        if rng.random() < 1 / 3:
            hashes[index] = hashes[rng.integers(index)]
            for bit in rng.choice(64, rng.integers(7), replace=False):
                hashes[index] ^= 1 << int(bit)
    return hashes


def _parquet(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
