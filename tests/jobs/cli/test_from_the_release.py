"""Every command of docs/from-the-release.md runs, and every setting that it names is there.

The page is read as a user would: its commands one after the other, in one folder, where what they name lies: folders
called as the released models are (the built-in model in them), and small files in place of the release's. What is put
in place of a value of the page stands in `STAND_INS`, and what is added to a command in `EXTRA`.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from shapes.bench import items, to_csv

from flashu import TextToImagePipeline
from jobs.scoring.benchmark import BenchmarkConfig
from jobs.scoring.geneval import GenevalConfig
from jobs.scoring.understanding import UnderstandingConfig
from jobs.settings.config import RunConfig
from jobs.settings.config_text import settings_of
from tests import fakes
from tests.command import flashu

PAGE = Path(__file__).parents[3] / "docs" / "from-the-release.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)

NOT_RUN = {}  # commands of the page that this test does not run, with the reason

RUNS = ("runs/flashu", "runs/demo", "runs/flashu-baseline", "runs/flashu-alone")
STAND_INS = (  # what no machine of the tests has, or has time for: (in commands that begin so, the page's, ours)
    ("generate", r"--size \d+", "--size 64"),
    ("generate", r"--steps 50", "--steps 12"),
    ("analyze activations", r"--steps 50", "--steps 12"),
    ("dpg", r"mplug", "self"),
    ("reproduce dpg", r"mplug", "self"),
    # All of DPG-Bench's commands are about one run, whose images are made once.
    ("manifest dpg", r"--num-images 1", "--num-images 4"),
    *(("dpg", rf"output\.path={name}(?= |$)", "output.path=runs/dpg") for name in RUNS),
    ("dpg", "arms=flashu", "arms=baseline"),
)
FEW = ("sampling.num_inference_steps=12", "sampling.size=64")
SMALL = ("cluster.workers=1", "cluster.gpus_per_worker=0", "cluster.cpus_per_worker=1")
ARMS = (*FEW, *SMALL, "flashu.num_inference_steps=12", "flashu.tau=3")
BASELINE = "arms=baseline"  # both are made in test_benchmark.py and test_reproduce.py
DPG = (*ARMS, BASELINE, "manifest.path=dpg.parquet", "manifest.limit=5", "manifest.shard_size=1")  # as --demo has it
EXTRA = {  # by how a command begins
    "run": (*FEW, *SMALL),
    "reproduce dpg": DPG,
    "dpg dpg-show-o2-1.5b": DPG,
    "dpg score": SMALL,
    "reproduce geneval": (*ARMS, BASELINE, "sampling.num_images=1"),
    "reproduce understanding": ("answering.max_new_tokens=8",),
}
REWRITTEN = (  # as in Show-o2's file
    {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite. It is red."},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups. Both are blue."},
)
KINDS = (RunConfig, BenchmarkConfig, GenevalConfig, UnderstandingConfig)
SETTINGS = {name for kind in KINDS for name in settings_of(kind)}
NOT_OURS = {  # settings of the release, and modules
    "model.showo.pretrained_model_path",
    "dataset.params.validation_prompts_file",
    "flashu.models",
    "flashu.patch",
    "evaluation.visualize_obd_scores",
    "evaluation.analyze_t2i_activations1",
}


@dataclass(frozen=True)
class Command:
    text: str  # of the page, without comments and line ends

    @property
    def arguments(self):
        return shlex.split(self.text)[1:]

    def begins(self, words):
        return self.arguments[: len(words.split())] == words.split()

    def as_run(self, cluster):
        text = self.text
        for words, theirs, ours in STAND_INS:
            if self.begins(words):
                text = re.sub(theirs, ours, text)
        extra = [setting for words, settings in EXTRA.items() if self.begins(words) for setting in settings]
        if set(SMALL) & set(extra):  # it has workers
            extra.append(cluster)
        return [*shlex.split(text)[1:], *extra]  # of a setting that is given twice, the last counts


def commands():
    """The page's, in order."""
    lines = "".join(body for kind, body in BLOCKS if kind == "bash").replace("\\\n", " ").splitlines()
    found = [Command(" ".join(shlex.join(shlex.split(line, comments=True)).split())) for line in lines]
    assert all(command.text.startswith("flashu ") for command in found), found
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that has what the page's commands name."""
    folder = tmp_path_factory.mktemp("show-o2")
    pipe = TextToImagePipeline.from_pretrained("embedded", device="cpu")
    for name in ("show-o2-1.5B", "show-o2-1.5B-HQ", "show-o2-7B"):
        pipe.save_pretrained(folder / "showlab" / name)
    fakes.write_whole_folder(folder / "fine-tuned", layout="variant bin")

    asked = items()[:2]
    for name in ("prompts", "evaluation", "docs/mmu"):
        (folder / name).mkdir(parents=True)
    (folder / "evaluation/dpg_bench.csv").write_text(to_csv(asked))
    listed = [{"prompt": item.text, "prompt_file_name": item.id} for item in asked]
    (folder / "prompts/dpg_bench_meta_data.json").write_text(json.dumps(listed))
    (folder / "prompts/t2i_prompts.txt").write_text("a red circle\ntwo blue squares\n")
    (folder / "first-prompt.txt").write_text("a red circle\n")
    lines = "".join(json.dumps(line) + "\n" for line in REWRITTEN)
    (folder / "prompts/geneval_meta_data_rewritten.jsonl").write_text(lines)
    photo = "docs/mmu/pexels-jane-pham-727419-1571673.jpg"
    Image.new("RGB", (90, 64), "red").save(folder / photo)
    question = {"image": photo, "question": "Is the background red?", "answer": "yes"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    return folder


def test_every_command_of_the_page_runs(place, cluster, monkeypatch):
    monkeypatch.chdir(place)
    left_out = set(NOT_RUN)
    # The manifest of DPG-Bench comes first, as all commands are about that one here.
    for command in sorted(commands(), key=lambda command: not command.begins("manifest dpg")):
        if command.text in NOT_RUN:
            left_out.discard(command.text)
            continue
        outcome = flashu(*command.as_run(cluster))
        assert outcome.code == 0, (command.text, outcome)
        if command.begins("dpg dpg-show-o2-1.5b"):
            assert "Loaded: " not in outcome.out, "it goes on with what `reproduce dpg` made, which is all there"
    assert not left_out, "of these the page says nothing"

    for name in ("fox.png", "fox-512.png", "fox-1024.png", "fox-7b.png", "fox-flashu.png"):
        assert Image.open(place / name).size == (64, 64)
    figures = {"obd-generation", "obd-understanding", "compare", "layers", "similarities", "head-drift"}
    assert {file.stem for file in (place / "analysis").glob("*.png")} == figures
    assert figures - {"obd-understanding"} <= set(re.findall(r"[\w-]+(?=\.png)", TEXT))
    assert len(list((place / "grids").iterdir())) == 2
    assert (place / "for-the-release/pytorch_model.bin").is_file()
    assert (place / "for-the-release" / fakes.VAE_FILE).is_file()
    assert (place / "runs/geneval/samples/baseline/00000/metadata.jsonl").is_file()
    assert (place / "geneval-samples/00001/samples/0000.png").is_file()


def test_every_python_block_of_the_page_runs_as_it_is_written(place, monkeypatch):
    monkeypatch.chdir(place)
    names, made = {}, []
    for kind, body in BLOCKS:
        assert kind in ("bash", "python"), kind
        if kind == "python":
            names.pop("images", None)
            exec(compile(body, PAGE.name, "exec"), names)
            made.append([image.size for image in names.get("images", [])])
    assert made == [[(64, 64)] * 2, [(64, 64)] * 2, []]
    assert names["scores"].method == "tokens"
    assert names["pipe"].model.dtype == torch.float32
    assert [type(answer) for answer in (names["answer"], *names["answers"])] == [str, str, list]


def test_settings_that_the_page_names_are_there():
    in_words = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    dotted = set(re.findall(r"`([a-z]\w*(?:\.[A-Za-z]\w*)+)(?:=[^`]*)?`", in_words))
    assert {"flashu.calibration", "sampling.time_shift", "cluster.gpus_per_worker", "flashu.und_r_LS"} <= dotted
    files = {name for name in dotted if Path(name).suffix in (".json", ".html", ".py", ".sh", ".png", ".bin", ".pth")}
    assert dotted - files - NOT_OURS <= SETTINGS
