"""Summary, page and dataset card of a run folder with real pictures, in each output format; the page in Chromium."""

import base64
import io
import json
import random
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, ImageDraw

from cluster.local_storage import LocalStorage
from jobs.dataset.formats import FORMATS
from jobs.dataset.keys import metadata_key
from jobs.dataset.records import ATTEMPT, RECORD, EncodedImage, file_name, metadata_schema, record_schema
from jobs.metrics.pixels import METRICS, measure
from jobs.report.builder import write_report
from jobs.report.dataset_card import COLUMNS
from jobs.report.page import thumbnails
from jobs.report.wording import number, seconds, size
from jobs.statistics.collect import collect_statistics
from jobs.statistics.run import FOOTER_KEY, RunStatistics
from tests.command import CHROMIUM

ATTACK = """"><img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"""
PROMPTS = [
    "a red fox asleep under a blue lamp",
    f"{ATTACK} in oil",
    "two lines\nof a poem\n\tand a tab",
    "a lighthouse 🗼🌊 at dusk, 絵画",
    "very " * 1000 + "long",
    "{{ 7 * 7 }} | *bold* `code` <b>",
]
START = 1_760_000_000.0
QUALITY = [
    pa.field(f"quality_{name}", {float: pa.float64(), bool: pa.bool_(), str: pa.string()}[metric.type])
    for name, metric in METRICS.items()
]


def picture(rng, broken=False):
    if broken:
        return Image.new("RGB", (96, 96))
    colours = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    image = Image.fromarray(colours).resize((96, 96), Image.Resampling.BICUBIC)
    box = rng.randrange(50), rng.randrange(50)
    ImageDraw.Draw(image).ellipse((*box, box[0] + 40, box[1] + 40), fill=tuple(rng.choices(range(256), k=3)))
    return image


def run_info(payload, num_shards):
    return {
        "version": 1,
        "created": "2026-11-22T10:00:00+00:00",
        "config": {
            "model": {"path": "embedded", "dtype": None},
            "flashu": {"preset": "paper-1.5b", "schedule": [[4, 5.0], [8, 7.5]]},
            "sampling": {"num_inference_steps": 20, "guidance_scale": 7.5, "negative_prompt": "<i>blurry|"},
            "output": {"path": "out", "format": payload, "image_format": "png"},
        },
        "manifest": {"path": "prompts.parquet", "num_rows": 7 * num_shards, "num_shards": num_shards},
        "model": {"fingerprint": "abc123"},
        "code": {"version": "0.1"},
    }


def commit_shard(storage, payload, shard, workers=3):
    """One shard as a worker writes it: real pictures in their format, then metadata with statistics."""
    rng = random.Random(shard)
    images, attempts = [], []
    for index, prompt in enumerate(PROMPTS):
        image = picture(rng, broken=shard % 4 == 1 and index == 3)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        record = dict.fromkeys(RECORD.names) | {
            "prompt_id": f"p{shard}-{index}" if index else f"../../{shard}/{'x' * 5000}",
            "prompt": prompt,
            "image_index": 0,
            "seed": rng.getrandbits(62),
            "width": 96,
            "height": 96,
            "size_bytes": len(buffer.getvalue()),
            "truncated": index == 4,
            "flashu": "off",
            "style": "carried",
        }
        record["file_name"] = file_name(record["prompt_id"], 0, "png")
        record |= {f"quality_{name}": value for name, value in measure(image).items()}
        images.append(EncodedImage(buffer.getvalue(), record))
        attempts.append({"seconds": rng.lognormvariate(0, 0.3), "worker": f"w{shard % workers}", "attempt": 1})
    schema = record_schema(QUALITY, [pa.field("style", pa.string())])
    FORMATS[payload].write(storage, shard, images, schema)
    error = f"InputError: num_images is {ATTACK}"
    failed = [{"prompt_id": ATTACK, "prompt": ATTACK, "error": error, "shard": shard, "row": 6}]
    rows = [image.record | dict.fromkeys(ATTEMPT.names) | made for image, made in zip(images, attempts, strict=True)]
    commit_rows(storage, shard, rows, failed, schema, workers)


def commit_rows(storage, shard, rows, failed, schema, workers=3):
    rng = random.Random(shard)
    work = {
        "shard": shard,
        "worker": f"generator-{shard % workers}",
        "node": f"10.0.0.{shard % workers % 2}",
        "attempt": 1,
        "gpus": 1.0,
        "started_at": START + shard * 4 + (3600 if shard >= 8 else 0),
        "finished_at": START + shard * 4 + 11 + rng.random() + (3600 if shard >= 8 else 0),
        "read_s": 0.2,
        "wait_s": 0.4 * rng.random(),
        "generate_s": 8 + 2 * rng.random(),
        "encode_s": 1.1,
        "write_s": 0.7,
    }
    statistics = RunStatistics.of_shard(rows, failed, work)
    table = pa.Table.from_pylist(rows, metadata_schema(schema))
    table = table.replace_schema_metadata({FOOTER_KEY: statistics.to_json()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.put(metadata_key(shard), buffer.getvalue())


def make_run(folder, payload="parquet", shards=4, planned=None, state="complete"):
    storage = LocalStorage(folder)
    for shard in range(shards):
        commit_shard(storage, payload, shard)
    write_report(storage, collect_statistics(storage), run_info(payload, planned or shards), state=state)
    return storage


def page_of(storage):
    return storage.get("report.html").decode()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "finished", shards=12)


def test_the_summary_counts_what_the_run_holds(finished):
    summary = json.loads(finished.get("summary.json"))
    assert summary["state"] == "complete"
    assert summary["shards"] == {"done": 12, "planned": 12, "retried": 0}
    assert summary["prompts"] == {"done": 84, "planned": 84, "failed": 12}
    assert (summary["images"]["count"], summary["images"]["truncated_prompts"], summary["images"]["broken"]) == (
        72,
        12,
        3,
    )
    assert summary["failures"]["kinds"] == {"InputError": 12}
    assert summary["throughput"]["images_per_second"] == pytest.approx(72 / summary["throughput"]["active_s"])
    assert summary["throughput"]["active_s"] < 100  # the hour's pause between the two attempts is not in it
    assert summary["quality"]["entropy"]["count"] == 72
    assert sum(worker["images"] for worker in summary["workers"]) == 72
    assert summary["config"]["flashu"]["preset"] == "paper-1.5b"


@pytest.mark.parametrize("payload", FORMATS)
def test_the_page_shows_thumbnails_from_every_format(tmp_path, payload):
    page = page_of(make_run(tmp_path, payload, shards=2))
    assert page.count("data:image/webp") == 12 + 12 + 1  # sample, slowest, broken
    assert "cannot be read" not in page


def test_thumbnails_are_of_the_images_they_stand_beside(tmp_path):
    shown = []
    for payload in FORMATS:
        storage = make_run(tmp_path / payload, payload, shards=2)
        sample = collect_statistics(storage).sample
        shown.append(thumbnails(storage, payload, sample))
    assert shown[0] == shown[1] == shown[2]
    assert len(set(shown[0].values())) == 12
    metadata = pq.read_table(tmp_path / "files" / metadata_key(1)).to_pylist()
    original = Image.open(tmp_path / "files" / "data" / "00001" / metadata[2]["file_name"])
    small = Image.open(io.BytesIO(base64.b64decode(shown[0][1, 2].partition(",")[2])))
    difference = np.abs(np.asarray(original, int) - np.asarray(small, int))
    assert difference.mean() < 6  # WebP's loss


def test_big_images_become_small_ones(tmp_path):
    storage = LocalStorage(tmp_path)
    buffer = io.BytesIO()
    Image.effect_noise((1024, 512), 80).convert("RGBA").save(buffer, "PNG")
    storage.put("data/00000/a-0.png", buffer.getvalue())
    (url,) = thumbnails(storage, "files", [{"shard": 0, "row": 0, "file_name": "a-0.png"}]).values()
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (256, 128)


@pytest.mark.parametrize("payload", FORMATS)
def test_unreadable_payload_leaves_placeholders(tmp_path, payload):
    storage = make_run(tmp_path, payload, shards=2)
    keys = sorted(storage.list("data/"))
    storage.put(keys[0], storage.get(keys[0])[:50])
    for key in keys[1:]:
        storage.delete(key)
    write_report(storage, collect_statistics(storage), run_info(payload, 2), state="complete")
    assert page_of(storage).count("cannot be read") == 12 + 12 + 1


def test_an_image_that_is_no_image_leaves_a_placeholder_and_the_others_stay(tmp_path):
    storage = make_run(tmp_path, "files", shards=1)
    key = next(key for key in storage.list("data/") if "p0-5" in key)
    storage.put(key, b"\x89PNG\r\n\x1a\nnot really")
    write_report(storage, collect_statistics(storage), run_info("files", 1), state="complete")
    page = page_of(storage)
    assert page.count("cannot be read") == 2
    assert page.count("data:image/webp") == 10


def test_text_of_users_is_escaped(finished):
    page = page_of(finished)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert "<i>blurry" not in page
    assert "very " * 70 not in page
    assert "x" * 400 not in page


def test_the_page_asks_for_nothing_from_outside(finished):
    page = page_of(finished)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_a_run_without_images_has_a_page_too(tmp_path):
    just_begun = make_run(tmp_path / "begun", shards=0, planned=5, state="running")
    assert "No shard has been committed yet" in page_of(just_begun)
    all_failed = LocalStorage(tmp_path / "failed")
    failure = {"prompt_id": None, "prompt": None, "error": "prompt is null", "shard": 0, "row": 0}
    commit_rows(all_failed, 0, [], [failure], record_schema(QUALITY, []))
    write_report(all_failed, collect_statistics(all_failed), {}, state="failed")
    assert "Every prompt so far was given up" in page_of(all_failed)
    assert "prompt is null" in page_of(all_failed)
    assert "configs" not in yaml.safe_load(all_failed.get("README.md").decode().split("---")[1])


def test_statistics_are_collected_while_shards_come_go_and_are_half_written(tmp_path):
    storage = make_run(tmp_path, shards=3)
    storage.put(metadata_key(3), storage.get(metadata_key(0))[:1000])
    storage.put(metadata_key(4), b"")
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), buffer)
    storage.put(metadata_key(5), buffer.getvalue())
    storage.put("metadata/notes.txt", b"not a shard")

    class Vanishing(LocalStorage):
        def list(self, prefix=""):
            yield from super().list(prefix)
            yield metadata_key(99)

    assert collect_statistics(Vanishing(tmp_path)).shards == 3


def test_collecting_reads_footers_and_not_the_rows(tmp_path):
    storage = make_run(tmp_path, shards=1)
    whole = storage.get(metadata_key(0))
    read = []

    class Counting(LocalStorage):
        def open(self, key):
            class File(io.BytesIO):
                def read(self, count=-1):
                    read.append(count)
                    return super().read(count)

            return File(b"PAR1" + bytes(1_000_000) + whole[4:])  # rows that would be large

    assert collect_statistics(Counting(tmp_path)).images == 6
    assert sum(read) < 200_000


@pytest.mark.parametrize("payload", FORMATS)
def test_load_dataset_opens_the_images_by_the_card(tmp_path, payload):
    from datasets import load_dataset

    make_run(tmp_path / "run", payload, shards=2)
    dataset = load_dataset(str(tmp_path / "run"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 12
    assert dataset[0]["png" if payload == "webdataset" else "image"].size == (96, 96)
    if payload == "parquet":
        assert dataset["prompt"][:6] == PROMPTS
    assert "label" not in dataset.column_names


def test_datasets_shows_the_images_that_are_there_and_not_those_of_an_earlier_time(tmp_path):
    """It caches a folder by its name and its card: a run that went on, or another folder of that name, is another."""
    from datasets import load_dataset

    def loaded(folder):
        return load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))

    make_run(tmp_path / "run", shards=1)
    assert len(loaded(tmp_path / "run")) == 6
    make_run(tmp_path / "run", shards=2)  # the same once more, and another shard
    assert len(loaded(tmp_path / "run")) == 12
    make_run(tmp_path / "elsewhere" / "run", shards=3)
    assert len(loaded(tmp_path / "elsewhere" / "run")) == 18


def test_the_card_tells_what_made_the_images(finished):
    text = finished.get("README.md").decode()
    front_matter = yaml.safe_load(text.split("---")[1])
    assert front_matter["size_categories"] == ["n<1K"]
    assert front_matter["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert "# 72 images generated from 84 prompts" in text
    assert "| `flashu.preset` | `paper-1.5b` |" in text
    assert "| `style` | `string` | carried from the manifest |" in text
    assert "| `<i>blurry\\|` |" in text
    assert "| `InputError` | 12 |" in text
    assert "<script" not in text
    assert "\n\n\n\n" not in text


def test_every_column_is_described():
    assert set(COLUMNS) - {"image"} >= {*RECORD.names, *ATTEMPT.names, *(field.name for field in QUALITY)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(None), "–"),
        (number(1234567), "1,234,567"),
        (number(0.012345), "0.0123"),
        (number(0.0), "0"),
        (seconds(0.0123), "12 ms"),
        (seconds(1.234), "1.23 s"),
        (seconds(200), "3 min 20 s"),
        (seconds(7200), "2 h"),
        (seconds(18_190), "5 h 3 min"),
        (seconds(3599.9), "1 h"),
        (seconds(187_200), "2 d 4 h"),
        (seconds(400 * 86_400), "400 d"),
        (size(999), "999 bytes"),
        (size(1_234_567), "1.23 MB"),
        (size(5e15), "5,000 TB"),
    ],
)
def test_numbers_read_as_people_write_them(text, expected):
    assert text == expected


def chromium(tmp_path, *arguments):
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    switches = (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "hide-scrollbars",
        *quiet,
        f"user-data-dir={tmp_path / 'profile'}",
    )
    command = [CHROMIUM, *(f"--{switch}" for switch in switches), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


class _Log(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        page = self.server.page if self.path == "/report.html" else b""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_):
        pass


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_chromium_shows_the_page_runs_no_script_and_asks_for_nothing_else(finished, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), _Log)
    server.asked, server.page = [], finished.get("report.html")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        dom = chromium(tmp_path, "--dump-dom", f"http://127.0.0.1:{server.server_port}/report.html")
    finally:
        server.shutdown()
        server.server_close()
    assert set(server.asked) <= {"/report.html", "/favicon.ico"}
    assert "<title>finished · complete</title>" in dom
    sample = dom.partition('id="sample"')[2].partition("</section>")[0]
    assert sample.count("<img ") == 24
    assert dom.count("<rect") > 60


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 420])
def test_the_screenshot_is_a_page_with_pictures(finished, tmp_path, width):
    shot = tmp_path / "shot.png"
    chromium(tmp_path, f"--screenshot={shot}", f"--window-size={width},2400", f"file://{finished.root}/report.html")
    image = Image.open(shot).convert("RGB")
    assert image.size == (width, 2400)
    assert len(image.getcolors(maxcolors=1 << 24)) > 2000  # thumbnails, not only text
