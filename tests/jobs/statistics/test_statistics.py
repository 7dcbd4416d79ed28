"""Statistics of a run: equal to a count over all rows, in whatever order the shards arrive, at constant size."""

import json
import random
from dataclasses import asdict

import numpy as np
import pytest

from jobs.metrics.bins import Range
from jobs.metrics.pixels import METRICS
from jobs.statistics.mergeable import Distribution, Timeline, first_of
from jobs.statistics.run import (
    FAILURES,
    MAX_KINDS,
    OTHERS,
    SAMPLE,
    SLOWEST,
    RunStatistics,
    count_near_duplicates,
    error_kind,
)

START = 1_700_000_000.0


def row(shard, index, rng):
    broken = rng.random() < 0.02
    return {
        "prompt_id": f"p{shard}-{index // 2}",
        "prompt": f"a prompt of shard {shard} " * rng.choice([1, 40]),
        "image_index": index % 2,
        "seed": rng.getrandbits(63),
        "file_name": f"p{shard}-{index // 2}-{index % 2}.png",
        "size_bytes": rng.randint(1_000, 100_000),
        "truncated": rng.random() < 0.1,
        "seconds": rng.lognormvariate(0, 0.5),
        "quality_brightness": rng.random(),
        "quality_contrast": rng.random() / 2,
        "quality_sharpness": rng.lognormvariate(5, 1),
        "quality_colourfulness": rng.random() * 100,
        "quality_entropy": None if rng.random() < 0.05 else rng.random() * 8,
        "quality_broken": broken,
        "quality_phash": f"{rng.getrandbits(64):016x}",
        "quality_clip_score": 20 + 10 * rng.random(),
    }


def shard_inputs(shard, images=10, workers=4):
    rng = random.Random(shard)
    rows = [row(shard, index, rng) for index in range(images)]
    failures = [
        {
            "prompt_id": f"bad{shard}",
            "prompt": "x" * 5000,
            "error": f"ValueError: {shard} is odd",
            "shard": shard,
            "row": 7,
        }
    ][: shard % 2]
    started_at = START + shard * 3 + rng.random()
    work = {
        "shard": shard,
        "worker": f"worker-{shard % workers}",
        "node": f"node-{shard % workers % 2}",
        "attempt": 1 + (shard % 5 == 0),
        "gpus": 1.0,
        "started_at": started_at,
        "finished_at": started_at + 10 + rng.random(),
        "read_s": rng.random(),
        "wait_s": rng.random(),
        "generate_s": 10 * rng.random(),
        "encode_s": rng.random(),
        "write_s": rng.random(),
    }
    return rows, failures, work


def of_shard(shard, **kwargs):
    return RunStatistics.of_shard(*shard_inputs(shard, **kwargs))


def merged(parts):
    total = RunStatistics()
    for part in parts:
        total.merge(part)
    return total


def same(a, b):
    """Equal up to the rounding of floats."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == pytest.approx(b, rel=1e-9) if isinstance(a, float) else a == b


def as_dict(statistics):
    return json.loads(statistics.to_json())


def test_merged_shards_equal_a_count_over_all_rows():
    inputs = [shard_inputs(shard) for shard in range(60)]
    total = merged(RunStatistics.of_shard(*one) for one in inputs)
    rows = [(work["shard"], index, row) for rows, _, work in inputs for index, row in enumerate(rows)]
    works = [work for _, _, work in inputs]

    assert (total.shards, total.images, total.failed_prompts) == (60, 600, 30)
    assert total.prompts == 60 * 5 + 30
    assert total.truncated == sum(row["truncated"] for _, _, row in rows)
    assert total.broken == sum(row["quality_broken"] for _, _, row in rows)
    assert total.size_bytes == sum(row["size_bytes"] for _, _, row in rows)
    for name, metric in METRICS.items():
        if metric.range:
            values = np.array([v for _, _, row in rows if (v := row[f"quality_{name}"]) is not None])
            merged_metric = total.quality[name]
            assert merged_metric.count == len(values)
            assert merged_metric.mean == pytest.approx(values.mean())
            assert merged_metric.std == pytest.approx(values.std())
            assert (merged_metric.min, merged_metric.max) == (values.min(), values.max())
            inside = np.clip(values, metric.range.low, metric.range.high)
            assert merged_metric.histogram == np.histogram(inside, metric.range.edges())[0].tolist()
    assert total.quality["clip_score"].count == 600

    seconds = [row["seconds"] for _, _, row in rows]
    for share in (0.5, 0.9, 0.99):
        assert total.seconds.quantile(share) == pytest.approx(np.quantile(seconds, share), rel=0.08)
    slowest = sorted(rows, key=lambda item: -item[2]["seconds"])[:SLOWEST]
    assert [(image["shard"], image["row"]) for image in total.slowest] == [
        (shard, index) for shard, index, _ in slowest
    ]

    busy = sum(work["generate_s"] + work["wait_s"] for work in works)
    assert total.gpu_seconds_per_image == pytest.approx(busy / 600)
    assert total.stage_seconds["load"] == pytest.approx(sum(work["read_s"] for work in works))
    assert total.started_at == min(work["started_at"] for work in works)
    assert total.finished_at == max(work["finished_at"] for work in works)
    wall = total.finished_at - total.started_at
    assert total.active_s == pytest.approx(wall)
    assert total.images_per_second == pytest.approx(600 / wall)
    assert total.workers["worker-1"].images == 150
    assert total.retried_shards == 12


def test_the_order_of_merging_does_not_matter():
    parts = [of_shard(shard) for shard in range(150)]
    texts = [part.to_json() for part in parts]
    expected = as_dict(merged(map(RunStatistics.from_json, texts)))
    for seed in range(3):
        shuffled = random.Random(seed).sample(texts, len(texts))
        cut = 50 * seed
        left = merged(map(RunStatistics.from_json, shuffled[:cut]))
        left.merge(merged(map(RunStatistics.from_json, shuffled[cut:])))
        assert same(as_dict(left), expected)


def test_json_round_trip_keeps_everything():
    statistics = merged(of_shard(shard) for shard in range(20))
    again = RunStatistics.from_json(statistics.to_json())
    assert again == statistics
    assert RunStatistics.from_json(RunStatistics().to_json()) == RunStatistics()


def test_statistics_of_another_version_are_refused():
    with pytest.raises(ValueError, match="version 7"):
        RunStatistics.from_json('{"version": 7}')


def test_the_size_is_as_flat_at_three_thousand_shards_as_at_a_hundred():
    total, sizes = RunStatistics(), {}
    distinct = [of_shard(shard).to_json() for shard in range(100)]
    for shard in range(3_000):
        part = RunStatistics.from_json(distinct[shard % 100])
        part.timeline = Timeline.of(10, START + 3 * shard, START + 3 * shard + 10)
        for kept in (*part.sample, *part.slowest, *part.broken_images, *part.failures):
            kept["shard"] = shard
        total.merge(part)
        if shard + 1 in (10, 100, 3_000):
            sizes[shard + 1] = len(total.to_json())
    assert total.images == 30_000
    assert sizes[3_000] < 1.25 * sizes[100] < 100_000
    assert sizes[3_000] < 3 * sizes[10]


def test_many_workers_and_kinds_of_errors_are_folded_into_others(monkeypatch):
    monkeypatch.setattr("jobs.statistics.run.MAX_WORKERS", 100)
    parts = []
    for shard in range(150):
        rows, _, work = shard_inputs(shard, images=1)
        failure = {
            "prompt_id": "x",
            "prompt": None,
            "error": f"Error{'abcdefghij'[shard % 10]}{chr(65 + shard % 26)}",
            "shard": shard,
            "row": 0,
        }
        parts.append(RunStatistics.of_shard(rows, [failure], work | {"worker": f"w{shard:06}"}).to_json())
    forward, backward = (merged(map(RunStatistics.from_json, texts)) for texts in (parts, parts[::-1]))
    assert len(forward.workers) == 101
    assert forward.workers[OTHERS].images == 50
    assert len(forward.failure_kinds) == MAX_KINDS + 1
    assert sum(forward.failure_kinds.values()) == 150
    assert same(as_dict(forward), as_dict(backward))


def test_the_sample_is_uniform_over_shards_of_different_sizes():
    hits = 0
    for run in range(40):
        total = RunStatistics()
        for shard, images in ((1000 * run + 1, 90), (1000 * run + 2, 10)):
            total.merge(of_shard(shard, images=images))
        assert len(total.sample) == SAMPLE
        hits += sum(image["shard"] % 1000 == 2 for image in total.sample)
    assert 0.07 < hits / (40 * SAMPLE) < 0.13


def test_failures_are_the_first_by_shard_and_row_and_long_texts_are_cut():
    parts = [of_shard(shard) for shard in random.Random(0).sample(range(200), 200)]
    failures = merged(parts).failures
    assert [failure["shard"] for failure in failures] == list(range(1, 2 * FAILURES, 2))
    assert {len(failure["prompt"]) for failure in failures} == {300}


def test_errors_of_a_kind_are_counted_together():
    assert merged(of_shard(shard) for shard in range(10)).failure_kinds == {"ValueError": 5}
    assert error_kind("prompt of 700 characters\nmore") == error_kind("prompt of 12 characters")
    assert error_kind("  ") == "unknown"


def test_a_shard_whose_prompts_all_failed_counts_as_done_with_no_images():
    _, failures, work = shard_inputs(1)
    statistics = RunStatistics.of_shard([], failures, work)
    assert (statistics.shards, statistics.prompts, statistics.images) == (1, 1, 0)
    assert statistics.gpu_seconds_per_image is None
    assert statistics.images_per_second == 0


def test_a_run_that_has_just_begun_has_no_rates():
    empty = RunStatistics()
    assert (empty.images_per_second, empty.eta_s(10), empty.started_at, empty.seconds.quantile(0.5)) == (None,) * 4


def test_near_duplicates_are_pairs_within_a_shard_and_not_the_broken():
    hashes = ["ffffffffffffffff", "fffffffffffffff0", "ffffffffffffffe0", "0000000000000000"]
    assert count_near_duplicates(hashes) == 2  # 4 bits and 1 bit apart; the first and third differ in 5
    rows, failures, work = shard_inputs(0, images=3)
    for one in rows:
        one.update(quality_phash="8000000000000000", quality_broken=True)
    assert RunStatistics.of_shard(rows, failures, work).near_duplicates == 0


def test_near_duplicates_agree_with_a_count_of_all_pairs():
    rng = random.Random(0)
    hashes = [f"{rng.getrandbits(8):016x}" for _ in range(100)]
    pairs = [(int(a, 16) ^ int(b, 16)).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert count_near_duplicates(hashes) == sum(bits <= 4 for bits in pairs)


def test_timeline_spreads_a_shard_and_joins_seconds_when_they_are_many():
    timeline = Timeline.of(100, START + 0.5, START + 10.5)
    assert len(timeline.buckets) == 11
    assert timeline.active_s == pytest.approx(10)
    assert sum(bucket.images for bucket in timeline.buckets.values()) == pytest.approx(100)
    timeline.merge(Timeline.of(1000, START + 10.5, START + 1010.5))
    assert len(timeline.buckets) <= 240
    assert timeline.width_s == 8
    assert timeline.active_s == pytest.approx(1010)
    assert timeline.rate() == pytest.approx(1100 / 1010)
    assert timeline.rate(window_s=300) == pytest.approx(1, rel=1e-3)


def test_a_pause_between_attempts_is_not_active_time():
    timeline = Timeline.of(50, START, START + 50)
    timeline.merge(Timeline.of(50, START + 86_400, START + 86_450))
    assert timeline.active_s == pytest.approx(100)
    assert timeline.rate() == pytest.approx(1)


def test_eta_follows_the_rate_of_the_last_minutes():
    _, _, work = shard_inputs(0)
    slow = RunStatistics.of_shard([], [], work)
    slow.timeline = Timeline.of(1000, START, START + 1000)
    fast = RunStatistics.of_shard([], [], work)
    fast.timeline = Timeline.of(8000, START + 1000, START + 1800)
    assert merged([slow, fast]).eta_s(600) == pytest.approx(60, rel=0.01)


def test_numbers_that_are_missing_or_not_finite_are_left_out():
    distribution = Distribution.of([1.0, None, float("nan"), float("inf"), 3.0], Range(0, 4, bins=4))
    assert (distribution.count, distribution.mean, distribution.std) == (2, 2.0, 1.0)
    assert distribution.histogram == [0, 1, 0, 1]


def test_a_value_that_is_not_finite_can_still_be_stored():
    rows, failures, work = shard_inputs(0, images=1)
    rows[0].update(seconds=float("nan"), quality_clip_score=float("inf"))
    statistics = RunStatistics.from_json(RunStatistics.of_shard(rows, failures, work).to_json())
    assert (statistics.slowest, statistics.sample[0]["quality"]["clip_score"]) == ([], None)


def test_distributions_of_different_ranges_still_add_up():
    mine = Distribution.of([1.0] * 3, Range(0, 4, bins=4))
    mine.merge(Distribution.of([9.0] * 2, Range(0, 10, bins=10)))
    assert (mine.count, sum(mine.histogram), mine.max) == (5, 5, 9.0)


def test_merging_leaves_the_other_as_it_was():
    first, second = of_shard(1), of_shard(2)
    before = second.to_json()
    total = merged([first, second, of_shard(5), of_shard(6)])
    assert second.to_json() == before
    assert total.workers["worker-2"].shards == 2


def test_first_of_a_union_is_first_of_the_firsts():
    values = random.Random(0).sample(range(1000), 100)
    halves = first_of(values[:50], 10, abs) + first_of(values[50:], 10, abs)
    assert first_of(halves, 10, abs) == sorted(values)[:10]


def test_worker_statistics_are_plain_values():
    assert asdict(of_shard(3).workers["worker-3"])["node"] == "node-1"
