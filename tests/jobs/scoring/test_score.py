"""`flashu dpg` over a run of a few shapes-bench prompts, on a real Ray: scores, going on, export, and refusals."""

import hashlib
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shapes.bench import items, to_csv

from flashu import TextToImagePipeline
from tests.command import assert_refused, contents, flashu
from tests.jobs.scoring.vqa_checkpoints import make_vilt

PROMPTS = 5  # each in a shard of its own
ASKED = PROMPTS - 1  # the last has no questions


@pytest.fixture(scope="module")
def bench():
    return items()[:: len(items()) // PROMPTS][:PROMPTS]


@pytest.fixture(scope="module")
def run(cluster, bench, tmp_path_factory):
    """A run with four images a prompt, and beside it a question file: not of its last prompt, and of seven others."""
    folder = tmp_path_factory.mktemp("dpg")
    rows = {"prompt_id": [item.id for item in bench], "prompt": [item.text for item in bench]}
    pq.write_table(pa.table(rows), folder / "m.parquet")
    others = [item for item in items() if item not in bench]
    (folder / "questions.csv").write_text(to_csv([*bench[:ASKED], *others[:7]]))
    settings = (f"manifest.path={folder / 'm.parquet'}", "manifest.shard_size=1", "output.format=files")
    quick = ("flashu.preset=off", "sampling.num_inference_steps=8", "sampling.num_images=4", "sampling.batch_size=8")
    place = (cluster, "cluster.workers=1", f"output.path={folder / 'run'}")
    outcome = flashu("run", "default", *quick, *settings, *place)
    assert outcome.code == 0, outcome
    return folder / "run"


@pytest.fixture
def own_run(run, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def score(run, cluster):
    def score(of=run, questions=run.parent / "questions.csv", vqa="self"):
        return flashu("dpg", "score", of, cluster, "cluster.workers=1", "--questions", questions, "--vqa", vqa)

    return score


def image_file(run, item, index, shard="*"):
    (file,) = run.glob(f"data/{shard}/{item.id}-{index}.png")
    return file


def plainly(run, bench):
    """The same by hand: the model asked about each image alone, and the rules read out."""
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    of_items = []
    for item in bench[:ASKED]:
        of_images = []
        for index in range(4):
            picture = Image.open(image_file(run, item, index))
            likely = pipe.yes_probability(picture, [statement.question for statement in item.propositions])
            of_images.append(item.score([yes > 0.5 for yes in likely]))
        of_items.append(100 * sum(of_images) / 4)
    return of_items


def test_scores_are_those_of_the_rules_and_scoring_goes_on_where_it_stands(own_run, bench, score):
    unread = [image_file(own_run, bench[0], 1), image_file(own_run, bench[1], 2)]
    kept = [file.read_bytes() for file in unread]
    unread[0].write_bytes(b"no image")
    unread[1].unlink()
    outcome = score(own_run)
    assert outcome.code == 1
    assert f"Not answered: '{bench[0].id}', image 1: image 1 of prompt '{bench[0].id}' cannot be read" in outcome.out
    assert f"Not answered: '{bench[1].id}', image 2: image 2 of prompt '{bench[1].id}' is not in the" in outcome.out
    found = json.loads((own_run / "scores" / "self" / "scores.json").read_text())
    assert found["items"] == ASKED
    assert found["images"] + len(found["images_not_answered"]) == 4 * ASKED
    assert f'1 of {PROMPTS} prompts have no questions, and are left out: "{bench[ASKED].id}"' in outcome.out
    assert f"7 of {ASKED + 7} items have no images in this run" in outcome.out
    assert found["items_without_images"] == 7

    # These are there again, one shard's answers are lost, and an image of another was made anew: all are asked about.
    for file, data in zip(unread, kept, strict=True):
        file.write_bytes(data)
    answers = {file: file.stat().st_mtime_ns for file in sorted((own_run / "scores" / "self").glob("*.parquet"))}
    _, lost, anew, *untouched = answers
    lost.unlink()
    new = image_file(own_run, bench[2], 0)
    new.write_bytes(image_file(own_run, bench[0], 0).read_bytes())
    metadata = own_run / "metadata" / anew.name
    table = pq.read_table(metadata)
    made = table.to_pylist()
    for row in made:
        if row["file_name"] == new.name:
            row["sha256"] = hashlib.sha256(new.read_bytes()).hexdigest()
    pq.write_table(pa.Table.from_pylist(made, table.schema), metadata)
    again = score(own_run)
    assert again.code == 0, again
    found = json.loads((own_run / "scores" / "self" / "scores.json").read_text())
    expected = plainly(own_run, bench)
    assert list(found["by_item"].values()) == pytest.approx(expected)
    assert found["score"] == pytest.approx(sum(expected) / ASKED)
    assert (found["items"], found["images"], found["complete"]) == (ASKED, 4 * ASKED, True)
    assert f"{found['score']:.2f}" in again.out
    assert {"entity", "attribute"} <= found["level_1"].keys()
    assert [file for file, written in answers.items() if file.stat().st_mtime_ns == written] == untouched

    # A model that has changed since is not asked.
    lost.unlink()
    about = own_run / "scores" / "self" / "about.json"
    known = json.loads(about.read_text())
    about.write_text(json.dumps(known | {"identity": "self: the model as it was before"}))
    outcome = score(own_run)
    assert outcome.code == 1
    (line,) = [line for line in outcome.out.splitlines() if "Not every image is scored" in line]
    assert f"a worker was set up as {known['identity']}" in line
    assert "Traceback" not in outcome.out + outcome.err
    assert not lost.exists()

    fewer = own_run.parent / "fewer.csv"
    fewer.write_text(to_csv(bench[:3]))
    assert_refused(score(own_run, fewer), "holds answers to another question file")
    about.unlink()
    assert_refused(score(own_run, fewer), "holds answers, and no about.json")
    (own_run / "metadata" / "shard-00001.parquet").write_bytes(b"")
    assert_refused(score(own_run, vqa="hf:a/b"), "shard-00001.parquet cannot be read")


def test_what_cannot_be_scored_is_refused_before_anything_is_written(own_run, bench, score, tmp_path):
    before = contents(own_run)
    other = tmp_path / "other.csv"
    other.write_text(to_csv([item for item in items() if item not in bench][:3]))
    assert_refused(score(own_run, other), "has no questions about any prompt", min(item.id for item in bench))
    assert_refused(score(tmp_path / "nowhere"), "holds no run")
    assert_refused(score(own_run, tmp_path / "missing.csv"), "missing.csv cannot be read: No such file")
    assert_refused(score(own_run, own_run.parent / "run" / "run.json"), "lacks the columns item_id")
    assert_refused(score(own_run, vqa="oracle"), "there is no judge 'oracle'; there are: self")
    assert_refused(
        score(own_run, vqa=f"hf:{tmp_path}"), f"hf:{tmp_path} is no checkpoint of a model: it has no config.json"
    )
    assert contents(own_run) == before


def test_a_model_of_transformers_answers(own_run, score, tmp_path, monkeypatch):
    """One that workers cannot use is told in the words of its own tests."""
    make_vilt(tmp_path / "vilt", sure_of="maybe")
    monkeypatch.chdir(tmp_path)  # workers run elsewhere, so they need more than a relative name
    outcome = score(own_run, vqa="hf:vilt")
    assert outcome.code == 0, outcome
    (folder,) = (own_run / "scores").iterdir()
    found = json.loads((folder / "scores.json").read_text())
    rows = pq.read_table(sorted(folder.glob("*.parquet")), columns=["answer", "yes"]).to_pylist()
    assert found["score"] == 0
    assert found["answers"] == found["neither_yes_nor_no"] == len(rows) > 4 * ASKED
    assert all(row == {"answer": "maybe", "yes": False} for row in rows)
    assert f"WARNING: {len(rows)} of {len(rows)} answers were neither yes nor no" in outcome.out
    assert [example["answer"] for example in found["examples_of_neither"]] == ["maybe"]


def test_grids_hold_the_four_images_where_the_official_script_cuts_them_out(run, bench, tmp_path):
    outcome = flashu("dpg", "export", run, tmp_path / "grids")
    assert outcome.code == 0, outcome
    assert "--resolution 64" in outcome.out
    side = 64
    boxes = [(0, 0, side, side), (side, 0, 2 * side, side), (0, side, side, 2 * side), (side, side, 2 * side, 2 * side)]
    assert sorted(file.name for file in (tmp_path / "grids").iterdir()) == sorted(f"{item.id}.png" for item in bench)
    for item in bench:
        grid = Image.open(tmp_path / "grids" / f"{item.id}.png")
        assert grid.size == (2 * side, 2 * side)
        for index, box in enumerate(boxes):
            assert grid.crop(box).tobytes() == Image.open(image_file(run, item, index)).convert("RGB").tobytes()


def test_places_where_no_grid_can_be_written_are_told_in_a_line(run, bench, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/deeper"):
        refused = flashu("dpg", "export", run, tmp_path / place)
        assert_refused(refused, tmp_path / place, "a part of this path is a file")
    assert (tmp_path / "file").read_text() == "mine"
    taken = tmp_path / "grids" / f"{bench[0].id}.png"
    taken.mkdir(parents=True)
    assert_refused(flashu("dpg", "export", run, tmp_path / "grids"), taken, "it is a folder, where a file is needed")


def test_runs_that_make_no_grids_are_refused(own_run, bench, tmp_path):
    lost = image_file(own_run, bench[0], 1)
    data = lost.read_bytes()
    lost.write_bytes(b"no image")
    told = f"image 1 of prompt {bench[0].id!r}"
    assert_refused(flashu("dpg", "export", own_run, tmp_path / "grids"), told, "cannot be read as an image")
    lost.unlink()
    assert_refused(flashu("dpg", "export", own_run, tmp_path / "grids"), told, "is not in the run's files")
    lost.write_bytes(data)
    metadata = own_run / "metadata" / "shard-00000.parquet"
    table = pq.read_table(metadata)
    pq.write_table(table.slice(1), metadata)
    assert_refused(flashu("dpg", "export", own_run, tmp_path / "grids"), "has 3 images; DPG-Bench takes 4")
    ids = pa.array(["../../x"] * len(table))
    pq.write_table(table.set_column(table.schema.get_field_index("prompt_id"), "prompt_id", ids), metadata)
    assert_refused(flashu("dpg", "export", own_run, tmp_path / "grids"), "'../../x' cannot be the name of a file")
    assert not (tmp_path.parent / "x.png").exists()
