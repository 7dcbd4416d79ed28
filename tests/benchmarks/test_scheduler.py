"""The scheduler's benchmark, run as a user runs it, on few and short shards."""

import json

import pytest

from tests.command import benchmark


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("scheduler") / "result.json"
    done = benchmark("scheduler.py", "--quick", "-o", file)
    assert done.code == 0, done.err
    return json.loads(file.read_text()), done.out


def test_result_says_what_it_was_measured_on_and_holds_every_measure(measured):
    result, printed = measured
    assert all(result[key] for key in ("date", "cpu", "cpus", "python", "ray", "pyarrow"))
    for name in ("leases", "pool", "ray-data", "memory", "planning"):
        assert name in result
        assert f"\n{name} " in f"\n{printed}"


def test_pool_and_ray_data_do_the_same_work(measured):
    result, _ = measured
    (pool,), (ray_data,) = result["pool"], result["ray-data"]
    assert pool["workers"] == ray_data["workers"] == 2
    assert pool["shards"] == ray_data["shards"] == 12
    assert 0.1 < pool["efficiency"] <= 1  # the rest is up to who else uses this machine
    assert 0 < ray_data["efficiency"] <= 1
    assert pool["total_s"] > pool["start_s"] + pool["wall_s"]


def test_queue_hands_out_leases_by_the_hundred(measured):
    leases = measured[0]["leases"]
    assert leases["rules_per_s"] > 1_000
    assert leases["actor_per_s"] > 10


def test_memory_grows_by_one_byte_for_each_shard_in_the_queue_and_by_none_in_the_driver(measured):
    memory = measured[0]["memory"]
    small, large = memory["queue"]
    more = large["shards"] - small["shards"]
    assert large["bytes"] - small["bytes"] == pytest.approx(more, abs=2_000)
    assert large["peak_bytes"] - small["peak_bytes"] == pytest.approx(more, abs=20_000)
    few, many = memory["driver"]
    assert many["state_kib"] < 1.2 * few["state_kib"]
    assert many["peak_mib"] < few["peak_mib"] + 5


def test_planning_covers_every_row_of_every_file(measured):
    planning = measured[0]["planning"]
    assert planning["files"] == 20
    assert planning["rows"] == 20 * 100_000
    assert planning["shards"] == planning["rows"] / 64
    assert planning["open_s"] < 10
