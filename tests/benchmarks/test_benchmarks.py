"""The measuring scripts, run as a user runs them: what they count, and that they measure at all."""

import json

import pytest
import torch

from flashu.models.geometry import DEFAULT_VOCAB_SIZE
from tests.bounds import SUM
from tests.command import BENCHMARKS, benchmark


def run(*command):
    outcome = benchmark(*command)
    assert outcome.code == 0, outcome
    return outcome.out


def committed():
    """The counts of the committed result, by (preset, FlashU settings)."""
    result = json.loads((BENCHMARKS / "results" / "2026-11-25-flops.json").read_text())
    return {(each["preset"], each["flashu"]): each for each in result["counts"]}


def test_stock_image_takes_far_fewer_operations_than_the_release():
    """The release was counted independently at 523.2 TFLOP for this image, 10.68 an evaluation; its VAE at 2.0."""
    result = json.loads(run("flops.py", "--preset", "show-o2-1.5b", "--steps", 50, "--no-flashu", "--json"))
    assert result["tflop_per_image"] == pytest.approx(committed()["show-o2-1.5b", None]["tflop_per_image"], rel=1e-6)
    assert result["parts"]["VAE decode"] <= 0.8
    assert result["tflop_release_without_vae"] == pytest.approx(523.2, rel=0.001)
    assert result["tflop_release_without_vae"] / 49 == pytest.approx(10.68, rel=0.001)
    assert sum(result["parts"].values()) == pytest.approx(result["tflop_per_image"])


def test_accelerated_image_takes_far_fewer_operations_than_the_release():
    """The release with these settings was counted independently at 279.7 TFLOP."""
    result = json.loads(run("flops.py", "--preset", "show-o2-1.5b", "--flashu", "paper-1.5b", "--json"))
    assert result["tflop_per_image"] == pytest.approx(
        committed()["show-o2-1.5b", "paper-1.5b"]["tflop_per_image"], rel=1e-6
    )
    assert result["tflop_release_without_vae"] == pytest.approx(279.7, rel=0.001)
    steps = result["tflop_per_step"]
    assert len(steps) == 34
    assert max(steps[5:9]) < 0.001, "a step that reuses the head's output runs one small linear layer"
    assert sum(steps) + result["parts"]["VAE decode"] == pytest.approx(result["tflop_per_image"], rel=1e-9)


def test_the_mean_over_prompts_is_that_of_their_single_counts(tmp_path):
    """Exactly, from a few counts; an empty prompt and one that is cut are no exception."""
    lengths, file = {0: 2, 3: 1, 17: 4, 40: 1, 60: 1, 99: 2}, tmp_path / "lengths.json"
    file.write_text(json.dumps({"prompts_of_tokens": lengths}))
    base = ("flops.py", "--preset", "embedded", "--flashu", "embedded", "--json")
    result = json.loads(run(*base, "--lengths", file))
    assert result["prompts"] == {
        "count": 11, "text_tokens": {"mean": pytest.approx(369 / 11), "median": 17, "least": 0, "most": 99}, "cut": 2
    }  # fmt: skip
    read = {length: min(length, 60) for length in lengths}
    singles = {length: json.loads(run(*base, "--prefix", 2 + length)) for length in set(read.values())}
    for key in ("tflop_per_image", "prefix_tokens"):
        mean = sum(times * singles[read[length]][key] for length, times in lengths.items()) / 11
        assert result[key] == pytest.approx(mean, rel=1e-9), key


def test_lengths_are_counted_by_the_tokenizer_that_is_given(tmp_path):
    prompts, file = tmp_path / "prompts.txt", tmp_path / "lengths.json"
    prompts.write_text("a red circle\na blue square\na\n")
    file.write_text(run("flops.py", "--count-lengths", prompts, "--tokenizer", "embedded"))
    counted = json.loads(file.read_text())
    assert counted["prompts_of_tokens"] == {"1": 1, "3": 2}
    assert counted["text_tokens"] == {"mean": pytest.approx(7 / 3), "median": 3, "least": 1, "most": 3}
    told = run("flops.py", "--preset", "embedded", "--lengths", file)
    assert "prefix 4.333 tokens, the mean of 3 prompts of 3 to 5; FlashU: off" in told


def test_the_prompts_of_dpg_bench_are_short_enough_and_cost_little_more_than_the_tables():
    file = BENCHMARKS / "results" / "2026-11-28-dpg-lengths.json"
    lengths = json.loads(file.read_text())
    assert sum(lengths["prompts_of_tokens"].values()) == lengths["count"] == 1065
    assert lengths["vocabulary"] == DEFAULT_VOCAB_SIZE
    result = json.loads(run("flops.py", "--flashu", "few-steps", "--lengths", file, "--json"))
    assert result["prompts"] == {"count": 1065, "text_tokens": lengths["text_tokens"], "cut": 0}
    table = committed()["show-o2-1.5b", "few-steps"]["tflop_per_image"]
    assert result["tflop_per_image"] / table == pytest.approx(1.0025, abs=0.0001)


def test_generate_times_both_arms_in_one_run(tmp_path):
    file = tmp_path / "result.json"
    arguments = ("--preset", "embedded", "--batch-size", 1, 2, "--repeats", 1, "--device", "cpu", "--json", file)
    run("generate.py", *arguments, "--flashu", "fast")
    result = json.loads(file.read_text())
    assert [(entry["batch_size"], entry["arm"]) for entry in result["runs"]] == [
        (1, "stock"), (1, "fast"), (2, "stock"), (2, "fast"),
    ]  # fmt: skip
    assert all(entry["images_per_s"] > 0 and entry["peak_memory_gib"] > 0 for entry in result["runs"])
    assert [entry["speed_up"] == 1 for entry in result["runs"]] == [True, False, True, False]
    assert result["cpu"]
    assert result["torch"]


def test_every_layout_of_an_ffn_makes_the_same_numbers_and_is_timed(tmp_path):
    file = tmp_path / "result.json"
    arguments = ("--preset", "embedded", "--dtype", "float32", "--backend", "eager", "--repeats", 2, "--device", "cpu")
    threads = torch.get_num_threads()
    try:
        run("ffn_layout.py", *arguments, "--json", file)
    finally:
        torch.set_num_threads(threads)
    entries = json.loads(file.read_text())["runs"]
    kept, whole = sorted({entry["run"] for entry in entries})
    assert kept < whole
    assert [(entry["run"], entry["compiled"], entry["way"]) for entry in entries] == [
        (neurons, compiled, way)
        for neurons in (kept, whole)
        for compiled in (False, True)
        for way in ("two", "one", "interleaved")
    ]
    for entry in entries:
        assert entry["seconds"] > 0
        assert entry["relative_difference"] < SUM
        assert entry["share"] == 1 or entry["way"] != "two"


def test_answering_is_far_faster_with_the_image_read_once(tmp_path):
    file = tmp_path / "result.json"
    run(
        "answering.py",
        "speed",
        "--preset",
        "embedded",
        "--repeats",
        1,
        "--tokens",
        8,
        "--device",
        "cpu",
        "--json",
        file,
    )
    (row,) = json.loads(file.read_text())["runs"]
    assert row["same_answers"] == 20
    assert row["speed_up"] > 5, "it was 21; a busy machine disturbs either way"


def test_accelerated_answers_take_fewer_operations():
    lines = run("answering.py", "flop", "--preset", "show-o2-1.5b", "--tokens", 2).splitlines()
    tflop = [float(line.split()[-2]) for line in lines]
    assert all(accelerated < tflop[0] for accelerated in tflop[1:])
    assert tflop[1] == pytest.approx(3.364, rel=0.001)


def test_compiling_counts_what_prompts_compile_after_a_workers_warm_up(tmp_path, monkeypatch):
    """With settings that take few graphs; of the others, `tests/jobs/worker/test_warm_up.py` asks the same."""
    monkeypatch.setenv("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")  # slower than what it saves here
    prompts, file = tmp_path / "prompts.txt", tmp_path / "result.json"
    prompts.write_text("\n".join(" ".join(["word"] * length) for length in (9, 43, 57, 9, 113)))
    arguments = ("--trace-only", "--flashu", "few-steps", "--batch-size", 2, "--prompts", prompts, "--count", 5)
    run("compiling.py", *arguments, "--device", "cpu", "--json", file)
    result = json.loads(file.read_text())
    assert result["prompts"] == {
        "file": "prompts.txt", "count": 5, "words": {"least": 9, "median": 43, "most": 113, "different": 4}
    }  # fmt: skip
    worker = result["workers"]["second"]
    assert worker["images"] == 5 + 3
    assert worker["warm_up_graphs"] > 5
    assert worker["graphs_after_warm_up"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("compiling.py", "--prompts", __file__, "--count", 1000),
        ("flops.py", "--steps", 1),
        ("flops.py", "--size", 100),
        ("flops.py", "--lengths", __file__),
        ("flops.py", "--lengths", "nowhere.json"),
        ("flops.py", "--count-lengths", __file__, "--tokenizer", "embedded"),
        ("flops.py", "--count-lengths", "prompts.txt"),
        ("ffn_layout.py", "--repeats", 1),
        ("generate.py", "--size", 7),
        ("generate.py", "--flashu", "fast", "--steps", 50),
        ("paired.py", "nowhere"),
        ("paired.py", BENCHMARKS.parent, "--preset", "small"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_line(arguments):
    refused = benchmark(*arguments)
    assert refused.code == 2
    usage, _, told = refused.err.partition(f"{arguments[0]}: error: ")
    assert usage.startswith("usage: ")
    assert told.count("\n") == 1


def test_two_checkouts_are_timed_in_turns_and_make_the_same(tmp_path):
    """Here this one and itself."""
    file = tmp_path / "result.json"
    lines = run("paired.py", BENCHMARKS.parent, "--preset", "embedded", "--pairs", 2, "--json", file)
    result = json.loads(file.read_text())
    assert [(each["arm"], each["batch_size"]) for each in result["runs"]] == [
        ("stock", 1), ("flashu", 1), ("stock", 8), ("flashu", 8)
    ]  # fmt: skip
    for each in result["runs"]:
        assert each["sum_of_latents"]["before"] == each["sum_of_latents"]["after"] != 0
        assert 0.2 < each["speed_up"] < 5
        assert f"{each['speed_up']:.3f}x" in lines
