"""Every command and every Python block of README and docs runs, and every setting that they name is there.

A page is read as a user would: what it says to run, one after the other, in one folder, where what it names lies:
folders called as the released models are (the built-in model in them), and small files in place of real ones. What is
put in place of a value of a page stands in `STAND_INS`, what is added to a command in `EXTRA`, and what is not run here
in `RUN_ELSEWHERE`, with the test that runs it, or the reason. Of those, at least the options are read.
"""

import argparse
import json
import pydoc
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch
import typer
from PIL import Image
from shapes.bench import items, to_csv

import jobs.cli.main
from flashu import TextToImagePipeline
from jobs.scoring.benchmark import BenchmarkConfig
from jobs.scoring.geneval import GenevalConfig
from jobs.scoring.understanding import UnderstandingConfig
from jobs.settings.config import RunConfig
from jobs.settings.config_text import settings_of
from tests import fakes
from tests.command import benchmark, flashu

ROOT = Path(__file__).parents[2]
FROM_THE_RELEASE = "docs/from-the-release.md"
TOGETHER = (  # pages that are read one after the other in one folder, as what one makes another goes on with
    "docs/prompts-to-dataset.md",
    "README.md",
    "docs/filter-and-share.md",
    "docs/pictures-and-questions.md",
    "docs/accelerate.md",
    "docs/checkpoints.md",
    "docs/benchmarks.md",
    "docs/cluster.md",
    "docs/how-it-works/exactness.md",
    "docs/how-it-works/performance.md",
    "docs/how-it-works/quality.md",
    "docs/how-it-works/design.md",
    "docs/index.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "cluster/deploy/README.md",
    "flashu/embedded/README.md",
)
APART = ("docs/run-folder.md", "docs/how-it-works/plan.md")  # whose Python is run by tests of their own
PAGES = (*TOGETHER, FROM_THE_RELEASE, *APART)
GENERATED = "docs/reference/"  # by what is tested in test_reference.py
POINTERS = {f"docs/{name}.md" for name in ("built-in-model", "changelog", "contributing", "deploy")}  # to pages above

RUN_ELSEWHERE = {  # a command, or with a space or slash at its end how some begin: the test that runs it, or why none
    "flashu submit ": "tests/jobs/driver/test_submit.py",
    "flashu dpg --demo": "tests/jobs/scoring/test_benchmark.py",
    "flashu dpg show-o2-1.5b ": "tests/jobs/scoring/test_benchmark.py",
    "flashu dpg score runs/dpg/flashu ": "tests/jobs/scoring/test_judges.py",
    "flashu dpg export runs/dpg/flashu ": FROM_THE_RELEASE,
    "flashu reproduce dpg --model showlab/show-o2-1.5B --questions dpg_bench.csv -o runs/dpg": FROM_THE_RELEASE,
    "flashu reproduce dpg": "tests/jobs/scoring/test_benchmark.py",
    "flashu reproduce geneval --model showlab/show-o2-1.5B --prompts prompts/": "tests/jobs/cli/test_reproduce.py",
    "flashu geneval export ": "tests/jobs/scoring/test_geneval_folders.py",
    "flashu plan": "tests/docs/test_how_it_works.py",
    "flashu analyze obd": "tests/jobs/cli/test_acceleration.py",
    "flashu analyze obd --task understanding": "tests/jobs/cli/test_acceleration.py",
    "flashu analyze activations": "tests/jobs/cli/test_acceleration.py",
    "ray job submit ": "tests/jobs/driver/test_submit.py",
    "hf upload ": "needs an account on the hub",
    "pip install ": "make demo and make test install the same",
    "make ": "by whoever runs it",
    "python benchmarks/": "tests/benchmarks/ runs each in small",
    "PYTHONPATH=. python benchmarks/": "tests/benchmarks/ runs each in small",
    "python docs/drawing/": "tests/docs/test_pictures.py",
    "pytest ": "by whoever runs it",
    "python -m pytest ": "by whoever runs it",
    ".venv/bin/": "by whoever runs it",
    "pre-commit ": "tests/docs/test_contributing.py holds it against make lint",
}

RUNS = ("runs/flashu", "runs/demo", "runs/flashu-baseline", "runs/flashu-alone")
STAND_INS = (  # what no machine of the tests has, or has time for: (in commands that begin so, the page's, ours)
    ("generate", r"--size \d+", "--size 64"),
    ("generate", r"--steps 50", "--steps 12"),
    ("analyze activations", r"--steps 50", "--steps 3"),
    ("dpg", r"mplug", "self"),
    ("reproduce dpg", r"mplug", "self"),
    # All of DPG-Bench's commands of a page are about one run, whose images are made once.
    ("manifest dpg", r"--num-images 1", "--num-images 4"),
    *(("dpg", rf"output\.path={name}(?= |$)", "output.path=runs/dpg") for name in RUNS),
    ("dpg", "arms=flashu", "arms=baseline"),
)
FEW = ("sampling.num_inference_steps=12", "sampling.size=64")
SMALL = ("cluster.workers=1", "cluster.gpus_per_worker=0", "cluster.cpus_per_worker=1")
BASELINE = "arms=baseline"  # both are made in test_benchmark.py and test_reproduce.py
ARMS = (*FEW, *SMALL, BASELINE, "flashu.num_inference_steps=12", "flashu.tau=3")
DPG = (*ARMS, "manifest.path=dpg.parquet", "manifest.limit=5", "manifest.shard_size=1")  # as --demo has it
EXTRA = {  # by how a command begins
    "run": (*FEW, *SMALL, "flashu.preset=off"),
    "reproduce dpg": DPG,
    "dpg dpg-show-o2-1.5b": DPG,
    "dpg score": SMALL,
    "analyze obd": ("--steps", "3"),
    "reproduce understanding": ("answering.max_new_tokens=8",),
}
REWRITTEN = (  # as in Show-o2's file
    {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite. It is red."},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups. Both are blue."},
)
PROMPTS = "a red circle\ntwo blue squares\na green star on a black background\n"
PHOTO = "docs/mmu/pexels-jane-pham-727419-1571673.jpg"
KINDS = (RunConfig, BenchmarkConfig, GenevalConfig, UnderstandingConfig)
SETTINGS = {name for kind in KINDS for name in settings_of(kind)}
NOT_OURS = {"model.showo.pretrained_model_path", "model.save_pretrained", "quality.NAME", "quality.broken"}
NEW = re.compile("NAME|DATE")  # in the name of a file that one adds
FILES = (".py", ".json", ".yaml", ".svg", ".html", ".safetensors", ".bin")


@dataclass(frozen=True)
class Command:
    text: str  # of the page, without comments and line ends

    @property
    def arguments(self):
        return shlex.split(self.text)[1:]

    def begins(self, words):
        return self.arguments[: len(words.split())] == words.split()

    @property
    def runs_elsewhere(self):
        """Where this command is run, or why it is not. None if here."""
        begins = (begin for begin in RUN_ELSEWHERE if begin[-1] in " /" and self.text.startswith(begin))
        return RUN_ELSEWHERE.get(self.text) or next((RUN_ELSEWHERE[begin] for begin in begins), None)

    def as_run(self, cluster):
        text = self.text
        for words, theirs, ours in STAND_INS:
            if self.begins(words):
                text = re.sub(theirs, ours, text)
        extra = [setting for words, settings in EXTRA.items() if self.begins(words) for setting in settings]
        if set(SMALL) & set(extra):  # it has workers
            extra.append(cluster)
        return [*shlex.split(text)[1:], *extra]  # of a setting that is given twice, the last counts


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page) -> Iterator[tuple[str, str]]:
    """The language and the text of each block of a page."""
    return re.findall(r"^```(\S*)\n(.*?)^```$", text_of(page), flags=re.DOTALL | re.MULTILINE)


def steps(page) -> Iterator[Command | str]:
    """What a page says to run, in order: commands, and Python."""
    for language, body in blocks(page):
        if language == "python":
            yield body
        elif language == "bash":
            for line in body.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield Command(" ".join(shlex.join(words).split()))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder that has what the pages' commands name."""
    folder = tmp_path_factory.mktemp("inputs")
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    for name in ("show-o2-1.5B", "show-o2-1.5B-HQ", "show-o2-7B"):
        pipe.save_pretrained(folder / "showlab" / name)
    fakes.write_whole_folder(folder / "fine-tuned", layout="variant bin")

    asked = items()[:2]
    for name in ("prompts", "evaluation", "docs/mmu", "dpg_bench_prompts"):
        (folder / name).mkdir(parents=True)
    for name in ("evaluation/dpg_bench.csv", "dpg_bench.csv"):
        (folder / name).write_text(to_csv(asked))
    for item in asked:
        (folder / "dpg_bench_prompts" / f"{item.id}.txt").write_text(item.text)
    listed = [{"prompt": item.text, "prompt_file_name": item.id} for item in asked]
    (folder / "prompts/dpg_bench_meta_data.json").write_text(json.dumps(listed))
    (folder / "prompts.txt").write_text(PROMPTS)
    for name in ("prompts/t2i_prompts.txt", "my-prompts.txt", "first-prompt.txt"):
        (folder / name).write_text("a red circle\n")
    captions = "id,caption\n" + "".join(f"{number},{line}\n" for number, line in enumerate(PROMPTS.splitlines()))
    (folder / "captions.csv").write_text(captions + "3,a red circle\n")
    lines = "".join(json.dumps(line) + "\n" for line in REWRITTEN)
    for name in ("prompts/geneval_meta_data_rewritten.jsonl", "geneval_meta_data_rewritten.jsonl"):
        (folder / name).write_text(lines)
    (folder / "evaluation_metadata.jsonl").write_text(lines)
    Image.new("RGB", (90, 64), "red").save(folder / PHOTO)
    question = {"image": PHOTO, "question": "Is the background red?", "answer": "yes"}
    for name in ("questions.jsonl", "pairs.jsonl"):
        (folder / name).write_text(json.dumps(question) + "\n")
    return folder


@pytest.fixture
def no_gpu_needed(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.nn.Module, "cuda", lambda module: module)


def lay(inputs, folder):
    """A folder for a page: what it names is there, and what it makes stays there."""
    folder.mkdir()
    for entry in inputs.iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


def run(page, cluster, names, done) -> list[list[tuple[int, int]]]:
    """Do what a page says, here. Returns the sizes of the `images` that each block of Python has made.

    names: what the page's Python knows. done: the commands that earlier pages had, too.
    """
    made = []
    for step in steps(page):
        if isinstance(step, str):
            names.pop("images", None)
            exec(compile(step, page, "exec"), names)
            made.append([image.size for image in names.get("images", [])])
        elif not step.runs_elsewhere and step not in done:
            done.add(step)
            assert step.text.startswith("flashu "), f"{page}: what runs `{step.text}`?"
            outcome = flashu(*step.as_run(cluster))
            assert outcome.code == 0, (page, step.text, outcome)
            if page == FROM_THE_RELEASE and step.begins("dpg dpg-show-o2-1.5b"):
                assert "Loaded: " not in outcome.out, "it goes on with what `reproduce dpg` made, which is all there"
    return made


@pytest.mark.usefixtures("no_gpu_needed")
def test_what_our_pages_say_runs(inputs, cluster, tmp_path, monkeypatch):
    place = lay(inputs, tmp_path / "here")
    monkeypatch.chdir(place)
    names, done = {page: {} for page in TOGETHER}, set()
    made = {page: run(page, cluster, names[page], done) for page in TOGETHER}

    assert (place / "runs/first/report.html").is_file()
    assert len(names["README.md"]["dataset"]) == 3
    for page in ("docs/prompts-to-dataset.md", "README.md"):
        assert names[page]["dataset"][0]["image"].size == (64, 64)
    assert made["README.md"][1] == [(64, 64)] * 2
    assert isinstance(names["README.md"]["answer"], str)
    assert names["README.md"]["pipe"].model.acceleration is None, "it reverts to the baseline"

    library = names["docs/pictures-and-questions.md"]
    assert made["docs/pictures-and-questions.md"] == [[(64, 64)] * 2, [(64, 64)], []]
    assert [type(answer) for answer in (library["answer"], *library["answers"])] == [str, str, list]
    assert len(library["probabilities"]) == 2

    accelerated = names["docs/accelerate.md"]
    assert made["docs/accelerate.md"] == [[(64, 64)] * 2, [(64, 64)] * 2, [], []]
    assert accelerated["config"].total_steps == 32
    assert accelerated["fast_config"].r_p == 0.30
    assert accelerated["quality_config"].tau == 15
    assert accelerated["model"].acceleration is None, "the last block reverts to the baseline"
    assert Image.open(place / "accelerated.png").size == (64, 64)
    assert (place / "for-the-release/pytorch_model.bin").is_file()


@pytest.mark.usefixtures("no_gpu_needed")
def test_what_the_page_for_those_from_the_release_says_runs(inputs, cluster, tmp_path, monkeypatch):
    place, page, names = lay(inputs, tmp_path / "show-o2"), FROM_THE_RELEASE, {}
    monkeypatch.chdir(place)
    first = next(step for step in steps(page) if isinstance(step, Command) and step.begins("manifest dpg"))
    assert flashu(*first.as_run(cluster)).code == 0  # as all of DPG-Bench's commands are about that one here
    made = run(page, cluster, names, {first})

    for name in ("fox.png", "fox-512.png", "fox-1024.png", "fox-7b.png", "fox-flashu.png"):
        assert Image.open(place / name).size == (64, 64)
    figures = {"obd-generation", "obd-understanding", "compare", "layers", "similarities", "head-drift"}
    assert {file.stem for file in (place / "analysis").glob("*.png")} == figures
    assert figures - {"obd-understanding"} <= set(re.findall(r"[\w-]+(?=\.png)", text_of(page)))
    assert len(list((place / "grids").iterdir())) == 2
    assert (place / "for-the-release/pytorch_model.bin").is_file()
    assert (place / "for-the-release" / fakes.VAE_FILE).is_file()
    assert made == [[(64, 64)] * 2, [(64, 64)] * 2, []]
    assert names["scores"].method == "tokens"
    assert names["pipe"].model.dtype == torch.float32
    assert [type(answer) for answer in (names["answer"], *names["answers"])] == [str, str, list]


def test_every_page_is_read():
    written = {str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md") if "_build" not in file.parts}
    assert {page for page in written - POINTERS if not page.startswith(GENERATED)} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are_of(page):
    known = {"bash", "python", "text", "json", "yaml", "sql", "{toctree}"}
    assert {language for language, _ in blocks(page)} <= known


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    found = re.findall(r"`((?:flashu|jobs|cluster|manifests|benchmarks|tests|docs)/[\w./-]*\w)`", text_of(page))
    assert [name for name in found if not (ROOT / name).exists() and not NEW.search(name)] == []


@pytest.mark.parametrize("page", PAGES)
def test_what_runs_elsewhere_has_its_options(page, monkeypatch):
    for step in steps(page):
        if isinstance(step, str) or not step.runs_elsewhere:
            continue
        where = step.runs_elsewhere.split()[0]
        assert "/" not in where or (ROOT / where).exists(), where
        if step.text.startswith("flashu "):
            reads_options(step.arguments)
        elif "python benchmarks/" in step.text:
            words = shlex.split(step.text)
            script = next(number for number, word in enumerate(words) if word.startswith("benchmarks/"))
            reads_options_of_script(Path(words[script]).name, words[script + 1 :], monkeypatch)
        elif step.text.startswith("make "):
            assert re.search(rf"^{step.arguments[0]}:", text_of("Makefile"), re.MULTILINE), step.text


def reads_options(arguments):
    command, context = typer.main.get_command(jobs.cli.main.app), None
    while True:
        context = command.make_context(command.name, arguments, parent=context)
        if not isinstance(command, click.Group):
            return
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


def reads_options_of_script(script, arguments, monkeypatch):
    def read(parser, *given, before=argparse.ArgumentParser.parse_args, **named):
        before(parser, *given, **named)
        sys.exit(0)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        outcome = benchmark(script, *arguments)
    assert outcome.code == 0, outcome


def test_settings_that_the_pages_name_are_there():
    found = set()
    for page in (*TOGETHER, FROM_THE_RELEASE):
        in_words = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
        found |= set(re.findall(r"`([a-z]\w*(?:\.[A-Za-z]\w*)+)(?:=[^`]*)?`", in_words))
        given = [word for step in steps(page) if isinstance(step, Command) for word in step.arguments]
        found |= {match[1] for word in given if (match := re.match(r"([a-z_]+\.[A-Za-z_.]+)=", word))}
    assert {"flashu.calibration", "sampling.time_shift", "cluster.gpus_per_worker", "flashu.und_r_LS"} <= found
    sections = {name.split(".")[0] for name in SETTINGS if "." in name}
    named = {name for name in found if name.split(".")[0] in sections and Path(name).suffix not in FILES}
    unknown = {name for name in named - SETTINGS - NOT_OURS if not name.startswith("manifest.columns.")}
    assert not {name for name in unknown if pydoc.locate(name) is None}
