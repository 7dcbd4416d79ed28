"""`flashu dpg CONFIG`: both arms over a real Ray, what it prints and writes, going on, and refusals."""

import csv
import io
import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shapes.bench import items, to_csv

from cluster.open_storage import open_storage
from cluster.storage import S3Options
from jobs.dataset.keys import METADATA, shards_with
from jobs.scoring.questions import DEMO_QUESTIONS
from tests.command import assert_refused, contents, flashu

QUICK = (
    "cluster.workers=1",
    "sampling.num_inference_steps=12",
    "flashu.tau=3",
    "sampling.batch_size=4",
    "sampling.num_images=2",
)
ARMS = ("baseline", "flashu")


@pytest.fixture(scope="module")
def demo(cluster, tmp_path_factory):
    """The demo's output, and its folder. `flashu reproduce` makes it, as `flashu dpg --demo` does, and says more."""
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    outcome = flashu("reproduce", "dpg", "-o", folder, *QUICK, cluster)
    assert outcome.code == 0, outcome
    return outcome.out, folder


def without_times(comparison):
    """What does not depend on how fast the machine was."""
    kept = json.loads(json.dumps(comparison))
    for arm in kept["arms"].values():
        for name in ("seconds_per_image", "gpu_seconds_per_image", "images_per_second"):
            arm.pop(name)
    kept["speed_up"].pop("seconds_per_image")
    return kept


def test_the_demo_asks_what_shapes_bench_asks():
    wanted = list(csv.reader(io.StringIO(to_csv(items()))))
    found = list(csv.reader(DEMO_QUESTIONS.open()))
    assert len({row[0] for row in found[1:]}) == 5
    assert found == [wanted[0], *(row for row in wanted if row[0] in {mine[0] for mine in found[1:]})]


def test_both_arms_are_ordinary_runs_and_stand_beside_each_other(demo):
    out, folder = demo
    comparison = json.loads((folder / "comparison.json").read_text())
    for arm in ARMS:
        run = json.loads((folder / arm / "run.json").read_text())
        assert run["config"]["flashu"]["preset"] == {"baseline": "off", "flashu": "embedded"}[arm]
        assert flashu("status", folder / arm).out.count("complete") == 1
        scores = json.loads((folder / arm / "scores" / "self" / "scores.json").read_text())
        assert (scores["items"], scores["images"]) == (5, 10)
        found = comparison["arms"][arm]
        assert (found["score"], found["level_1"], found["level_2"]) == (
            scores["score"], scores["level_1"], scores["level_2"]
        )  # fmt: skip
        assert f"{scores['score']:.2f}" in out
    baseline, accelerated = (comparison["arms"][arm] for arm in ARMS)
    assert comparison["difference"]["score"] == pytest.approx(accelerated["score"] - baseline["score"])
    by_item = [item["flashu"] - item["baseline"] for item in comparison["by_item"]]
    assert sum(by_item) / 5 == pytest.approx(comparison["difference"]["score"])
    assert [abs(value) for value in by_item] == sorted(map(abs, by_item), reverse=True)
    assert comparison["speed_up"]["tflop_per_image"] > 1.2
    assert comparison["speed_up"]["seconds_per_image"] == pytest.approx(
        baseline["seconds_per_image"] / accelerated["seconds_per_image"]
    )
    for label in ("DPG-Bench score", "worker seconds per image", "TFLOP per image", "attribute - color"):
        assert re.search(rf"^ *{label} +\d", out, re.MULTILINE), out


def test_published_figures_stand_beside_what_came_out_with_their_sources(demo):
    out, folder = demo
    comparison = json.loads((folder / "comparison.json").read_text())
    score = comparison["arms"]["baseline"]["score"]
    seconds = [comparison["speed_up"][f"{whose}seconds_per_image"] for whose in ("gpu_", "")]
    speed_up = seconds[0] or seconds[1]
    found = {" ".join(line.split()) for line in out.splitlines()}
    assert f"DPG-Bench score, baseline 82.78 {score:.2f} TorchUMM's README, an independent run" in found
    assert f"speed-up by FlashU, flashu 1.78-2.01x {speed_up:.2f}x FlashU, arXiv 2603.15271, abstract" in found
    assert "sampling.num_images 2 NOT 4: S evaluation/sample_dpg.sh: batch_size (F makes one)" in found
    assert "- sampling.num_inference_steps: 50 there, 12 here" in found
    assert any(line.startswith("- judge: the papers' is mPLUG") for line in found)
    assert "baseline: 12 points, guidance the model's own" in found


def test_seeds_are_the_same_in_both_arms(demo):
    _, folder = demo
    seeds = [
        {
            (row["prompt_id"], row["image_index"]): row["seed"]
            for file in sorted((folder / arm / "metadata").glob("*.parquet"))
            for row in pq.read_table(file).to_pylist()
        }
        for arm in ARMS
    ]
    assert len(seeds[0]) == 10
    assert seeds[0] == seeds[1]


def test_the_page_shows_prompts_where_the_arms_differ_with_their_pictures(demo):
    _, folder = demo
    page = (folder / "comparison.html").read_text()
    comparison = json.loads((folder / "comparison.json").read_text())
    differing = [item["item"] for item in comparison["by_item"] if item["difference"]]
    assert differing, "12 steps differ enough; or else this test says nothing"
    assert re.findall(r"<bdi>(.*?)</bdi>", page) == differing
    assert page.count("<img") == page.count("data:image/webp") == 4 * len(differing)
    assert "Where the arms differ most" in page


def test_done_again_it_makes_nothing_anew(demo, cluster):
    _, folder = demo
    kept = files_of_shards(folder)
    before = json.loads((folder / "comparison.json").read_text())
    outcome = flashu("dpg", "--demo", *QUICK, cluster, f"output.path={folder}")
    assert outcome.code == 0, outcome
    assert without_times(json.loads((folder / "comparison.json").read_text())) == without_times(before)
    assert files_of_shards(folder) == kept


def test_what_was_ended_while_it_scored_goes_on_to_the_same_comparison(demo, cluster, tmp_path):
    """Here is what a driver leaves that was killed right after the first answers, before it heard whose they are."""
    _, quiet = demo
    out = shutil.copytree(quiet, tmp_path / "out")
    (out / "comparison.json").unlink()
    scores = out / "flashu" / "scores" / "self"
    (scores / "scores.json").unlink()
    for file in sorted(scores.glob("shard-*.parquet"))[1:]:
        file.unlink()
    about = json.loads((scores / "about.json").read_text())
    (scores / "about.json").write_text(json.dumps(about | {"identity": None}))
    kept = files_of_shards(out)
    assert flashu("dpg", "--demo", *QUICK, cluster, f"output.path={out}").code == 0
    assert files_of_shards(out).items() > kept.items(), "there is more, and nothing of it was made again"
    assert json.loads((scores / "about.json").read_text()) == about
    found, expected = (json.loads((folder / "comparison.json").read_text()) for folder in (out, quiet))
    assert without_times(found) == without_times(expected)


def files_of_shards(folder):
    """When each was written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("shard-*.parquet")}


def test_questions_changed_in_between_are_told_before_images_are_made(demo, tmp_path):
    _, folder = demo
    out = shutil.copytree(folder, tmp_path / "out")
    shutil.rmtree(out / "flashu")
    other = tmp_path / "other.csv"
    other.write_text(DEMO_QUESTIONS.read_text().replace("Is there a star?", "Is a star there?"))
    refused = flashu("dpg", "--demo", *QUICK, "cluster.address=local", f"questions={other}", f"output.path={out}")
    assert_refused(refused, "holds answers to another question file")
    assert not (out / "flashu").exists()


def test_arms_of_different_models_are_not_compared(demo, cluster, tmp_path):
    _, folder = demo
    out = shutil.copytree(folder, tmp_path / "out")
    run = json.loads((out / "flashu" / "run.json").read_text())
    run["model"]["identity"] = "model 0123, " + run["model"]["identity"].partition(", ")[2]
    (out / "flashu" / "run.json").write_text(json.dumps(run))
    before = (out / "comparison.json").read_bytes()
    outcome = flashu("dpg", "--demo", *QUICK, cluster, f"output.path={out}")
    assert outcome.code == 2
    assert "the arms were drawn by different models: baseline by model " in outcome.err
    assert "flashu by model 0123" in outcome.err
    assert (out / "comparison.json").read_bytes() == before


def test_one_arm_in_s3_with_a_manifest_of_ones_own(cluster, bucket, tmp_path):
    """The prompts of the manifest count, and are escaped; one without questions is left out, one given up is told."""
    item, empty = items()[:2]
    questions = to_csv([item, empty])
    store = open_storage(bucket.url, S3Options(bucket.endpoint_url, path_style=True))
    store.put("questions.csv", questions.encode())
    prompts = ["a blue circle", "a <b>bold</b> ring", " "]
    rows = {"prompt_id": ["other", item.id, empty.id], "prompt": prompts}
    pq.write_table(pa.table(rows), tmp_path / "m.parquet")
    (tmp_path / "mine.yaml").write_text(f"arms: baseline\nmanifest: {{path: {tmp_path / 'm.parquet'}}}\n")
    settings = (f"questions={bucket.url}/questions.csv", f"output.path={bucket.url}/out")
    place = (f"storage.endpoint_url={bucket.endpoint_url}", "storage.path_style=true")
    outcome = flashu("dpg", tmp_path / "mine.yaml", *QUICK, cluster, *settings, *place)
    assert outcome.code == 1, outcome
    assert re.search(r"^prompts given up +1$", outcome.out, re.MULTILINE), outcome.out
    assert '1 of 2 prompts have no questions, and are left out: "other"' in outcome.out
    comparison = json.loads(store.get("out/baseline.json"))
    assert list(comparison["arms"]) == ["baseline"]
    assert (comparison["arms"]["baseline"]["items"], comparison["arms"]["baseline"]["images"]) == (1, 2)
    assert "difference" not in comparison
    page = store.get("out/baseline.html").decode()
    assert not store.exists("out/comparison.json")
    assert "a &lt;b&gt;bold&lt;/b&gt; ring" in page
    assert "<b>bold" not in page
    assert page.count("data:image/webp") == 2
    assert list(shards_with(open_storage(f"{store.url}/out/baseline", S3Options(bucket.endpoint_url)), METADATA)) == [0]


def test_what_cannot_work_is_refused_before_anything_is_made(demo, tmp_path):
    _, folder = demo
    out = tmp_path / "out"
    here = (f"output.path={out}", "cluster.address=local")
    assert_refused(flashu("dpg", *here), "questions is not set")
    asked = f"questions={DEMO_QUESTIONS}"
    assert_refused(flashu("dpg", asked), "output.path is not set")
    assert_refused(flashu("dpg", asked, *here, "arms=fast"), "arms is 'fast'; give baseline, flashu, or both")
    assert_refused(flashu("dpg", asked, *here, "arms=[flashu,flashu]"), "arms is 'flashu,flashu'")
    assert_refused(flashu("dpg", asked, *here, "arms=5"), "arms is 5; give")
    assert_refused(flashu("dpg", asked, *here, "flashu.preset=off"), "flashu.preset is off")
    assert_refused(flashu("dpg", asked, *here, "flashu.preset=typo"), "typo")
    assert_refused(flashu("dpg", asked, *here, "flashu.r_p=7"), "r_p")
    assert_refused(flashu("dpg", asked, *here, "sampling.batch_size=0"), "sampling.batch_size is 0")
    assert_refused(flashu("dpg", asked, *here, "vqa=oracle"), "there is no judge 'oracle'")
    assert_refused(flashu("dpg", asked, *here, "arm=flashu"), "there is no setting arm; did you mean arms?")
    assert_refused(flashu("dpg", "questions=nowhere.csv", *here), "nowhere.csv cannot be read")
    assert_refused(flashu("dpg", f"questions=file://{tmp_path}/", *here), "cannot be read")
    assert_refused(flashu("dpg", "questions=~nosuchuser/q.csv", *here), "cannot be read")
    assert_refused(flashu("dpg", asked, f"output.path={folder / 'flashu'}"), "holds a run")
    assert_refused(flashu("dpg", "nowhere.yaml", asked), "there is no config nowhere.yaml")
    assert_refused(flashu("dpg", "questions=s3://key:secret@bucket/q.csv", *here), "questions holds credentials")
    pq.write_table(pa.table({"prompt_id": ["mine"], "prompt": ["a ring"]}), tmp_path / "m.parquet")
    mine = f"manifest.path={tmp_path / 'm.parquet'}"
    refused = flashu("dpg", asked, *here, mine)
    assert_refused(refused, "has no questions about any prompt", "single-003", "mine")
    assert not list(out.rglob("*")), "a place to write is looked for, and nothing is written"
    before = contents(folder)
    other = tmp_path / "other.csv"
    other.write_text(to_csv(items()[:2]))
    assert_refused(flashu("dpg", f"questions={other}", f"output.path={folder}"), "answers to another question file")
    unscored = shutil.copytree(folder, tmp_path / "unscored", ignore=shutil.ignore_patterns("scores"))
    refused = flashu("dpg", f"questions={other}", f"output.path={unscored}")
    assert_refused(refused, "holds other prompts than")
    assert contents(folder) == before
