"""`flashu geneval export` of runs that a worker made in this process, read as GenEval's evaluator reads them."""

import io
import json
import os
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.open_storage import open_storage
from cluster.work import Lease, Place, Times
from jobs.dataset.formats import FORMATS
from jobs.driver.prepare import prepare
from jobs.driver.run import generation_work
from jobs.settings.config import read_config
from manifests.importers import build_geneval
from tests.command import assert_refused, contents, flashu

LINES = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a red circle"},
    {"tag": "colors", "include": [{"class": "carré 🟦", "count": 1, "color": "blue"}], "prompt": "a blue square"},
    {"tag": "counting", "include": [{"class": "circle", "count": 1}], "exclude": [], "prompt": "a red circle"},
]
SAMPLES = [f"samples/{index:04d}.png" for index in range(4)]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Makes a run of a manifest, GenEval's if none is given, shard by shard; returns its folder."""

    def make(*overrides, manifest=None):
        folder = tmp_path_factory.mktemp("geneval")
        if manifest is None:
            (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
            manifest = folder / "m.parquet"
            build_geneval(str(folder / "evaluation_metadata.jsonl"), str(manifest))
        quick = [
            "flashu.preset=off",
            "sampling.num_inference_steps=2",
            "quality.enabled=false",
            "manifest.shard_size=2",
        ]
        place = [f"manifest.path={manifest}", f"output.path={folder / 'run'}"]
        prepared = prepare(read_config(None, [*quick, *place, *overrides]))
        work = generation_work(prepared)
        work.setup(Place("worker-0", "node-0", 0.0))
        for shard in range(prepared.manifest.num_shards):
            lease = Lease(shard, shard, 1)
            results = work.process(lease, work.read(lease), lambda items: None)
            work.write(lease, work.encode(results), Times(1_700_000_000.0, 0.1, 0.2, 1.0))
        return folder / "run"

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


@pytest.fixture
def own_run(run, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(run, tmp_path / "run")


def evaluated(folder):
    """{folder: (metadata, {file: pixels})}, as the evaluator finds them."""
    found = {}
    for name in os.listdir(folder):
        if not os.path.isdir(os.path.join(folder, name)) or not name.isdigit():
            continue
        with open(os.path.join(folder, name, "metadata.jsonl"), encoding="ascii") as file:
            metadata = json.load(file)
        samples = os.path.join(folder, name, "samples")
        pictures = {file: Image.open(os.path.join(samples, file)) for file in os.listdir(samples)}
        assert all(re.match(r"\d+\.png", file) and picture.format == "PNG" for file, picture in pictures.items())
        found[name] = metadata, {file: picture.convert("RGB").tobytes() for file, picture in pictures.items()}
    return found


def pixels(run):
    """{(id, index): pixels} of a run's images."""
    config = json.loads((run / "run.json").read_text())["config"]
    found = {}
    for file in sorted((run / "metadata").iterdir()):
        rows = pq.read_table(file).to_pylist()
        names = {place: row["file_name"] for place, row in enumerate(rows)}
        stored = FORMATS[config["output"]["format"]].read(open_storage(str(run)), int(file.stem[-5:]), names)
        for place, data in stored:
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            found[rows[place]["prompt_id"], rows[place]["image_index"]] = picture.tobytes()
    return found


@pytest.mark.parametrize(
    "output",
    [
        (),
        ("output.format=webdataset", "output.image_format=jpeg"),
        ("output.format=files", "output.image_format=webp"),
    ],
    ids=["parquet png", "webdataset jpeg", "files webp"],
)
def test_the_evaluator_finds_each_line_with_its_four_images(make_run, run, tmp_path, output):
    made = make_run(*output) if output else run
    outcome = flashu("geneval", "export", made, tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "12 images of 3 prompts" in outcome.out
    assert f"evaluation/evaluate_images.py {tmp_path / 'out'}" in outcome.out
    stored = pixels(made)
    assert len(set(stored.values())) == 12  # prompts 0 and 2 are alike in text only
    expected = {
        f"{number:05d}": (line, {f"{index:04d}.png": stored[f"{number:05d}", index] for index in range(4)})
        for number, line in enumerate(LINES)
    }
    assert evaluated(tmp_path / "out") == expected


def test_png_files_are_the_runs_own_bytes_and_exporting_again_changes_nothing(own_run, tmp_path):
    flashu("geneval", "export", own_run, tmp_path / "out")
    before = contents(tmp_path / "out")
    (row, *_) = pq.read_table(own_run / "data/shard-00000.parquet").to_pylist()
    assert before["00000/samples/0000.png"] == row["image"]["bytes"]
    assert set(before) == {f"0000{n}/{name}" for n in range(3) for name in ("metadata.jsonl", *SAMPLES)}
    assert before["00001/metadata.jsonl"].count(b"\n") == 1
    (tmp_path / "out/00000/samples/0000.png").write_bytes(b"half")
    assert flashu("geneval", "export", own_run, tmp_path / "out").code == 0
    assert contents(tmp_path / "out") == before


def test_of_an_incomplete_run_what_is_there_is_written_and_the_rest_told(own_run, tmp_path):
    (own_run / "metadata/shard-00001.parquet").unlink()
    outcome = flashu("geneval", "export", own_run, tmp_path / "out")
    assert outcome.code == 1
    assert "8 images of 2 prompts" in outcome.out
    assert outcome.err == "Missing: 1 prompts have no images yet: 1 of 2 shards are committed\n"
    assert set(evaluated(tmp_path / "out")) == {"00000", "00001"}


def test_a_prompt_that_was_given_up_is_told_with_its_error(own_run, tmp_path):
    metadata = own_run / "metadata/shard-00001.parquet"
    pq.write_table(pq.read_table(metadata).slice(0, 0), metadata)
    failures = {
        "prompt_id": ["00002"],
        "prompt": ["a red circle"],
        "error": ["ValueError: no"],
        "shard": [1],
        "row": [2],
    }
    (own_run / "failures").mkdir()
    pq.write_table(pa.table(failures), own_run / "failures/shard-00001.parquet")
    outcome = flashu("geneval", "export", own_run, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.err == "Missing: prompt '00002' was given up: ValueError: no\n"


def test_of_a_filtered_copy_it_is_told_that_the_filter_dropped_the_rest(own_run, tmp_path):
    chosen = "prompt_id == '00000' or (prompt_id == '00002' and image_index != 1)"
    assert flashu("filter", own_run, tmp_path / "copy", "--where", chosen).code == 0
    outcome = flashu("geneval", "export", tmp_path / "copy", tmp_path / "out")
    assert outcome.code == 1
    assert "7 images of 2 prompts" in outcome.out
    dropped = f"1 prompts have no images in this filtered copy of {own_run}: the filter dropped them"
    assert outcome.err.splitlines() == [
        f"Missing: {dropped}, or they had none there",
        "Missing: image 1 of prompt '00002' is not in this filtered copy; others have 4",
    ]
    (tmp_path / "copy/metadata/shard-00001.parquet").unlink()
    outcome = flashu("geneval", "export", tmp_path / "copy", tmp_path / "fewer")
    assert outcome.err.splitlines() == [
        f"Missing: {dropped}, or they had none there",
        "Missing: 1 prompts have no images yet: 1 of 2 shards are committed",
    ]


def test_missing_and_broken_images_are_told_and_no_earlier_one_stands_in_for_them(make_run, tmp_path):
    made = make_run("output.format=files")
    flashu("geneval", "export", made, tmp_path / "out")
    whole = evaluated(tmp_path / "out")
    (made / "data/00000/00000-1.png").unlink()
    (made / "data/00000/00001-2.png").write_bytes(b"no image")
    metadata = made / "metadata/shard-00001.parquet"
    pq.write_table(pq.read_table(metadata).slice(0, 3), metadata)
    outcome = flashu("geneval", "export", made, tmp_path / "out")
    assert outcome.code == 1
    assert "9 images of 3 prompts" in outcome.out
    assert outcome.err.splitlines() == [
        "Missing: image 1 of prompt '00000' is not in the run's files",
        "Missing: image 2 of prompt '00001' cannot be read as an image",
        "Missing: image 3 of prompt '00002' was not made; others have 4",
    ]
    for name, file in (("00000", "0001.png"), ("00001", "0002.png"), ("00002", "0003.png")):
        del whole[name][1][file]
    assert evaluated(tmp_path / "out") == whole


def test_a_prompt_without_any_image_gets_no_folder_that_the_evaluator_stumbles_over(own_run, tmp_path):
    file = own_run / "data/shard-00000.parquet"
    file.write_bytes(file.read_bytes()[:2000])
    outcome = flashu("geneval", "export", own_run, tmp_path / "out")
    assert outcome.code == 1
    assert "4 images of 1 prompts" in outcome.out
    assert set(evaluated(tmp_path / "out")) == {"00002"}


def test_another_number_of_images_is_exported_with_a_word_on_it(make_run, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps(LINES[0]) + "\n")
    build_geneval(str(lines), str(tmp_path / "m.parquet"), num_images=2)
    outcome = flashu("geneval", "export", make_run(manifest=tmp_path / "m.parquet"), tmp_path / "out")
    assert outcome.code == 0
    assert "The official benchmark has 4 images of each prompt, this run 2." in outcome.out
    assert set(evaluated(tmp_path / "out")["00000"][1]) == {"0000.png", "0001.png"}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"prompt_id": ["00000"]}, "its images have no column geneval; make the manifest with flashu manifest geneval"),
        ({"prompt_id": ["../x"], "geneval": [json.dumps(LINES[0])]}, "the prompt id '../x' is no line's number"),
        ({"prompt_id": ["²²²²²"], "geneval": [json.dumps(LINES[0])]}, "the prompt id '²²²²²' is no line's number"),
        ({"prompt_id": ["00000"], "geneval": ["a red circle"]}, "column geneval: not a line of evaluation_metadata"),
        ({"prompt_id": ["00000"], "geneval": [None]}, "column geneval: not a line of evaluation_metadata"),
        ({"prompt_id": ["00000"], "geneval": ['{"tag": "x", "prompt": "y"}']}, "column geneval: no include"),
    ],
)
def test_runs_of_other_manifests_are_refused_before_anything_is_written(make_run, tmp_path, columns, told):
    pq.write_table(pa.table(columns | {"prompt": ["a red circle"]}), tmp_path / "m.parquet")
    made = make_run(manifest=tmp_path / "m.parquet")
    assert_refused(flashu("geneval", "export", made, tmp_path / "out"), told)
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_or_no_place_is_refused(own_run, tmp_path):
    assert_refused(flashu("geneval", "export", tmp_path / "nowhere", tmp_path / "out"), "holds no run (no run.json)")
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/deeper"):
        refused = flashu("geneval", "export", own_run, tmp_path / place)
        assert_refused(refused, tmp_path / place, "a part of this path is a file")
    shutil.rmtree(own_run / "metadata")
    assert_refused(flashu("geneval", "export", own_run, tmp_path / "out"), "has no images yet")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("other", ["00003/samples/0000.png", "00000/samples/00000.png", "00000/samples/0004.png"])
def test_samples_of_another_export_are_not_mixed_in(run, tmp_path, other):
    out = tmp_path / "out"
    (out / other).parent.mkdir(parents=True)
    (out / other).write_bytes(b"another's")
    (out / "notes/samples").mkdir(parents=True)
    (out / "notes/samples/0.png").write_bytes(b"no prompt's")
    before = contents(out)
    assert_refused(flashu("geneval", "export", run, out), f"holds {other}, which is not of this run")
    assert contents(out) == before
    (out / other).unlink()
    assert flashu("geneval", "export", run, out).code == 0
