"""`flashu filter`: the images of a choice over all rows by hand, in each format; killed, stopped and gone on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.local_storage import LocalStorage
from cluster.open_storage import open_storage
from cluster.storage import S3Options
from flashu.errors import InputError
from jobs.dataset.formats import FORMATS
from jobs.dataset.keys import METADATA, metadata_key, read_run, shards_with
from jobs.driver.prepare import prepare
from jobs.filtering.near_duplicates import NearDuplicateFinder
from jobs.metrics.pixels import NEAR_DUPLICATE_BITS
from jobs.settings.config import read_config
from jobs.statistics.collect import collect_statistics
from jobs.statistics.run import FOOTER_KEY, VERSION
from tests.command import assert_refused, flashu
from tests.jobs.hashes import hamming
from tests.jobs.synthetic_run import make_run

ROOT = Path(__file__).parents[3]
WHERE = "quality.entropy > 2 and style in ['photo', 'oil'] and not quality.broken"
ASKED = ("--where", WHERE, "--min-score", "0.2", "--dedup")
CHANGING = {"summary.json", "report.html"}  # they tell when they were written


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """300 images in ten shards of 32, the last one smaller."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", 300)


@pytest.fixture(scope="module")
def large_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "large", 4_000, per_shard=64, side=32)


def rows_of(storage):
    """{(shard, row of the file): row}"""
    return {
        (shard, index): row
        for shard in sorted(shards_with(storage, METADATA))
        for index, row in enumerate(pq.read_table(storage.open(metadata_key(shard))).to_pylist())
    }


def images_of(storage, payload="parquet"):
    """{(shard, prompt id, number): the image's bytes}"""
    found = {}
    for shard in shards_with(storage, METADATA):
        rows = pq.read_table(storage.open(metadata_key(shard))).to_pylist()
        if rows:
            names = {index: row["file_name"] for index, row in enumerate(rows)}
            for index, data in FORMATS[payload].read(storage, shard, names):
                found[shard, rows[index]["prompt_id"], rows[index]["image_index"]] = data
    return found


def by_hand(rows):
    """What ASKED keeps, and why not the others: a choice over all rows, every image compared with all that are kept."""
    kept, kept_hashes = {}, np.empty(0, np.uint64)
    dropped = dict.fromkeys(("where", "null", "min_score", "near_duplicate"), 0)
    for place, row in rows.items():
        entropy, style, score = row["quality_entropy"], row["style"], row["quality_vqa_score"]
        if (entropy is not None and entropy <= 2) or style == "sketch" or row["quality_broken"]:
            dropped["where"] += 1
        elif entropy is None or style is None or score is None:
            dropped["null"] += 1
        elif score < 0.2:
            dropped["min_score"] += 1
        else:
            phash = np.uint64(int(row["quality_phash"], 16))
            if (np.bitwise_count(kept_hashes ^ phash) <= NEAR_DUPLICATE_BITS).any():
                dropped["near_duplicate"] += 1
            else:
                kept[place] = row
                kept_hashes = np.append(kept_hashes, phash)
    return kept, dropped


def files_of(folder):
    """{name: bytes} of what stays the same when the filter is run again."""
    storage = LocalStorage(folder)
    return {key: storage.get(key) for key in storage.list() if key not in CHANGING}


def without_place(rows):
    return [((shard, row["prompt_id"], row["image_index"]), row) for (shard, _), row in rows.items()]


@pytest.mark.slow
def test_thousands_of_images_are_chosen_as_by_hand(large_run, tmp_path):
    outcome = flashu("filter", large_run.url, tmp_path / "copy", *ASKED)
    rows, copy = rows_of(large_run), LocalStorage(tmp_path / "copy")
    kept, dropped = by_hand(rows)
    assert outcome.code == 0, outcome
    assert min(dropped.values()) > 30  # of each kind there are some
    assert without_place(rows_of(copy)) == without_place(kept)
    originals = images_of(large_run)
    assert images_of(copy) == {name: originals[name] for name, _ in without_place(kept)}
    told = f"kept {len(kept):,} of 4,000 images in {copy.url}; dropped {dropped['where']:,} by --where"
    assert outcome.out.startswith(told), outcome.out
    entry = read_run(copy)["filter"]
    assert (entry["dropped"], entry["chosen"]) == (dropped, len(kept))

    from datasets import load_dataset

    dataset = load_dataset(copy.url, split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset["sha256"] == [row["sha256"] for row in kept.values()]
    assert dataset[len(kept) - 1]["image"].size == (32, 32)


@pytest.mark.parametrize("payload", FORMATS)
def test_every_format_keeps_what_was_chosen_and_loads(tmp_path, payload):
    from datasets import load_dataset

    source = make_run(tmp_path / "run", 130, payload=payload)
    assert flashu("filter", source.url, tmp_path / "copy", *ASKED).code == 0
    copy, (kept, _) = LocalStorage(tmp_path / "copy"), by_hand(rows_of(source))
    assert 5 < len(kept) < 60
    originals = images_of(source, payload)
    assert images_of(copy, payload) == {name: originals[name] for name, _ in without_place(kept)}
    dataset = load_dataset(copy.url, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == len(kept)
    if payload == "webdataset":
        assert [row["sha256"] for row in dataset["json"]] == [row["sha256"] for row in kept.values()]


@pytest.mark.parametrize("payload", FORMATS)
def test_a_copy_of_everything_has_the_payload_of_the_run_byte_for_byte(tmp_path, payload):
    source = make_run(tmp_path / "run", 70, payload=payload)
    assert flashu("filter", source.url, tmp_path / "copy", "--where", "true").code == 0
    copy = LocalStorage(tmp_path / "copy")
    assert {key: copy.get(key) for key in copy.list("data/")} == {key: source.get(key) for key in source.list("data/")}
    assert rows_of(copy) == rows_of(source)


def test_a_copy_is_as_a_run_of_the_kept_images_would_be(run, tmp_path):
    flashu("filter", run.url, tmp_path / "copy", *ASKED)
    copy, before = LocalStorage(tmp_path / "copy"), collect_statistics(run)
    kept, _ = by_hand(rows_of(run))
    after = collect_statistics(copy)
    assert (after.shards, after.images, after.failed_prompts) == (before.shards, len(kept), 0)
    assert after.prompts == len({row["prompt_id"] for row in kept.values()})
    assert after.size_bytes == sum(row["size_bytes"] for row in kept.values())
    assert after.broken == after.near_duplicates == 0
    scores = [row["quality_vqa_score"] for row in kept.values()]
    assert after.quality["vqa_score"].mean == pytest.approx(np.mean(scores))
    assert after.quality["vqa_score"].min == min(scores)
    # The time that it took to make them is that of the shards: a kept image costs what was spent on all.
    assert after.gpu_seconds == pytest.approx(before.gpu_seconds)
    assert after.retried_shards == before.retried_shards
    assert after.stage_seconds == pytest.approx(before.stage_seconds)
    assert (after.started_at, after.finished_at) == (before.started_at, before.finished_at)
    assert {name: worker.node for name, worker in after.workers.items()} == {
        name: worker.node for name, worker in before.workers.items()
    }
    assert sum(worker.images for worker in after.workers.values()) == len(kept)


def test_the_metadata_of_a_shard_is_written_last(run, tmp_path):
    flashu("filter", run.url, tmp_path, "--where", "width == 512")
    for shard in range(10):
        payload = tmp_path / f"data/shard-{shard:05d}.parquet"
        assert payload.stat().st_mtime_ns < (tmp_path / metadata_key(shard)).stat().st_mtime_ns


def test_a_shard_of_which_nothing_is_kept_has_metadata_without_rows_and_no_payload(run, tmp_path):
    wanted = rows_of(run)[4, 7]
    outcome = flashu("filter", run.url, tmp_path / "copy", "--where", f"prompt_id == {wanted['prompt_id']!r}")
    assert outcome.code == 0, outcome
    copy = LocalStorage(tmp_path / "copy")
    assert list(copy.list("data/")) == ["data/shard-00004.parquet"]
    assert sorted(shards_with(copy, METADATA)) == list(range(10))
    assert [place[0] for place in rows_of(copy)] == [4, 4]
    empty = pq.read_table(copy.open(metadata_key(0)))
    assert empty.schema == pq.read_table(copy.open(metadata_key(4))).schema
    assert flashu("status", copy.url).out.startswith(f"{copy.url}: complete")


def test_a_filter_that_keeps_nothing_says_so_and_leaves_a_run_without_images(run, tmp_path):
    outcome = flashu("filter", run.url, tmp_path / "copy", "--where", "width > 100_000")
    assert (outcome.code, outcome.out) == (
        0,
        f"kept 0 of 300 images in {tmp_path / 'copy'}; dropped 300 by --where\n",
    )
    assert "configs" not in yaml.safe_load((tmp_path / "copy/README.md").read_text().split("---")[1])


def test_the_card_tells_what_was_dropped_and_a_report_written_anew_still_does(run, tmp_path):
    flashu("filter", run.url, tmp_path / "copy", *ASKED)
    card, (kept, dropped) = (tmp_path / "copy/README.md").read_text(), by_hand(rows_of(run))
    assert f"# {len(kept)} images generated from" in card
    for line in (
        f"| of `{run.url}` | 300 images |",
        f"| dropped: not `{WHERE}` | {dropped['where']} |",
        f"| dropped: `quality_vqa_score` below 0.2 | {dropped['min_score']} |",
        f"| dropped: a column that decides was null | {dropped['null']} |",
        "| dropped: looks like an earlier image; 4 bits or fewer of `quality_phash` differ | "
        f"{dropped['near_duplicate']} |",
        f"| kept | {len(kept)} |",
    ):
        assert line in card
    assert "\n\n\n\n" not in card
    assert f"A filtered copy of {run.url}" in (tmp_path / "copy/report.html").read_text()
    for name in ("README.md", "summary.json", "report.html"):
        (tmp_path / "copy" / name).unlink()
    assert flashu("report", tmp_path / "copy").code == 0
    assert (tmp_path / "copy/README.md").read_text() == card
    assert json.loads((tmp_path / "copy/summary.json").read_text())["state"] == "complete"


def test_the_card_of_a_run_says_nothing_of_filters(run):
    assert "Filtered" not in run.get("README.md").decode()
    assert "filtered" not in run.get("report.html").decode()


def test_texts_of_users_are_no_markup_in_card_and_page(tmp_path):
    source = make_run(tmp_path / "<script>alert()", 40)
    flashu("filter", source.url, tmp_path / "copy", "--where", "style != '<script>|`'")
    assert "| dropped: not `style != '<script>\\|''` |" in (tmp_path / "copy/README.md").read_text()
    page = (tmp_path / "copy/report.html").read_text()
    assert "&lt;script&gt;alert()" in page
    assert "<script>alert" not in page


def test_a_copy_can_be_filtered_again(run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    flashu("filter", run.url, first, "--where", "quality.entropy > 2", "--dedup")
    outcome = flashu("filter", first, second, "--where", "quality.entropy > 4 and width == 512")
    assert outcome.code == 0, outcome
    kept = [row for _, row in without_place(rows_of(LocalStorage(first)))]
    kept = [row for row in kept if row["quality_entropy"] > 4 and row["width"] == 512]
    assert [row for _, row in without_place(rows_of(LocalStorage(second)))] == kept
    card = (second / "README.md").read_text()
    assert card.index(f"| of `{run.url}` | 300 images |") < card.index(f"| of `{first}` |")
    assert "missing" not in card
    assert collect_statistics(LocalStorage(second)).gpu_seconds == pytest.approx(collect_statistics(run).gpu_seconds)


def test_a_copy_of_a_stopped_copy_does_not_call_missing_what_was_not_copied_yet(run, tmp_path):
    first, second = LocalStorage(tmp_path / "first"), tmp_path / "second"
    flashu("filter", run.url, first.url, "--where", "width == 512")
    for shard in range(6, 10):  # as if it had been stopped before
        first.delete(metadata_key(shard))
    outcome = flashu("filter", first.url, second, "--where", "true", "--allow-incomplete")
    assert outcome.code == 0, outcome
    card = (second / "README.md").read_text()
    assert "missing" not in card
    assert "| chosen; the copy is not finished |" in card


def test_columns_of_types_that_arrow_cannot_filter_are_carried(run, tmp_path):
    source, views = LocalStorage(tmp_path / "run"), []
    shutil.copytree(run.url, source.url)
    for shard in range(10):
        table = pq.read_table(source.open(metadata_key(shard)))
        view = pa.array([None, "é"] * (len(table) // 2), pa.string_view())
        views += view.to_pylist()
        table = table.add_column(0, "view", view)
        pq.write_table(table, Path(source.url, metadata_key(shard)))
    outcome = flashu("filter", source.url, tmp_path / "copy", "--where", "width == 512")
    assert outcome.code == 0, outcome
    kept = [row for row in rows_of(source).values() if row["width"] == 512]
    assert list(rows_of(LocalStorage(tmp_path / "copy")).values()) == kept
    assert {row["view"] for row in kept} == {None, "é"}


# ------------------------------------------------------------------------------------------------------------ dedup


def hashes_like(rng, count, share):
    """Random hashes, a share of them an earlier one with up to six bits turned; some of the bits do not vary."""
    hashes = rng.integers(0, 2**64, count, np.uint64) & np.uint64(0x0FFF_FF0F_F0FF_FFF0)
    for index in np.flatnonzero(rng.random(count) < share)[1:]:
        turned = rng.choice(64, rng.integers(7), replace=False)
        hashes[index] = hashes[rng.integers(index)] ^ np.uint64(sum(1 << int(bit) for bit in turned))
    return hashes


@pytest.mark.parametrize(("count", "share"), [(1, 0), (5000, 0.3), (5000, 0.0), (3000, 0.95)])
def test_near_duplicates_are_those_of_a_comparison_of_all_with_all(count, share):
    rng = np.random.default_rng(count)
    hashes = hashes_like(rng, count, share)
    kept, expected = np.empty(0, np.uint64), []
    for value in hashes:
        expected.append(bool((np.bitwise_count(kept ^ value) <= NEAR_DUPLICATE_BITS).any()))
        kept = kept if expected[-1] else np.append(kept, value)
    finder, at = NearDuplicateFinder(), 0
    while at < count:
        step = int(rng.integers(700))
        finder.add(hashes[at : at + step])
        at += step
    assert finder.repeats(0, count).tolist() == expected
    assert finder.repeats(count // 3, count // 2).tolist() == expected[count // 3 : count // 2]


@pytest.mark.parametrize("turned", range(NEAR_DUPLICATE_BITS + 2))
def test_bits_wherever_they_differ_are_counted(turned):
    rng = random.Random(turned)
    pairs = []
    for _ in range(300):
        value = rng.getrandbits(64)
        pairs.append((value, value ^ sum(1 << bit for bit in rng.sample(range(64), turned))))
    assert all(hamming(f"{one:x}", f"{other:x}") == turned for one, other in pairs)
    finder = NearDuplicateFinder()
    # Enough between them that the first ones are compared by their bands.
    between = np.random.default_rng(turned).integers(0, 2**64, 3000, np.uint64)
    for part in ([one for one, _ in pairs], between, [other for _, other in pairs]):
        finder.add(np.array(part, np.uint64))
    assert finder.repeats(3300, 3600).all() == (turned <= NEAR_DUPLICATE_BITS)
    assert finder.repeats(3300, 3600).any() == (turned <= NEAR_DUPLICATE_BITS)


def test_many_hashes_take_tens_of_bytes_each_and_no_minutes():
    hashes = np.random.default_rng(0).integers(0, 2**64, 30_000, np.uint64)

    def find():
        finder = NearDuplicateFinder()
        for at in range(0, len(hashes), 64):
            finder.add(hashes[at : at + 64])

    tracemalloc.start()
    try:
        find()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    start = time.process_time()
    find()
    assert peak < 90 * len(hashes), "a million take 42 bytes each; what merging takes weighs more here"
    assert time.process_time() - start < 3


def test_without_perceptual_hashes_equal_files_are_dropped_and_that_is_said(tmp_path):
    source = make_run(tmp_path / "run", 100, quality=False)
    folder = tmp_path / "run"
    (folder / "data/shard-00003.parquet").write_bytes((folder / "data/shard-00000.parquet").read_bytes())
    (folder / metadata_key(3)).write_bytes((folder / metadata_key(0)).read_bytes())  # 32 images once more
    outcome = flashu("filter", source.url, tmp_path / "copy", "--dedup")
    assert outcome.out == (
        "The run has no perceptual hashes; --dedup drops images whose files are equal.\n"
        f"kept 96 of 128 images in {tmp_path / 'copy'}; dropped 32 near duplicates\n"
    )
    assert {shard for shard, _ in rows_of(LocalStorage(tmp_path / "copy"))} == {0, 1, 2}
    assert "| dropped: the same file as an earlier image | 32 |" in (tmp_path / "copy/README.md").read_text()


def test_broken_images_are_neither_dropped_by_dedup_nor_compared_with(tmp_path):
    source = make_run(tmp_path / "run", 300)
    broken = [row for row in rows_of(source).values() if row["quality_broken"]]
    assert broken
    flashu("filter", source.url, tmp_path / "copy", "--dedup")
    kept = rows_of(LocalStorage(tmp_path / "copy")).values()
    assert [row for row in kept if row["quality_broken"]] == broken


# ------------------------------------------------------------------------------------- killed, stopped, and gone on


def start_filter(source, copy, *asked):
    command = [sys.executable, "-m", "jobs", "filter", str(source), str(copy), *asked]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_shards(process, copy, count):
    """Until the copy has so many shards, which is a moment of its own each time."""
    while process.poll() is None and len(list((copy / "metadata").glob("shard-*"))) < count:
        time.sleep(0.005)
    assert process.poll() is None, "it was done before it could be stopped"


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """A run whose copy takes a while, as every image is a file."""
    return make_run(tmp_path_factory.mktemp("runs") / "files", 720, per_shard=8, payload="files", side=8)


@pytest.fixture(scope="module")
def undisturbed(slow_run, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copies") / "undisturbed"
    assert flashu("filter", slow_run.url, copy, *ASKED).code == 0
    return files_of(copy)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(slow_run, undisturbed, tmp_path):
    seed = random.randrange(10**6)
    copy, rng = tmp_path / "copy", random.Random(seed)
    for shards in (0, 1, rng.randrange(2, 80)):
        process = start_filter(slow_run.url, copy, *ASKED)
        if shards:
            wait_for_shards(process, copy, shards)
        time.sleep(rng.random() * (0.02 if shards else 1.5))
        process.kill()
        process.communicate()
    committed = {path.name: path.stat().st_mtime_ns for path in (copy / "metadata").iterdir()}
    outcome = flashu("filter", slow_run.url, copy, *ASKED)
    assert outcome.code == 0, outcome
    assert files_of(copy) == undisturbed, f"killed at the moments of seed {seed}"
    later = {path.name: path.stat().st_mtime_ns for path in (copy / "metadata").iterdir()}
    assert {name: later[name] for name in committed if not name.startswith(".tmp")}.items() <= committed.items()


def test_ctrl_c_stops_it_after_the_shards_in_hand_and_the_same_command_goes_on(slow_run, undisturbed, tmp_path):
    copy = tmp_path / "copy"
    process = start_filter(slow_run.url, copy, *ASKED)
    wait_for_shards(process, copy, 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, (out, err)
    done = len(list(shards_with(LocalStorage(copy), METADATA)))
    assert 5 <= done < 90
    stopped = f"stopped: {done} of 90 shards are in {copy}. Run the same command again to go on.\n"
    assert out.endswith(stopped)
    assert err == ""
    assert flashu("status", copy).out.startswith(f"{copy}: stopped\nshards     {done} of 90 committed")
    assert "| chosen; the copy is not finished |" in (copy / "README.md").read_text()
    assert_refused(flashu("filter", copy, tmp_path / "x", "--dedup"), f"`flashu filter {slow_run.url} {copy}`")
    assert flashu("filter", slow_run.url, copy, *ASKED).code == 0
    assert files_of(copy) == undisturbed


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)])
def test_sigterm_or_a_second_ctrl_c_stops_it_at_once(tmp_path, numbers):
    source, copy = tmp_path / "run", tmp_path / "copy"
    make_run(source, 64, per_shard=8, payload="files", side=8)
    originals = images_of(LocalStorage(source), "files")
    stuck = source / "data/00005" / min(os.listdir(source / "data/00005"))
    data = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)  # as storage that does not answer: whoever opens it waits for ever
    process = start_filter(source, copy, "--where", "true")
    with stuck.open("wb"):  # opened once the filter waits for what it reads there
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.3)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + numbers[-1], (out, err)
    assert out.endswith("Stopping. What is committed stays; the same command goes on from there.\n")
    stuck.unlink()
    stuck.write_bytes(data)
    assert flashu("filter", source, copy, "--where", "true").code == 0
    assert images_of(LocalStorage(copy), "files") == originals


def test_of_two_filters_into_one_folder_the_later_one_is_refused(tmp_path):
    source, copy = make_run(tmp_path / "run", 100), tmp_path / "copy"
    waits = Path(source.url, metadata_key(3))
    metadata = waits.read_bytes()
    waits.unlink()
    os.mkfifo(waits)
    first = start_filter(source.url, copy, "--where", "width == 256")
    with waits.open("wb") as pipe:  # opened once the first one reads it, while it chooses
        whole = waits.with_name("whole")
        whole.write_bytes(metadata)
        whole.replace(waits)
        second = flashu("filter", source.url, copy, "--where", "width == 1024")
        pipe.write(metadata)
    out, err = first.communicate(timeout=60)
    assert second.code == 0, second
    assert (first.returncode, out) == (2, ""), (out, err)
    assert "holds another filtered copy: --where was 'width == 1024' and is 'width == 256'" in err
    assert {row["width"] for row in rows_of(LocalStorage(copy)).values()} == {1024}


def test_a_finished_copy_is_left_as_it_is(run, tmp_path):
    first = flashu("filter", run.url, tmp_path / "copy", *ASKED)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").glob("*/*")}
    assert flashu("filter", run.url, tmp_path / "copy", *ASKED) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").glob("*/*")} == before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(large_run, tmp_path):
    small_run, peaks = make_run(tmp_path / "small", 1_000, per_shard=64, side=32), []
    for source in (small_run, large_run):
        process = start_filter(source.url, tmp_path / f"copy-{len(peaks)}", "--where", "width > 0", "--dedup")
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss)  # kB
    images = sum(len(data) for data in images_of(large_run).values())
    assert images > 10e6
    assert peaks[1] - peaks[0] < 6_000, peaks


# --------------------------------------------------------------------------------------------- images that are missing


def damage(source, payload):
    """Spoil some images of shards 1 to 4 of a run; returns their places."""
    rows, folder = rows_of(source), Path(source.url)
    shard_of = lambda shard: {place for place in rows if place[0] == shard}  # noqa: E731
    images = images_of(source, payload)
    data = lambda place: images[place[0], rows[place]["prompt_id"], rows[place]["image_index"]]  # noqa: E731
    if payload == "files":
        path = lambda place: folder / "data" / f"{place[0]:05d}" / rows[place]["file_name"]  # noqa: E731
        path((1, 3)).unlink()
        path((2, 5)).write_bytes(data((2, 5))[:-9])
        path((3, 0)).write_bytes(b"")
        return {(1, 3), (2, 5), (3, 0)}
    file = lambda shard: folder / f"data/shard-{shard:05d}{FORMATS[payload].suffix}"  # noqa: E731
    file(1).unlink()
    place = (2, 5)
    whole, image = file(2).read_bytes(), data(place)
    file(2).write_bytes(whole.replace(image, image[:100] + b"x" + image[101:]))
    if payload == "parquet":
        file(3).write_bytes(file(3).read_bytes()[:-100])
        group = pq.read_metadata(file(4)).row_group(0)  # of the first sixteen images
        spoiled = bytearray(file(4).read_bytes())
        start = group.column(0).data_page_offset
        spoiled[start : start + 16] = bytes(16)
        file(4).write_bytes(spoiled)
        return shard_of(1) | {place} | shard_of(3) | {(4, row) for row in range(16)}
    whole = file(3).read_bytes()
    file(3).write_bytes(whole[: whole.index(data((3, 10))) + 5])
    return shard_of(1) | {place} | {place for place in shard_of(3) if place[1] >= 10}


@pytest.mark.parametrize("payload", FORMATS)
def test_images_that_are_missing_or_damaged_are_dropped_and_told_and_the_others_kept(tmp_path, payload):
    source = make_run(tmp_path / "run", 160, payload=payload)
    originals, rows = images_of(source, payload), rows_of(source)
    missing = damage(source, payload)
    outcome = flashu("filter", source.url, tmp_path / "copy", "--where", "width >= 512")
    chosen = {place: row for place, row in rows.items() if row["width"] >= 512}
    lost = sorted(missing & chosen.keys())
    kept = {place: row for place, row in chosen.items() if place not in missing}
    assert outcome.code == 1, outcome
    assert lost
    assert kept
    lines = outcome.out.splitlines()
    assert len(lines) == min(len(lost), 10) + (len(lost) > 10) + 2
    assert "filter the run into a new folder" in lines[-2]
    assert len(lost) <= 10 or lines[10] == f"… and {len(lost) - 10} more"
    for (shard, row), line in zip(lost, lines[:10], strict=False):
        prompt_id = rows[shard, row]["prompt_id"]
        assert line.startswith(f"Missing: shard {shard}, row {row}, {prompt_id!r}: "), line
    assert lines[-1].endswith(f"dropped {160 - len(chosen)} by --where, {len(lost)} missing")
    copy = LocalStorage(tmp_path / "copy")
    assert without_place(rows_of(copy)) == without_place(kept)
    assert images_of(copy, payload) == {name: originals[name] for name, _ in without_place(kept)}
    assert f"| missing: chosen, but could not be read | {len(lost)} |" in (tmp_path / "copy/README.md").read_text()
    again = flashu("filter", source.url, tmp_path / "copy", "--where", "width >= 512")
    assert (again.code, again.out) == (1, f"{lines[-1]}\n")


@pytest.mark.parametrize("payload", ["parquet", "webdataset"])
def test_what_the_disk_cannot_read_now_is_not_given_up(tmp_path, payload):
    source, copy = make_run(tmp_path / "run", 100, payload=payload), LocalStorage(tmp_path / "copy")
    path = Path(source.url, FORMATS[payload].key(2))
    path.rename(tmp_path / "whole")
    path.symlink_to("/proc/self/mem")  # whose first bytes are an input/output error
    outcome = flashu("filter", source.url, copy.url, "--where", "true")
    assert outcome.code not in (0, 1), outcome
    assert f"cannot read {source.url}/data (shard 2): " in outcome.err
    assert 2 not in shards_with(copy, METADATA)
    (tmp_path / "whole").replace(path)
    assert flashu("filter", source.url, copy.url, "--where", "true").code == 0
    assert images_of(copy, payload) == images_of(source, payload)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ((), "nothing says what to keep; give --where EXPR, --min-score X, --dedup"),
        (("--min-score", "nan"), "--min-score is nan; a score is a probability, from 0 to 1"),
        (("--min-score", "1.01"), "--min-score is 1.01"),
        (("--min-score", "-0.5"), "--min-score is -0.5"),
        (("--where", ""), "--where is empty"),
        (("--where", "width >"), "--where cannot be read at its end"),
        (("--where", "widht > 3"), "there is no column widht; did you mean width?"),
        (("--where", "style > 3"), "style is text, and cannot be compared with 3"),
        (("--where", "tags == 'a'"), "tags is of type list"),
        (("--where", "len(prompt) > 3"), "functions cannot be called: len(prompt)"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(run, tmp_path, asked, told):
    assert_refused(flashu("filter", run.url, tmp_path / "copy", *asked), told)
    assert not (tmp_path / "copy").exists()


def test_a_run_without_the_columns_is_refused_with_how_to_get_them(tmp_path):
    source = make_run(tmp_path / "run", 40, vqa=False)
    outcome = flashu("filter", source.url, tmp_path / "copy", "--min-score", "0.5")
    assert_refused(outcome, "the column quality.vqa_score, which this run has not", "quality.vqa=true")
    assert not (tmp_path / "copy").exists()


def test_what_is_no_run_is_refused(run, tmp_path):
    assert_refused(flashu("filter", tmp_path / "none", tmp_path / "copy", "--dedup"), "holds no run (no run.json)")
    folder = Path(run.url)
    for destination in (folder, f"{folder}/", folder / ".." / folder.name):
        assert_refused(flashu("filter", folder, destination, "--dedup"), "is the run itself")
    for destination in (folder / "copy", folder / "data/x", folder.parent):
        assert_refused(flashu("filter", folder, destination, "--dedup"), "one lies in the other")
    (tmp_path / "link").symlink_to(folder)
    assert_refused(flashu("filter", folder, tmp_path / "link", "--dedup"), "is the run itself")
    assert_refused(flashu("filter", tmp_path / "link", folder / "copy", "--dedup"), "one lies in the other")


def test_an_incomplete_run_is_refused_unless_that_is_allowed(tmp_path):
    source, copy = make_run(tmp_path / "run", 160, omit={2}), tmp_path / "copy"
    refused = flashu("filter", source.url, copy, "--dedup")
    assert_refused(refused, "is not complete: 4 of 5 shards are committed", "`flashu run`", "--allow-incomplete")
    assert not copy.exists()
    assert flashu("filter", source.url, copy, "--dedup", "--allow-incomplete").code == 0
    assert sorted(shards_with(LocalStorage(copy), METADATA)) == [0, 1, 3, 4]
    assert flashu("status", copy).out.startswith(f"{copy}: incomplete\nshards     4 of 5 committed")
    assert flashu("report", copy).code == 0
    assert "State of the run: incomplete" in (copy / "README.md").read_text()
    refused = flashu("filter", copy, tmp_path / "second", "--where", "true")
    assert_refused(refused, f"it is all that {source.url} had when it was filtered", "--allow-incomplete")
    assert flashu("filter", copy, tmp_path / "second", "--where", "true", "--allow-incomplete").code == 0
    nothing = make_run(tmp_path / "nothing", 40, omit={0, 1})
    refused = flashu("filter", nothing.url, tmp_path / "third", "--dedup", "--allow-incomplete")
    assert_refused(refused, "has no shards yet")


def test_a_folder_that_holds_something_else_is_refused_by_what_differs(run, tmp_path):
    copy = tmp_path / "copy"
    flashu("filter", run.url, copy, "--where", "width > 300", "--min-score", "0.2")
    before = files_of(copy)
    for asked, told in (
        (("--where", "width > 400", "--min-score", "0.2"), "--where was 'width > 300' and is 'width > 400'"),
        (("--where", "width > 300", "--min-score", "0.3"), "--min-score was 0.2 and is 0.3"),
        (("--where", "width > 300"), "--min-score was 0.2 and is not given"),
        (("--where", "width > 300", "--min-score", "0.2", "--dedup"), "--dedup was not given and is 'quality_phash'"),
    ):
        assert_refused(flashu("filter", run.url, copy, *asked), "holds another filtered copy: ", told)
    asked = ("--where", "width > 300", "--min-score", "0.2")
    other = make_run(tmp_path / "other", 300, seed=1)
    refused = flashu("filter", other.url, copy, *asked)
    assert_refused(refused, f"{copy} is a filtered copy of {run.url}, and not of {other.url}")
    refused = flashu("filter", run.url, other.url, *asked)
    assert_refused(refused, f"{other.url} holds a run, and no filtered copy of one")
    (tmp_path / "strange/metadata").mkdir(parents=True)
    (tmp_path / "strange/metadata/shard-00000.parquet").write_bytes(b"x")
    refused = flashu("filter", run.url, tmp_path / "strange", *asked)
    assert_refused(refused, "strange holds metadata/ but no run.json")
    assert files_of(copy) == before


def test_a_run_that_has_changed_since_is_refused(tmp_path):
    source, copy = make_run(tmp_path / "run", 100), tmp_path / "copy"
    flashu("filter", source.url, copy, "--dedup")
    make_run(source, 100, seed=5)
    refused = flashu("filter", source.url, copy, "--dedup")
    assert_refused(refused, f"{copy} is a filtered copy of {source.url} as it was before", "other ones")
    make_run(source, 130)
    refused = flashu("filter", source.url, copy, "--dedup")
    assert_refused(refused, "it had 4 shards with 100 images and has 5 shards with 130 images")


def test_a_run_that_was_moved_is_the_same_run(tmp_path):
    source, copy = make_run(tmp_path / "run", 100), tmp_path / "copy"
    flashu("filter", source.url, copy, "--dedup")
    before = files_of(copy)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert flashu("filter", tmp_path / "moved", copy, "--dedup").code == 0
    assert files_of(copy) == before


def test_metadata_that_cannot_be_used_is_named_and_nothing_is_written(tmp_path):
    source, copy = make_run(tmp_path / "run", 100), tmp_path / "copy"
    good = source.get(metadata_key(2))
    for spoiled, told in (
        (good[:500], "cannot be used"),
        (b"", "cannot be used"),
        (make_run(tmp_path / "plain", 100, quality=False).get(metadata_key(2)), "it has no column quality_broken"),
    ):
        source.put(metadata_key(2), spoiled)
        refused = flashu("filter", source.url, copy, "--where", "not quality.broken")
        assert_refused(refused, f"{source.url}/{metadata_key(2)} cannot be used", told)
        assert not (copy / "run.json").exists()
    source.put(metadata_key(0), b"")
    refused = flashu("filter", source.url, copy, "--where", "not quality.broken")
    assert_refused(refused, "the metadata of shard 0 cannot be read as Parquet")


def test_a_damaged_column_that_decides_nothing_is_named(tmp_path):
    source = make_run(tmp_path / "run", 100)
    path = Path(source.url, metadata_key(2))
    spoiled, chunk = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0).column(1)
    assert chunk.path_in_schema == "prompt"
    start = chunk.dictionary_page_offset
    spoiled[start : start + 60] = bytes(60)
    path.write_bytes(spoiled)
    refused = flashu("filter", source.url, tmp_path / "copy", "--where", "width > 0")
    assert refused.code == 2, refused
    assert f"{path} cannot be used: " in refused.err


def test_statistics_of_another_version_are_refused_before_anything_is_written(tmp_path):
    source = make_run(tmp_path / "run", 100)
    table = pq.read_table(source.open(metadata_key(2)))
    footer = table.schema.metadata[FOOTER_KEY].replace(f'"version": {VERSION}'.encode(), b'"version": 0')
    pq.write_table(table.replace_schema_metadata({FOOTER_KEY: footer}), Path(source.url, metadata_key(2)))
    refused = flashu("filter", source.url, tmp_path / "copy", "--where", "width > 0")
    assert_refused(refused, f"{metadata_key(2)} cannot be used: statistics of version 0")
    assert not (tmp_path / "copy/run.json").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"config": {}}'])
@pytest.mark.parametrize("which", ["run", "copy"])
def test_a_run_json_that_is_none_is_refused(run, tmp_path, text, which):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/run.json").write_text(text)
    source, copy = (tmp_path / "odd", tmp_path / "copy") if which == "run" else (run.url, tmp_path / "odd")
    told = f"{tmp_path / 'odd'}/run.json is damaged, or not of a run of flashu"
    assert_refused(flashu("filter", source, copy, "--dedup"), told)


def test_a_folder_with_somebodys_readme_is_refused(run, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert_refused(flashu("filter", run.url, tmp_path, "--dedup"), "holds README.md but no run.json")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_copy_into_what_a_runs_folder_links_to_is_refused(tmp_path):
    source = make_run(tmp_path / "run", 40)
    shutil.move(tmp_path / "run/data", tmp_path / "disk")
    (tmp_path / "run/data").symlink_to(tmp_path / "disk")
    assert_refused(flashu("filter", source.url, tmp_path / "disk/copy", "--dedup"), "one lies in the other")


def test_a_run_does_not_go_on_in_a_filtered_copy(tmp_path):
    copy = tmp_path / "copy"
    flashu("filter", make_run(tmp_path / "run", 40).url, copy, "--dedup")
    before = files_of(copy)
    with pytest.raises(InputError, match="holds a filtered copy of a run; give another"):
        prepare(read_config("demo", [f"output.path={copy}"]))
    assert files_of(copy) == before


# --------------------------------------------------------------------------------------------------------------- S3


def test_from_and_to_s3(bucket, tmp_path):
    options = ("--endpoint-url", bucket.endpoint_url, "--path-style")
    s3 = S3Options(bucket.endpoint_url, path_style=True)
    source = make_run(open_storage(f"{bucket.url}/runs/first", s3), 100)
    local = make_run(tmp_path / "run", 100)
    assert flashu("filter", local.url, tmp_path / "copy", *ASKED).code == 0
    expected = {key: data for key, data in files_of(tmp_path / "copy").items() if "/" in key}
    for origin, destination in (
        (source.url, f"{bucket.url}/runs/first-filtered"),
        (local.url, f"{bucket.url}/up"),
        (source.url, str(tmp_path / "down")),
    ):
        outcome = flashu("filter", origin, destination, *ASKED, *options)
        assert outcome.code == 0, outcome
        copy = open_storage(destination, s3)
        assert {key: copy.get(key) for key in copy.list() if "/" in key} == expected
        assert read_run(copy)["filter"]["source"]["url"] == origin
    refused = flashu("filter", source.url, f"{source.url}/copy", *ASKED, *options)
    assert_refused(refused, "one lies in the other")
    secret = flashu("filter", "s3://key:secret@bucket/run", tmp_path / "x", "--dedup")
    assert_refused(secret, "an s3:// URL holds credentials")
    assert "secret@" not in secret.err
