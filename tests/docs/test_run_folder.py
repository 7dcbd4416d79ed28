"""docs/run-folder.md against the run that it tells of: files, columns, keys, names, seeds, and its Python as it stands.

The run is made by `flashu run` from the page's own manifest and settings, in each format; then it is filtered and
scored. Its workers are in this process, and commit as others do: what Ray does around them is in test_run.py.
"""

import hashlib
import io
import json
import re
import shutil
import tarfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors import safe_open

from cluster.local_storage import LocalStorage
from cluster.queue_actor import Snapshot
from cluster.s3_storage import MULTIPART_SIZE
from cluster.work import Lease, Place, Times
from flashu.errors import InputError
from jobs.dataset.formats import ROW_GROUP
from jobs.dataset.records import file_name, image_seed
from jobs.driver.prepare import going_on, prepare
from jobs.driver.status import SILENT_S
from jobs.driver.tracebacks import MOST_KINDS
from jobs.metrics.pixels import SCORES
from jobs.scoring.comparison import Arm, compare, write_comparison
from jobs.scoring.questions import read_questions
from jobs.scoring.score import score_run
from jobs.settings.config import RunConfig, flat, read_config
from jobs.statistics.run import FAILURES, MAX_WORKERS
from jobs.statistics.summary import SUMMARY_EVERY_S
from jobs.worker.batch_maker import BatchMaker
from jobs.worker.shard import GenerationWork
from tests.command import flashu

PAGE = (Path(__file__).parents[2] / "docs/run-folder.md").read_text(encoding="utf-8")
CUT = "…"
STAGES = ["planned", "under way", "finished", "scored"]
FORMATS = {"shapes": "parquet", "shapes-tar": "webdataset", "shapes-files": "files"}  # by the folder's name
QUESTIONS = """item_id,text,proposition_id,dependency,tuple,question_natural_language
circle,a red circle,1,0,entity - whole (circle),Is there a circle?
circle,a red circle,2,1,"attribute - color (circle, red)",Is there a red circle?
triangle,a green triangle,1,0,entity - whole (triangle),Is there a triangle?
"""


# -------------------------------------------------------------------------------------------------- reading the page


def section(title):
    """The text below a heading, up to the next."""
    return re.split(r"\n#+ .*\n", PAGE[PAGE.index(f"\n{title}\n") + 1 :], maxsplit=2)[0].split("\n", 1)[1]


def blocks(language, text=PAGE):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def tables(text):
    """Each table as rows of cells, under its header; a cell that is code is what the code is."""
    found = []
    for lines in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines()]
        cells = [[cell[1:-1] if re.fullmatch("`[^`]+`", cell) else cell for cell in row] for row in rows]
        found.append(SimpleNamespace(header=cells[0], rows=cells[2:]))
    return found


def table(text, first):
    """The table whose first heading is that."""
    (found,) = (each.rows for each in tables(text) if each.header[0] == first)
    return found


def codes(text):
    return re.findall("`([^`]+)`", text) or [text]


def assert_alike(page, real, where=""):
    """That the page's JSON has the keys of the real one, all of them unless it is cut, with values of their types."""
    if isinstance(page, dict) and isinstance(real, dict):
        named = page.keys() - {CUT}
        assert named <= real.keys() if CUT in page else named == real.keys(), f"{where}: {named ^ real.keys()}"
        for key in named:
            assert_alike(page[key], real[key], f"{where}.{key}")
    elif isinstance(page, list) and isinstance(real, list):
        for one in page:
            if one != CUT and real:
                assert_alike(one, real[0], f"{where}[]")
    else:
        assert page is None or real is None or type(page) is type(real), f"{where}: {page!r} is {real!r}"
        assert page == real or not where.endswith(".json.version"), f"{where} is {real}"


# ------------------------------------------------------------------------------------------------------ making the run


class WorkersHere:
    """In place of a pool on Ray: a worker in this process, shard by shard, as `cluster.worker` goes about it."""

    def __init__(self, work, shards, seen):
        self.work, self.shards, self.seen = work, shards, seen

    def run(self, watch, stop):
        told, reports = [], []
        identity = self.work.setup(Place("worker-0000", "node-1", 0.0, told.append))
        for shard in self.shards:
            lease, started_at, start = Lease(shard + 1, shard, 1), time.time(), time.perf_counter()
            results = self.work.process(lease, self.work.read(lease), lambda items: None)
            times = Times(started_at, 0.001, 0.002, time.perf_counter() - start)
            reports.append(self.work.write(lease, self.work.encode(results), times))
            if shard == 0 and isinstance(self.work, GenerationWork):
                self.seen |= files_of(Path(self.work.config.output.path))
        last = Snapshot(reports, 0, 0, 0, {}, identity, frozenset(), 0, [], "", told)
        watch(last)
        return last


def files_of(run):
    """The files of a run, under the names that the page's table has for them."""
    names = (file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file())
    for pattern, shown in (
        (r"shard-\d{5}\b", "shard-00042"),
        (r"^data/\d{5}/.+\.png$", "data/00042/circle-0.png"),
        (r"^logs/prompt-RuntimeError-[0-9a-f]{8}\.txt$", "logs/prompt-RuntimeError-1a2b3c4d.txt"),
    ):
        names = [re.sub(pattern, shown, name) for name in names]
    return set(names)


def manifest():
    """The page's, with null for an empty cell."""
    cells = tables(PAGE)[0]
    rows = [dict(zip(cells.header, (cell or None for cell in row), strict=True)) for row in cells.rows]
    text, number = pa.string(), pa.int64()
    columns = {"prompt_id": text, "prompt": text, "num_images": number, "seed": number, "style": text}
    return pa.table({name: pa.array([row[name] for row in rows]).cast(kind) for name, kind in columns.items()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with `runs/`, in which the page's Python runs too; which files there were when; what scoring found."""
    folder, under_way = tmp_path_factory.mktemp("page"), set()
    submit = BatchMaker.submit

    def made_to_fail(self, prompts, *settings):
        if "a yellow star" in prompts:
            raise RuntimeError("made to fail")
        return submit(self, prompts, *settings)

    @contextmanager
    def workers_here(work, num_shards, done, config, note, identity=None):
        yield WorkersHere(work, [shard for shard in range(num_shards) if shard not in done], under_way)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(BatchMaker, "submit", made_to_fail)
        patch.setattr("jobs.driver.run.workers_for", workers_here)
        patch.setattr("jobs.scoring.score.workers_for", workers_here)
        pq.write_table(manifest(), "prompts.parquet")
        Path("shapes.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
        prepare(read_config("shapes.yaml", ["output.path=runs/planned"]))
        for name, kind in FORMATS.items():
            outcome = flashu("run", "shapes.yaml", f"output.path=runs/{name}", f"output.format={kind}")
            assert (outcome.code, outcome.err) == (1, ""), outcome  # of the prompts that fail
        finished = set().union(*(files_of(folder / "runs" / name) for name in FORMATS))
        kept = flashu("filter", "runs/shapes", "runs/good", "--where", "style == 'flat'", "--dedup")
        assert kept.code == 0, kept
        Path("questions.csv").write_text(QUESTIONS, encoding="utf-8")
        scored, code = score_run("runs/shapes", "questions.csv", "self", read_config("default"), lambda text: None)
        assert code == 0
    files = {"planned": files_of(folder / "runs/planned"), "under way": under_way, "finished": finished}
    files["scored"] = finished | files_of(folder / "runs/shapes")
    return SimpleNamespace(
        folder=folder, run=folder / "runs/shapes", good=folder / "runs/good", scored=scored, files=files
    )


def load(file):
    return json.loads(file.read_text(encoding="utf-8"))


def columns_of(file):
    return [(field.name, str(field.type)) for field in pq.read_schema(file)]


def rows_of(folder):
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("stage", STAGES)
def test_the_files_of_each_stage_are_those_of_the_table(runs, stage):
    shown = {name: STAGES.index(first) for name, first, *_ in table(section("## Files"), "file")}
    may_be = {name for name, first in shown.items() if first <= STAGES.index(stage)}
    if stage == "under way":  # nothing has failed yet
        may_be -= {name for name in shown if name.startswith(("failures/", "logs/"))}
    assert runs.files[stage] == may_be


def test_a_copy_has_the_files_of_the_table(runs):
    copied = {name for name, _, is_copied, _ in table(section("## Files"), "file") if is_copied == "yes"}
    assert files_of(runs.good) == {name for name in copied if not name.endswith((".tar", ".png"))}


def test_shards_without_images_have_metadata_and_no_data(runs):
    assert [pq.read_metadata(file).num_rows for file in sorted(runs.run.glob("metadata/*"))] == [3, 1, 0]
    assert [file.name for file in sorted(runs.run.glob("data/*"))] == ["shard-00000.parquet", "shard-00001.parquet"]


# ------------------------------------------------------------------------------------------------------------- columns


def test_metadata_and_data_have_the_columns_of_the_table(runs):
    rows = table(section("## metadata/"), "column")
    with_clip = [(name, type_) for name, type_, *_ in rows]
    shown = [(name, type_) for name, type_ in with_clip if name != "quality_clip_score"]
    assert {name for name, _ in with_clip} >= {f"quality_{name}" for name in SCORES}
    assert len(shown) == len(with_clip) - 1
    shown[shown.index(("*the manifest's own*", "theirs"))] = ("style", "string")
    image = ("image", "struct<bytes: binary, path: string>")
    for file in sorted(runs.run.glob("metadata/*")):
        assert columns_of(file) == shown
        required = {field.name for field in pq.read_schema(file) if not field.nullable}
        assert required == {"prompt_id", "prompt", "image_index"}
    for file in sorted(runs.run.glob("data/*")):
        assert columns_of(file) == [image, *shown[:-5]]
        (about,) = json.loads(pq.read_schema(file).metadata[b"huggingface"])["info"]["features"].values()
        assert about == {"_type": "Image"}
    made = rows_of(runs.run / "metadata")
    never = {name for name, _, null, _ in rows if null == "never"} & {name for name, _ in shown}
    assert [(row["prompt_id"], name) for row in made for name in never if row[name] is None] == []


def test_row_by_row_data_are_the_images_of_the_metadata(runs):
    for metadata, data in zip(rows_of(runs.run / "metadata"), rows_of(runs.run / "data"), strict=True):
        image = data.pop("image")
        assert hashlib.sha256(image["bytes"]).hexdigest() == metadata["sha256"]
        assert image["path"] == metadata["file_name"]
        assert data.items() <= metadata.items()
        picture = Image.open(io.BytesIO(image["bytes"]))
        assert (picture.mode, picture.info) == ("RGB", {})


def test_failures_are_those_of_the_page(runs):
    text = section("## failures/")
    columns = [(name, type_) for name, type_, *_ in table(text, "column")]
    assert [columns_of(file) for file in sorted(runs.run.glob("failures/*"))] == [columns] * 2
    assert rows_of(runs.run / "failures") == json.loads(blocks("json", text)[0])


def test_answers_have_the_columns_of_the_table(runs):
    columns = [(name, type_) for name, type_, *_ in table(section("## scores/"), "column")]
    files = sorted((runs.run / "scores/self").glob("*.parquet"))
    assert [columns_of(file) for file in files] == [columns] * 3
    images = [(row["prompt_id"], row["image_index"], row["sha256"]) for row in rows_of(runs.run / "metadata")[:2]]
    footer = pq.read_metadata(files[0]).metadata
    assert footer[b"flashu.images"].decode() == hashlib.sha256(json.dumps(sorted(images)).encode()).hexdigest()
    assert footer[b"flashu.unanswered"] == b"0"


# ---------------------------------------------------------------------------------------------------------------- keys


def test_run_json_has_the_keys_of_the_page(runs):
    text, real, copy = section("## run.json"), load(runs.run / "run.json"), load(runs.good / "run.json")
    assert_alike(json.loads(blocks("json", text)[0]), real, "run.json")
    keys = [key for key, _ in table(text, "key")]
    flattened = {
        f"{name}.{key}" if isinstance(value, dict) and name not in ("config", "filter") else name
        for name, value in copy.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    assert set(keys) == flattened
    assert copy.keys() - real.keys() == {"filter"}
    assert_alike(json.loads(blocks("json", section("## Filtered copies"))[0]), copy["filter"], "filter")
    assert load(runs.folder / "runs/planned/run.json")["model"] is None


def test_summary_json_has_the_keys_of_the_page(runs):
    text, real = section("## summary.json"), load(runs.run / "summary.json")
    page = json.loads(blocks("json", text)[0])
    assert_alike(page, real, "summary.json")
    assert {name for key, _ in table(text, "key") for name in codes(key)} == real.keys()
    certain = ("version", "state", "shards", "prompts", "counted_shards")
    assert [page[key] for key in certain] == [real[key] for key in certain]
    assert page["failures"]["kinds"] == real["failures"]["kinds"]
    run = load(runs.good / "run.json")
    copy = load(runs.good / "summary.json")
    assert [copy[key] for key in ("config", "filter", "manifest", "model", "code")] == [
        run[key] for key in ("config", "filter", "manifest", "model", "code")
    ]
    assert copy["counted_shards"] is None


def test_what_files_carry_beside_their_rows_has_the_keys_of_the_page(runs):
    footer = pq.read_metadata(runs.run / "metadata/shard-00000.parquet").metadata[b"flashu.statistics"]
    assert_alike(json.loads(blocks("json", section("## metadata/"))[0]), json.loads(footer), "statistics.json")
    text = section("## scores.safetensors")
    with safe_open(runs.run / "scores.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["flashu"]) == json.loads(blocks("json", text)[0])
        of_layers = {re.sub(r"\d+", "0", name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        assert of_layers == {code for code in codes(text) if code.startswith("layers.")}


def test_scores_and_comparison_have_the_keys_of_the_page(runs, tmp_path):
    about, scores = map(json.loads, blocks("json", section("## scores/")))
    folder = runs.run / "scores/self"
    assert_alike(about, load(folder / "about.json"), "about.json")
    assert_alike(scores, load(folder / "scores.json"), "scores.json")
    summary = load(runs.run / "summary.json")
    arms = [Arm(name, LocalStorage(runs.run), runs.scored, summary, 0.014) for name in ("baseline", "flashu")]
    text = section("### A benchmark's folder")
    comparison = compare(arms)
    assert_alike(json.loads(blocks("json", text)[0]), comparison, "comparison.json")
    write_comparison(LocalStorage(tmp_path), comparison, arms, read_questions(QUESTIONS, "questions"), "self")
    assert {file.name for file in tmp_path.iterdir()} == {name for name in codes(text) if name.startswith("comparison")}


def test_log_and_card_begin_as_on_the_page(runs):
    (log,) = (runs.run / "logs").iterdir()
    shown, real = blocks("text", section("## logs/"))[0].splitlines(), log.read_text(encoding="utf-8").splitlines()
    assert [line.split("  ")[1:] for line in (shown[0], real[0])] == [["worker-0000", "prompt"]] * 2
    assert real[1].startswith(shown[1].removesuffix("no file"))
    assert (real[3], real[-1]) == (shown[3], shown[-1])
    card = (runs.run / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    made, told = yaml.safe_load(card), yaml.safe_load(blocks("yaml", section("## README.md"))[0])
    descriptions = [front_matter["configs"][0].pop("description") for front_matter in (made, told)]
    assert made == told
    assert all(re.fullmatch("4 images, [0-9a-f]{16}", description) for description in descriptions)


# ------------------------------------------------------------------------------------------------ formats, names, seeds


def test_a_tar_has_the_members_and_the_row_of_the_page(runs):
    text = section("## data/")
    with tarfile.open(runs.folder / "runs/shapes-tar/data/shard-00000.tar") as tar:
        assert tar.getnames() == blocks("text", text)[0].split()
        real = json.load(tar.extractfile("circle-0.json"))
        assert tar.extractfile("circle-0.txt").read().decode() == "a red circle"
    page = json.loads(blocks("json", text)[0])
    assert_alike(page, real, "circle-0.json")
    assert list(page) == list(real)
    assert real["flashu"].startswith(page.pop("flashu").removesuffix(f"{CUT}}}"))
    measured = [name for name in page if name.startswith("quality_") or name in ("sha256", "size_bytes")]
    assert {name: real[name] for name in page if name not in measured} == {
        name: page[name] for name in page if name not in measured
    }


def test_image_files_have_the_names_of_the_table(runs):
    shown = table(section("### Image files"), "prompt_id")
    assert [file_name(prompt_id, int(index), "png") for prompt_id, index, _ in shown] == [name for *_, name in shown]
    assert {name for *_, name in shown[:2]} <= {row["file_name"] for row in rows_of(runs.run / "metadata")}


def test_the_pages_seeds_are_those_of_the_run(runs):
    names, shown = {}, table(section("## Seeds"), "sampling.seed")
    exec(blocks("python", section("## Seeds"))[0], names)
    for run_seed, prompt_id, index, own, hashed, digest, seed in shown:
        given = int(run_seed), prompt_id, int(index), int(own) if own else None
        assert names["image_seed"](*given) == image_seed(*given) == int(seed)
        if hashed:
            assert hashlib.blake2b(hashed.encode("ascii"), digest_size=8).hexdigest() == digest
            assert int(digest, 16) // 2 == int(seed)
    seeds = {(prompt_id, index): int(seed) for _, prompt_id, index, *_, seed in shown}
    made = {(row["prompt_id"], str(row["image_index"])): row["seed"] for row in rows_of(runs.run / "metadata")}
    assert {image: seed for image, seed in seeds.items() if image in made} == {
        image: seed for image, seed in made.items() if image in seeds
    }
    assert len(made.keys() & seeds.keys()) == 3


# --------------------------------------------------------------------------------------------------------------- rules


def test_the_settings_that_may_differ_are_those_of_the_table(runs):
    earlier = load(runs.run / "run.json")
    tolerated = set()
    for setting, _ in flat(earlier["config"]):
        part, name = setting.split(".")
        another = [[8, 3.0]] if name == "schedule" else "another"
        config = earlier["config"] | {part: earlier["config"][part] | {name: another}}
        with suppress(InputError):
            going_on(earlier, earlier | {"config": config}, "runs/shapes")
            tolerated.add(setting)
    shown = {name for cell, _ in table(section("## Rules"), "setting") for name in codes(cell)}
    every = {name for name, _ in flat(RunConfig().to_dict())}
    expanded = {name for name in every for other in shown if name == other or name.startswith(other.rstrip("*"))}
    assert tolerated == expanded | {"manifest.columns"}, "which is in the fingerprint"
    other = earlier["manifest"] | {"fingerprint": "another", "path": "moved.parquet"}
    with pytest.raises(InputError, match=r"holds another run: the manifest's fingerprint was '[0-9a-f]+' and is 'ano"):
        going_on(earlier, earlier | {"manifest": other}, "runs/shapes")


@pytest.mark.parametrize(
    "told",
    [
        f"in row groups of {ROW_GROUP} images",
        f"above {MULTIPART_SIZE // 2**20} MiB a multipart upload",
        f"that `summary.json` counts the last {SUMMARY_EVERY_S:.0f} seconds",
        f"nothing was heard for {({120: 'two'}).get(SILENT_S)} minutes",
        f"of more than {MAX_WORKERS:,}, the others are one",
        f"and the first {FAILURES}",
        f"A start keeps at most {MOST_KINDS} kinds",
    ],
)
def test_numbers_are_those_of_the_code(told):
    assert told in " ".join(PAGE.split())


# ------------------------------------------------------------------------------------------------------------- reading


def test_the_pages_python_reads_the_run(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = {}
    for snippet in blocks("python"):
        exec(compile(snippet, "run-folder.md", "exec"), names)
    metadata = rows_of(runs.run / "metadata")
    ids = [row["prompt_id"] for row in metadata]
    assert names["dataset"]["prompt_id"][:] == names["rows"]["prompt_id"].tolist() == ids
    assert names["dataset"][0]["image"].size == (64, 64)
    assert names["table"]["prompt_id"].to_pylist() == ids
    assert names["row"]["file_name"] == metadata[2]["file_name"], "the tar's last"
    assert (names["prompt"], Image.open(io.BytesIO(names["picture"])).size) == ("two blue squares", (64, 64))
    assert [hashlib.sha256(data).hexdigest() for data in names["pictures"]] == [row["sha256"] for row in metadata[:3]]

    # As a worker leaves it that is killed between its images and their metadata.
    under_way = Path(shutil.copytree(runs.run, tmp_path / "under way"))
    (under_way / "metadata/shard-00000.parquet").rename(under_way / "metadata/.tmp-0123")
    (under_way / "README.md").unlink()
    for run, made in ((runs.run, metadata), (under_way, metadata[3:])):
        found = [(row, hashlib.sha256(data).hexdigest()) for row, data in names["committed_images"](run)]
        assert found == [(row, row["sha256"]) for row in made]
        assert names["committed_dataset"](run)["prompt_id"][:] == [row["prompt_id"] for row in made]

    # By name, shard 100,000 comes before 10,001.
    large = Path(shutil.copytree(runs.run, tmp_path / "large"))
    for folder in ("metadata", "data"):
        (large / folder / "shard-00000.parquet").rename(large / folder / "shard-100000.parquet")
        (large / folder / "shard-00001.parquet").rename(large / folder / "shard-10001.parquet")
    assert [row for row, _ in names["committed_images"](large)] == metadata[3:] + metadata[:3]
