"""What a worker does with a shard, in this process and without Ray: which images it makes, and which it gives up.

The model is the built-in one at 64 pixels. Faults are raised in its pipeline, where a GPU would raise them.
"""

import hashlib
import io
import json
import re
import threading
from bisect import bisect_left

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.open_storage import open_storage
from cluster.work import Lease, Place, SetupError, Times, WorkerBrokenError
from flashu import OutOfMemoryError
from flashu.errors import InputError
from flashu.models.blocks import AS_THEY_ARE, Blocks
from flashu.pending import PendingPictures
from flashu.pipeline import TextToImagePipeline
from jobs.dataset.records import image_seed
from jobs.driver.prepare import prepare
from jobs.driver.run import generation_work
from jobs.settings.config import read_config
from jobs.statistics.run import FOOTER_KEY, RunStatistics
from tests.command import flashu

SIX = [f"prompt number {number}" for number in range(6)]  # of one length, so that batches follow the rows

SCORED = ("quality.enabled=true", "quality.vqa=true")

FIRST = Lease(id=1, shard=0, attempt=1)


@pytest.fixture
def shard(tmp_path):
    """One shard of rows, done by a worker that is set up: an object with `do()` and what came of it."""

    def make(columns, *overrides, run="run"):
        count = len(columns["prompt"])
        pq.write_table(pa.table({"prompt_id": [f"id-{row}" for row in range(count)]} | columns), tmp_path / "m.parquet")
        return _Shard(tmp_path / "m.parquet", tmp_path / run, overrides)

    return make


class _Shard:
    def __init__(self, manifest, output, overrides):
        self.output = output
        settings = [f"manifest.path={manifest}", f"output.path={output}", "flashu.preset=off"]
        settings += ["sampling.num_inference_steps=2", "sampling.size=64", "quality.enabled=false", *overrides]
        self.work = generation_work(prepare(read_config(None, settings)))
        self.identity = self.work.setup(Place("worker-7", "node-3", 0.0))
        self.ran = []

    def do(self, lease=FIRST):
        """Read, process, encode and write the shard as a worker does."""
        self.ran = []
        results = self.work.process(lease, self.work.read(lease), self.ran.append)
        times = Times(started_at=1_700_000_000.0, read_s=0.1, wait_s=0.2, process_s=1.0)
        self.report = self.work.write(lease, self.work.encode(results), times)
        return self

    @property
    def metadata(self):
        return pq.read_table(self.output / "metadata/shard-00000.parquet").to_pylist()

    @property
    def pictures(self):
        """{(id, index): bytes}"""
        rows = pq.read_table(self.output / "data/shard-00000.parquet").to_pylist()
        return {(row["prompt_id"], row["image_index"]): row["image"]["bytes"] for row in rows}

    @property
    def failures(self):
        """{id: error}"""
        file = self.output / "failures/shard-00000.parquet"
        return {row["prompt_id"]: row["error"] for row in pq.read_table(file).to_pylist()} if file.exists() else {}


@pytest.fixture
def pipeline_raises(monkeypatch):
    """Makes the pipeline raise what `fault(prompts)` returns, if it returns something; logs the calls."""
    calls, original = [], TextToImagePipeline.submit

    def install(fault):
        def call(self, prompts, **options):
            calls.append(list(prompts))
            if error := fault(prompts):
                raise error
            return original(self, prompts, **options)

        monkeypatch.setattr(TextToImagePipeline, "submit", call)
        return calls

    return install


# ----------------------------------------------------------------------------------------------- rows and images


def test_a_rows_own_seed_count_guidance_and_negative_prompt_arrive(shard):
    done = shard(
        {
            "prompt": ["a fox", "a cat"],
            "seed": [40, None],
            "num_images": [2, None],
            "guidance_scale": [1.0, None],
            "negative_prompt": ["", None],
        },
        "sampling.seed=9",
        "sampling.negative_prompt=blurry",
    ).do()
    seed = image_seed(9, "id-1", 0, None)
    keys = ("prompt_id", "image_index", "seed", "guidance_scale", "negative_prompt")
    assert [tuple(row[key] for key in keys) for row in done.metadata] == [
        ("id-0", 0, 40, 1.0, ""),
        ("id-0", 1, 41, 1.0, ""),
        ("id-1", 0, seed, 2.5, "blurry"),  # the model's own
    ]
    assert len(set(done.pictures.values())) == 3


def test_each_of_them_changes_the_picture_and_nothing_else_does(shard):
    def picture(**columns):
        run = "-".join(map(str, columns.values()))
        done = shard({"prompt": ["a fox"]} | {name: [value] for name, value in columns.items()}, run=run).do()
        return done.pictures["id-0", 0]

    plain = picture(seed=1, guidance_scale=5.0, negative_prompt="")
    assert picture(seed=1, guidance_scale=5.0, negative_prompt="", source="web") == plain
    others = [
        picture(seed=2, guidance_scale=5.0, negative_prompt=""),
        picture(seed=1, guidance_scale=6.0, negative_prompt=""),
        picture(seed=1, guidance_scale=5.0, negative_prompt="a dog"),
    ]
    assert len({plain, *others}) == 4


def test_carried_columns_come_through_untouched(shard):
    tags, when = [["a", "b"], None], pa.array([1_700_000_000_000_000, None], pa.timestamp("us", "UTC"))
    done = shard({"prompt": ["a fox", "a cat"], "tags": tags, "when": when, "score": [0.1, None]}).do()
    metadata = pq.read_table(done.output / "metadata/shard-00000.parquet")
    assert metadata["tags"].to_pylist() == tags
    assert metadata["when"].combine_chunks() == when
    assert metadata["score"].to_pylist() == [0.1, None]
    payload = pq.read_table(done.output / "data/shard-00000.parquet", columns=["tags", "when", "score"])
    assert payload.equals(metadata.select(["tags", "when", "score"]).replace_schema_metadata(payload.schema.metadata))


def test_a_metadata_row_says_what_made_the_image(shard):
    done = shard({"prompt": ["a fox"]}, "quality.enabled=true").do(Lease(5, 0, attempt=2))
    (row,) = done.metadata
    (data,) = done.pictures.values()
    times = {name: row.pop(name) for name in ("seconds", "sha256", "size_bytes", "model_fingerprint")}
    quality = {name: row.pop(name) for name in list(row) if name.startswith("quality_")}
    assert row == {
        "prompt_id": "id-0",
        "prompt": "a fox",
        "negative_prompt": "",
        "image_index": 0,
        "seed": image_seed(0, "id-0", 0, None),
        "width": 64,
        "height": 64,
        "file_name": "id-0-0.png",
        "truncated": False,
        "model": "embedded",
        "dtype": "float32",
        "num_inference_steps": 2,
        "guidance_scale": 2.5,
        "time_shift": 3.0,
        "flashu": "off",
        "batch_size": 1,
        "worker": "worker-7",
        "node": "node-3",
        "attempt": 2,
    }
    assert times["sha256"] == hashlib.sha256(data).hexdigest()
    assert times["size_bytes"] == len(data)
    assert 0 < times["seconds"] < 60
    assert len(times["model_fingerprint"]) == 64
    assert done.identity.startswith(f"model {times['model_fingerprint'][:16]}, VAE ")
    assert set(quality) == {
        f"quality_{name}"
        for name in ("brightness", "contrast", "sharpness", "colourfulness", "entropy", "broken", "phash")
    }


def test_a_row_made_with_flashu_says_its_settings(shard):
    given = ("preset=fast", "r_p=0", "tau=1", "schedule=[[2,5]]", "solver_order=2")
    done = shard({"prompt": ["a fox"]}, *(f"flashu.{setting}" for setting in given)).do()
    (row,) = done.metadata
    settings = json.loads(row["flashu"])
    assert (settings["r_p"], settings["r_LS"], settings["tau"], settings["schedule"]) == (0, 0.3, 1, [[2, 5.0]])
    assert settings["solver_order"] == 2
    assert row["guidance_scale"] is None  # the schedule sets it
    assert row["num_inference_steps"] == 2


def test_the_report_and_the_footer_hold_the_shards_statistics(shard):
    done = shard({"prompt": ["a fox", "", "a cat"]}).do()
    footer = pq.read_schema(done.output / "metadata/shard-00000.parquet").metadata[FOOTER_KEY]
    assert done.report == {"shard": 0, "statistics": footer.decode(), "images": 2, "raised": 0}
    statistics = RunStatistics.from_json(footer)
    assert (statistics.images, statistics.prompts, statistics.failed_prompts) == (2, 3, 1)


def test_the_vqa_score_is_what_the_model_says_of_the_stored_image(shard):
    prompts = ["a red circle", "two blue squares", "a green triangle"]
    done = shard({"prompt": prompts, "num_images": [2, 1, 1]}, *SCORED, "sampling.num_inference_steps=8").do()
    pictures = [Image.open(io.BytesIO(done.pictures[row["prompt_id"], row["image_index"]])) for row in done.metadata]
    questions = [f"Does the image show: {row['prompt']}?" for row in done.metadata]
    by_hand = TextToImagePipeline.from_pretrained("embedded", device="cpu").yes_probability(pictures, questions)
    scores = [row["quality_vqa_score"] for row in done.metadata]
    assert scores == pytest.approx(by_hand, abs=1e-4)
    assert len(set(scores)) == 4
    assert flashu("report", done.output).code == 0
    summary = json.loads((done.output / "summary.json").read_text())["quality"]["vqa_score"]
    assert (summary["count"], summary["mean"]) == (4, pytest.approx(sum(scores) / 4))
    meaning = "own probability that the image shows its prompt, 0 to 1."
    assert meaning in (done.output / "report.html").read_text()
    (column,) = re.findall("^.*`quality_vqa_score`.*$", (done.output / "README.md").read_text(), re.MULTILINE)
    assert meaning in column


def test_an_accelerated_model_scores_unaccelerated(shard):
    preset = ("flashu.preset=fast", "flashu.tau=1")
    done = shard({"prompt": ["a red circle"]}, *SCORED, *preset, "sampling.num_inference_steps=8").do()
    picture = Image.open(io.BytesIO(done.pictures["id-0", 0]))
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    by_hand = pipe.yes_probability(picture, "Does the image show: a red circle?")
    assert done.metadata[0]["quality_vqa_score"] == pytest.approx(by_hand, abs=1e-4)


def test_all_of_a_wide_image_is_shown_to_the_model_that_scores_it(shard):
    done = shard({"prompt": ["a red circle"]}, *SCORED, "sampling.size=128x64").do()
    picture = Image.open(io.BytesIO(done.pictures["id-0", 0]))
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    question = "Does the image show: a red circle?"
    whole, cropped = (pipe.yes_probability(picture, question, fit=fit) for fit in ("letterbox", "crop"))
    assert abs(whole - cropped) > 1e-3
    assert done.metadata[0]["quality_vqa_score"] == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("prompt", ["a long story " * 300, "狐" * 500, "🦊" * 500, "x" * 5000])
def test_a_prompt_too_long_for_a_question_is_scored_by_its_beginning(shard, prompt):
    done = shard({"prompt": [prompt]}, *SCORED).do()
    assert not done.failures
    picture = Image.open(io.BytesIO(done.pictures["id-0", 0]))
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")

    def asked(length):
        return pipe.yes_probability(picture, f"Does the image show: {prompt[:length]}?")

    def fits(length):
        try:
            return asked(length) is not None
        except InputError:
            return False

    longest = bisect_left(range(1, len(prompt)), True, key=lambda length: not fits(length))
    assert 10 < longest < 300
    assert done.metadata[0]["quality_vqa_score"] == pytest.approx(asked(longest), abs=1e-4)


@pytest.mark.parametrize("override", ["quality.vqa=false", "quality.enabled=false"])
def test_without_the_setting_there_is_no_vqa_score(shard, override):
    done = shard({"prompt": ["a fox"]}, *SCORED, override).do()
    assert "quality_vqa_score" not in done.metadata[0]
    assert "vqa_score" not in RunStatistics.from_json(done.report["statistics"]).quality


def test_a_long_prompt_is_cut_and_marked(shard):
    done = shard({"prompt": ["a fox", "a long story " * 300]}).do()
    assert [row["truncated"] for row in done.metadata] == [False, True]


def test_a_shard_done_twice_writes_the_same_images(shard):
    made = shard({"prompt": SIX}, "sampling.batch_size=4")
    assert made.do().pictures == made.do(Lease(2, 0, 2)).pictures


# ----------------------------------------------------------------------------------------------------- bad prompts


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": ["a fox", ""]}, "prompt is empty"),
        ({"prompt": ["a fox", " \n"]}, "prompt is empty"),
        ({"prompt": ["a fox", "a cat"], "num_images": [None, 0]}, "num_images must be between 1 and 10,000, not 0"),
        ({"prompt": ["a fox", "a cat"], "num_images": [None, 10**6]}, "num_images must be between 1 and 10,000"),
        ({"prompt": ["a fox", "a cat"], "guidance_scale": [None, -1.0]}, "guidance_scale must be a finite number"),
        ({"prompt": ["a fox", "a cat"], "guidance_scale": [None, float("nan")]}, "guidance_scale must be a finite"),
        ({"prompt": ["a fox", "a cat"], "seed": [None, -1]}, "seed must be between 0 and 2^63 - 1"),
    ],
)
def test_a_row_that_cannot_be_made_fails_with_the_reason_and_the_others_are_made(shard, columns, reason):
    done = shard(columns).do()
    assert set(done.pictures) == {("id-0", 0)}
    assert list(done.failures) == ["id-1"]
    assert done.failures["id-1"].startswith(reason)


class Gpu:
    """Has the pipeline behave as on a GPU: pictures are done once somebody waits for them. `log` tells what happened.

    Waiting for batch number `fails_at`, from 1, raises an error of the device.
    """

    def __init__(self, monkeypatch, fails_at=None, room=None):
        self.log, self.room = [], room
        submit, wait = TextToImagePipeline.submit, PendingPictures.wait
        numbers, done = {}, set()

        def submitted(pipe, prompts, **options):
            if room and len(prompts) + len(numbers) - len(done) > room:
                self.log.append("full")
                raise OutOfMemoryError("full")
            pending = submit(pipe, prompts, **options)
            numbers[pending] = len(numbers) + 1
            self.log.append(f"begin {numbers[pending]}")
            return pending

        def waited(pending):
            if threading.current_thread() is threading.main_thread():
                self.log.append(f"wait {numbers[pending]}")
                if numbers[pending] == fails_at:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
                done.add(pending)
            return wait(pending)

        monkeypatch.setattr(TextToImagePipeline, "submit", submitted)
        monkeypatch.setattr(PendingPictures, "wait", waited)
        monkeypatch.setattr(PendingPictures, "done", property(lambda pending: pending in done))


def test_a_gpu_has_the_next_batch_before_the_last_is_waited_for(shard, monkeypatch):
    gpu = Gpu(monkeypatch)
    done = shard({"prompt": SIX}, "sampling.batch_size=2").do()
    assert gpu.log == ["begin 1", "begin 2", "wait 1", "begin 3", "wait 2", "wait 3"]
    assert done.ran == [[0, 1], [0, 1, 2, 3], [2, 3, 4, 5]], "what may bring the device down, both batches"
    assert len(done.pictures) == 6


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_device_error_that_comes_late_breaks_the_worker_before_the_shard_is_done(shard, monkeypatch, fails_at):
    Gpu(monkeypatch, fails_at)
    made = shard({"prompt": SIX}, "sampling.batch_size=2")
    with pytest.raises(WorkerBrokenError, match="illegal memory access"):
        made.do()
    assert not (made.output / "metadata").exists()


def test_a_suspect_runs_with_no_other_batch_beside_it(shard, monkeypatch):
    gpu = Gpu(monkeypatch)
    done = shard({"prompt": SIX}, "sampling.batch_size=2").do(Lease(2, 0, 2, alone=frozenset({1, 4})))
    assert gpu.log == ["begin 1", "begin 2", "wait 1", "wait 2", "begin 3", "wait 3", "begin 4", "wait 4"]
    assert done.ran == [[0, 2], [0, 2, 3, 5], [1], [4]]


@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_that_does_not_fit_beside_another_is_made_after_it_and_so_are_all_later_ones(shard, monkeypatch, size):
    gpu = Gpu(monkeypatch, room=size)
    done = shard({"prompt": SIX[: 3 * size]}, f"sampling.batch_size={size}").do()
    assert gpu.log == ["begin 1", "full", "wait 1", "begin 2", "wait 2", "begin 3", "wait 3"]
    assert {row["batch_size"] for row in done.metadata} == {size}
    assert len(done.pictures) == 3 * size


def test_a_prompt_that_always_raises_is_given_up_alone_after_a_second_chance(shard, pipeline_raises):
    quiet = shard({"prompt": SIX}, "sampling.batch_size=1").do().pictures
    calls = pipeline_raises(lambda prompts: ValueError("no\nidea") if SIX[2] in prompts else None)
    done = shard({"prompt": SIX}, "sampling.batch_size=4").do()
    assert done.failures == {"id-2": "ValueError: no idea"}
    assert calls == [SIX[:4], SIX[:1], SIX[1:2], SIX[2:3], SIX[2:3], SIX[3:4], SIX[4:]]
    assert done.ran == [[0, 1, 2, 3], [0], [1], [2], [3], [4, 5]]
    made = done.pictures
    assert set(made) == quiet.keys() - {("id-2", 0)}
    alone = [("id-0", 0), ("id-1", 0), ("id-3", 0)]  # made by themselves in both runs
    assert [made[key] for key in alone] == [quiet[key] for key in alone]
    statistics = RunStatistics.from_json(done.report["statistics"])
    assert (statistics.prompts, statistics.images, statistics.failed_prompts) == (6, 5, 1)


def test_a_prompt_that_raises_once_has_its_image(shard, pipeline_raises):
    quiet = shard({"prompt": ["a fox"]}).do().pictures
    calls = pipeline_raises(lambda prompts: ValueError("once") if len(calls) == 1 else None)
    done = shard({"prompt": ["a fox"]}).do()
    assert done.pictures == quiet
    assert not done.failures


def test_a_prompt_is_given_up_with_all_its_images(shard, pipeline_raises):
    calls = pipeline_raises(lambda prompts: ValueError("no") if len(calls) in (2, 3) else None)
    done = shard({"prompt": ["a fox"], "num_images": [3]}, "sampling.batch_size=2").do()
    assert done.failures == {"id-0": "ValueError: no"}  # though its first two images were made
    assert done.metadata == []
    assert not (done.output / "data").exists() or not list((done.output / "data").iterdir())


def test_failures_of_an_earlier_attempt_do_not_outlive_a_good_one(shard, pipeline_raises):
    calls = pipeline_raises(lambda prompts: ValueError("no") if len(calls) <= 2 else None)
    made = shard({"prompt": ["a fox"]})
    assert made.do().failures == {"id-0": "ValueError: no"}
    assert made.do(Lease(2, 0, 2)).failures == {}
    assert len(made.metadata) == 1


def test_a_prompt_given_up_by_the_queue_is_not_run(shard, pipeline_raises):
    calls = pipeline_raises(lambda prompts: None)
    done = shard({"prompt": SIX[:3]}).do(Lease(4, 0, 4, given_up={1: "its worker died"}))
    assert done.failures == {"id-1": "its worker died"}
    assert calls == [[SIX[0], SIX[2]]]


def test_prompts_in_doubt_run_last_and_by_themselves(shard):
    done = shard({"prompt": SIX, "num_images": [1, 2, 1, 1, 1, 1]}).do(Lease(4, 0, 4, alone=frozenset({1, 3})))
    assert done.ran == [[0, 2, 4, 5], [1], [3]]
    assert [row["prompt_id"] for row in done.metadata] == ["id-0", "id-1", "id-1", "id-2", "id-3", "id-4", "id-5"]


# ---------------------------------------------------------------------------------------------------- bad devices


def test_when_memory_runs_out_batches_are_halved_and_every_image_is_made(shard, pipeline_raises):
    calls = pipeline_raises(lambda prompts: OutOfMemoryError("out of memory") if len(prompts) > 2 else None)
    made = shard({"prompt": SIX}, "sampling.batch_size=6")
    done = made.do()
    assert len(done.pictures) == 6
    assert not done.failures
    assert {row["batch_size"] for row in done.metadata} <= {1, 2}
    calls.clear()
    made.do(Lease(2, 0, 2))  # what did not fit is not tried again
    assert max(map(len, calls)) <= 2


def test_when_memory_runs_out_while_scoring_batches_are_halved_and_every_image_is_scored(shard, monkeypatch):
    original = TextToImagePipeline.yes_probability

    def call(self, images, questions, **options):
        if len(images) > 2:
            raise OutOfMemoryError("out of memory")
        return original(self, images, questions, **options)

    monkeypatch.setattr(TextToImagePipeline, "yes_probability", call)
    done = shard({"prompt": SIX}, *SCORED, "sampling.batch_size=6").do()
    assert [row["prompt_id"] for row in done.metadata] == [f"id-{row}" for row in range(6)]
    assert {row["batch_size"] for row in done.metadata} <= {1, 2}
    assert all(0 < row["quality_vqa_score"] < 1 for row in done.metadata)


def test_one_image_that_does_not_fit_breaks_the_worker(shard, pipeline_raises):
    pipeline_raises(lambda prompts: OutOfMemoryError("out of memory on cuda"))
    with pytest.raises(WorkerBrokenError, match="out of memory on cuda"):
        shard({"prompt": SIX}).do()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_device_error_breaks_the_worker_and_no_prompt_is_blamed(shard, pipeline_raises, at):
    def fault(prompts):
        if len(calls) == at:
            return RuntimeError("CUDA error: an illegal memory access was encountered")
        return ValueError("no") if len(calls) < at else None

    calls = pipeline_raises(fault)
    made = shard({"prompt": SIX})
    with pytest.raises(WorkerBrokenError, match="CUDA error: an illegal memory access"):
        made.do()
    assert not (made.output / "metadata").exists()
    assert not made.failures


def test_memory_that_runs_out_at_the_second_chance_is_no_fault_of_the_prompt(shard, pipeline_raises):
    calls = pipeline_raises(lambda prompts: [ValueError("no"), OutOfMemoryError("full")][len(calls) - 1])
    with pytest.raises(WorkerBrokenError, match="full"):
        shard({"prompt": ["a fox"]}).do()
    assert len(calls) == 2


# ---------------------------------------------------------------------------------------------------------- setup


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.path=/no/such/model", "no such checkpoint folder: /no/such/model"),
        ("model.tokenizer=/no/such/words", "no such checkpoint folder: /no/such/words"),
        ("model.dtype=int7", "dtype int7 is not supported"),
        ("flashu.scores=/no/such/scores", "/no/such/scores"),
        ("sampling.size=100", "next to 100 are 96 and 112"),
    ],
)
def test_what_no_worker_can_load_stops_the_run_with_its_reason(shard, override, told):
    preset = ["flashu.preset=paper-1.5b", "flashu.tau=1"] if "scores" in override else []
    with pytest.raises((SetupError, ValueError), match=told):
        shard({"prompt": ["a fox"]}, *preset, override)


def test_a_run_in_float8_says_so_and_is_told_apart_from_the_same_weights_in_bfloat16(shard):
    runs = {name: shard({"prompt": ["a fox"]}, f"model.dtype={name}", run=name) for name in ("float8", "bfloat16")}
    (row,) = runs["float8"].do().metadata
    assert row["dtype"] == "float8"
    assert runs["float8"].identity == runs["bfloat16"].identity.replace("bfloat16", "float8")


@pytest.mark.parametrize("mode", ["auto", "max"])
def test_where_blocks_do_not_compile_a_run_goes_on_without_unless_it_was_told_to(shard, monkeypatch, mode):
    def compiler(block):
        def call(*arguments):
            raise NotImplementedError("no such kernel")

        return call

    monkeypatch.setattr("flashu.models.blocks.compile_blocks", lambda mode, device: (
        AS_THEY_ARE if mode == "off" else Blocks.through(compiler)
    ))  # fmt: skip
    if mode == "max":
        with pytest.raises(NotImplementedError, match="no such kernel"):
            shard({"prompt": ["a fox"]}, "model.compile=max")
    else:
        assert len(shard({"prompt": ["a fox"]}).do().pictures) == 1


def test_a_worker_that_does_not_see_the_drivers_folder_stops_the_run(shard):
    made = shard({"prompt": ["a fox"]})
    (made.output / "run.json").unlink()
    with pytest.raises(SetupError, match="workers on several nodes need a file system that they share, or s3://"):
        made.work.setup(Place("worker-1", "node-2", 0.0))


def test_a_run_that_is_older_than_a_setting_goes_on_with_its_default(shard):
    made = shard({"prompt": ["a fox"]})
    run = json.loads((made.output / "run.json").read_text())
    del run["config"]["quality"]["vqa"]
    (made.output / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"quality\.vqa was False and is True"):
        shard({"prompt": ["a fox"]}, "quality.vqa=true")
    assert shard({"prompt": ["a fox"]}).do().metadata


def test_workers_of_a_run_prune_by_the_same_scores(shard):
    preset = ("flashu.preset=fast", "flashu.tau=1", "flashu.r_LS=0")
    first = shard({"prompt": ["a fox"]}, *preset)
    stored = open_storage(str(first.output)).get("scores.safetensors")
    second = shard({"prompt": ["a fox"]}, *preset)
    assert second.identity == first.identity
    assert ", scores " in first.identity
    assert open_storage(str(first.output)).get("scores.safetensors") == stored
    assert second.do().pictures == first.do().pictures
