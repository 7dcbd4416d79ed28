"""Judges of transformers, from small random checkpoints; what becomes of those that cannot be had; memory."""

import io
import json
import os
import shutil
import sys

import pytest
import torch
from PIL import Image

from cluster.open_storage import open_storage
from cluster.storage import S3Options, StorageError
from cluster.work import Lease, Place, SetupError, WorkerBrokenError
from flashu.errors import InputError, OutOfMemoryError
from jobs.dataset.images import StoredImage
from jobs.scoring.answers import AnsweringWork
from jobs.scoring.hf_judge import open_hf
from jobs.scoring.judges import verdict
from jobs.scoring.open_judge import absolute_name, check_judge_name, open_judge, scores_folder
from jobs.scoring.questions import Item, Question
from jobs.settings.config import ModelSection
from tests.jobs.scoring.vqa_checkpoints import make_blip, make_llava, make_vilt

PICTURES = [
    Image.new("RGB", (50, 40), "red"),
    Image.effect_noise((64, 96), 90).convert("RGB"),
    Image.linear_gradient("L").resize((40, 70)).convert("RGB"),
]
QUESTIONS = ["is it red?", "is there a dog to the left of it?", "why?"]
PAIRS = [(picture, question) for picture in PICTURES for question in QUESTIONS]
MAKERS = {"vilt": make_vilt, "blip": make_blip, "llava": make_llava}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa")
    return {name: make(folder / name) for name, make in MAKERS.items()}


@pytest.fixture
def changed(checkpoints, tmp_path):
    """A copy of a checkpoint that a test may change."""
    return lambda name: shutil.copytree(checkpoints[name], tmp_path / name)


def opened(folder):
    return open_hf(f"hf:{folder}", str(folder), CPU)


# ------------------------------------------------------------------------------------------------------------ answers


def of_vilt(folder, picture, question):
    from transformers import ViltForQuestionAnswering, ViltProcessor

    model = ViltForQuestionAnswering.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(**ViltProcessor.from_pretrained(folder)(picture, question, return_tensors="pt")).logits
    return model.config.id2label[logits.argmax(-1).item()]


def of_blip(folder, picture, question):
    from transformers import BlipForQuestionAnswering, BlipProcessor

    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    tokens = model.generate(**processor(picture, question, return_tensors="pt"), max_new_tokens=16)
    return processor.decode(tokens[0], skip_special_tokens=True).strip()


def of_llava(folder, picture, question):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    text = f"<s><user><image>{question} Answer yes or no.<assistant>"
    inputs = processor(picture, text, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize(("kind", "plainly"), [("vilt", of_vilt), ("blip", of_blip), ("llava", of_llava)])
def test_answers_in_batches_are_those_of_the_model_asked_one_at_a_time(checkpoints, kind, plainly):
    expected = [plainly(checkpoints[kind], picture, question) for picture, question in PAIRS]
    assert len(set(expected)) > 1, "the same answer to everything would show nothing"
    vqa = opened(checkpoints[kind])
    assert vqa.answer(*zip(*PAIRS, strict=True)) == expected
    assert vqa.answer(*zip(*reversed(PAIRS), strict=True)) == expected[::-1]


def test_pictures_of_other_modes_are_answered_as_their_colours(checkpoints):
    vqa = opened(checkpoints["llava"])
    palette = [picture.convert("RGB").convert("P") for picture in PICTURES]
    colours = [picture.convert("RGB") for picture in palette]
    assert vqa.answer(palette, QUESTIONS) == vqa.answer(colours, QUESTIONS)


def test_a_question_that_is_longer_than_the_model_reads_is_answered(checkpoints):
    assert opened(checkpoints["vilt"]).answer(PICTURES[:1], ["is " * 500]) != [""]


def test_the_identity_is_of_the_weights_in_whichever_file_they_are(checkpoints, changed, tmp_path):
    folder = changed("vilt")
    _weights_as_pickle(folder)
    assert opened(folder).identity == opened(checkpoints["vilt"]).identity
    assert opened(make_vilt(tmp_path / "other", seed=2)).identity != opened(checkpoints["vilt"]).identity


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        *[(text, True) for text in ("yes", "Yes.", " YES", "yes, it is", "**Yes**", "“yes”")],
        *[(text, False) for text in ("no", "No.", "no, it is blue", "- no")],
        *[(text, None) for text in ("", "maybe", "yesterday", "not sure", "nothing", "A yes")],
    ],
)
def test_an_answer_is_read_by_its_first_word(answer, meaning):
    assert verdict(answer) is meaning


# --------------------------------------------------------------------------------------- models that cannot be had


@pytest.mark.parametrize("name", ["oracle", "", "hf:", "hf", "HF:a/b", "self ", "mplug2"])
def test_an_unknown_name_is_told_which_there_are(name):
    with pytest.raises(InputError, match=r"there are: self, .*; hf:ID_OR_PATH, .*; mplug, "):
        check_judge_name(name)


@pytest.mark.parametrize("name", ["s3://key:secret/x@bucket/vilt", "hf:https://user:secret@host/vilt"])
def test_a_url_in_a_wrong_place_is_not_repeated(name):
    with pytest.raises(InputError) as refused:
        check_judge_name(name)
    assert "secret" not in str(refused.value)


def test_credentials_in_an_s3_url_are_refused_and_not_repeated():
    with pytest.raises(StorageError, match="holds credentials") as refused:
        check_judge_name("hf:s3://key:secret@bucket/vilt")
    assert "secret" not in str(refused.value)


def test_a_folder_that_is_not_there_or_holds_no_checkpoint_is_known_before_it_is_loaded(checkpoints, tmp_path):
    check_judge_name(f"hf:{checkpoints['vilt']}")
    check_judge_name("hf:dandelin/vilt-b32-finetuned-vqa")
    with pytest.raises(InputError, match=r"has no config\.json"):
        check_judge_name(f"hf:{tmp_path}")
    for missing in (tmp_path / "nowhere", "./nowhere", "nowhere", "a/b/c", "x" * 5000, "~no-such-user/x"):
        with pytest.raises(InputError, match="there is no such folder"):
            check_judge_name(f"hf:{missing}")


def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)  # which is how Python marks a module that cannot be imported
    with pytest.raises(InputError, match=r"mplug needs modelscope: pip install 'flashu\[mplug\]'"):
        check_judge_name("mplug")


def test_a_package_that_only_this_node_lacks_is_named_too(checkpoints, monkeypatch):
    def load(*_):  # as SmolVLM's processor says it
        raise ImportError("Package `num2words` is required to run SmolVLM processor. Install it with pip.")

    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setattr("jobs.scoring.hf_judge._load", load)
    for package, name, extra in (
        ("num2words", f"hf:{checkpoints['vilt']}", "vqa"),
        ("modelscope", "mplug", "mplug"),
    ):
        with pytest.raises(InputError, match=rf"needs a package that is not installed: .*{package}.*flashu\[{extra}\]"):
            open_judge(name, ModelSection(), open_storage("/nowhere"), S3Options(), "cpu")


def _weights_as_pickle(folder, weights=None):
    from safetensors.torch import load_file

    torch.save(weights or load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _edited(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


class _RunsCode:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_checkpoint_runs_no_code(changed, tmp_path):
    mark = tmp_path / "ran"
    folder = changed("vilt")
    _weights_as_pickle(folder, {"a": _RunsCode(mark)})
    with pytest.raises(InputError, match="its weights hold code, which is not run"):
        opened(folder)
    folder = changed("blip")
    _edited(folder, model_type="new", auto_map={"AutoConfig": "new.Config"})
    (folder / "new.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(InputError, match="contains custom code which must be executed"):
        opened(folder)
    assert not mark.exists()


def _without_head(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.3")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def _of_bert(folder):
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **size)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "damage", "told"),
    [
        ("vilt", _without_head, r"2 of its weights are missing, or of another size \(classifier.3.bias, "),
        ("vilt", _of_bert, "a model of the kind 'bert', which answers no questions about pictures"),
        ("vilt", lambda folder: _edited(folder, hidden_size=64), "of its weights are missing, or of another size"),
        ("vilt", lambda folder: _edited(folder, model_type="new"), "model type `new` but Transformers does not"),
        ("vilt", lambda folder: os.truncate(folder / "model.safetensors", 999), "SafetensorError"),
        ("vilt", lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        ("vilt", lambda folder: (folder / "tokenizer.json").unlink(), "its tokenizer knows no words"),
        ("llava", lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
        ("llava", lambda folder: (folder / "chat_template.jinja").write_text("{{ a"), "TemplateSyntaxError"),
        ("llava", lambda folder: (folder / "chat_template.jinja").write_text("no image"), "cannot be used as a judge"),
    ],
)
def test_a_checkpoint_that_cannot_answer_is_refused_in_one_line(changed, kind, damage, told):
    folder = changed(kind)
    damage(folder)
    with pytest.raises(InputError, match=told) as refused:
        opened(folder)
    assert f"hf:{folder}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_hub_id_that_cannot_be_fetched_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the hub cannot be reached and the files are not in the local cache"):
        open_hf("hf:no/such", "no/such", CPU)


def test_a_model_in_s3_is_fetched_and_one_that_is_not_there_known_beforehand(checkpoints, bucket, tmp_path):
    s3, section = S3Options(bucket.endpoint_url), ModelSection(cache_dir=str(tmp_path))
    storage = open_storage(f"{bucket.url}/models/vilt", s3)
    for file in checkpoints["vilt"].iterdir():
        storage.put(file.name, file.read_bytes())
    check_judge_name(f"hf:{storage.url}", s3)
    vqa = open_judge(f"hf:{storage.url}", section, storage, s3, "cpu")
    assert vqa.answer(PICTURES, QUESTIONS) == opened(checkpoints["vilt"]).answer(PICTURES, QUESTIONS)
    with pytest.raises(InputError, match=r"is no checkpoint: there is no s3://.*/models/config.json"):
        check_judge_name(f"hf:{bucket.url}/models", s3)


def test_each_name_has_a_folder_of_its_own_and_one_model_one_name(checkpoints, monkeypatch):
    assert scores_folder("self") == "scores/self/"
    assert scores_folder("hf:a/b").startswith("scores/hf-a-b-")
    names = ["self", "mplug", "hf:self", "hf:a/b", "hf:a-b", "hf:a/B", "hf:s3://a/b", "hf:../../b", "hf:" + 900 * "a/"]
    folders = {scores_folder(name) for name in names}
    assert len(folders) == len(names)
    assert all(len(folder) < 100 and folder.count("/") == 2 and folder.isascii() for folder in folders)
    monkeypatch.chdir(checkpoints["vilt"].parent)
    assert absolute_name("hf:vilt") == absolute_name("hf:./vilt/") == f"hf:{checkpoints['vilt']}"
    assert absolute_name("hf:a/b") == "hf:a/b"


# ------------------------------------------------------------------------------------------------ memory, and worse


@pytest.fixture
def worker(checkpoints, tmp_path):
    """A worker that is set up with ViLT, and what it found about six images with eight questions each."""
    questions = tuple(Question(number, "is it? " * number, (), "entity") for number in range(1, 9))
    items = {"a": Item("a", "a prompt", questions)}
    name = f"hf:{checkpoints['vilt']}"
    work = AnsweringWork(str(tmp_path), S3Options(), {}, ModelSection(), name, items, "scores/x/")
    work.setup(Place("worker", "node", 0.0))
    return work


@pytest.fixture
def images():
    buffers = [io.BytesIO() for _ in range(6)]
    for buffer, picture in zip(buffers, 2 * PICTURES, strict=True):
        picture.save(buffer, "png")
    return [StoredImage("a", index, f"a-{index}.png", "0", buffer.getvalue()) for index, buffer in enumerate(buffers)]


@pytest.fixture
def network_raises(worker, monkeypatch):
    """Lets the network raise what `error_of(batch size)` returns. Returns the batch sizes that it was run with."""

    def install(error_of):
        sizes, forward = [], worker.judge.model.forward

        def raising(input_ids, **inputs):
            sizes.append(len(input_ids))
            if error := error_of(len(input_ids)):
                raise error
            return forward(input_ids=input_ids, **inputs)

        monkeypatch.setattr(worker.judge.model, "forward", raising)
        return sizes

    return install


def _process(worker, images, lease=Lease(1, 0, 1)):  # noqa: B008 - it never changes
    running = []
    answers, _ = worker.process(lease, images, running.append)
    return answers, running


def test_all_questions_about_all_images_are_answered_some_at_a_time(worker, images, network_raises):
    sizes = network_raises(lambda size: None)
    answers, running = _process(worker, images)
    assert [(row["image_index"], row["question_id"]) for row in answers] == [
        (i, q) for i in range(6) for q in range(1, 9)
    ]
    assert sizes == [32, 16]
    assert running == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("full", [torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError("out of memory")])
def test_when_memory_runs_out_batches_are_halved_and_every_question_is_answered(worker, images, network_raises, full):
    expected, _ = _process(worker, images)
    sizes = network_raises(lambda size: full if size > 5 else None)
    assert _process(worker, images)[0] == expected
    assert sizes == [32, 16, 8, *[4] * 12]
    sizes.clear()
    assert _process(worker, images)[0] == expected
    assert sizes == [4] * 12, "a worker remembers how much fits"


def test_a_worker_is_replaced_when_not_even_one_question_fits_or_the_device_fails(worker, images, network_raises):
    network_raises(lambda size: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(WorkerBrokenError, match="CUDA out of memory"):
        _process(worker, images)
    network_raises(lambda size: RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(WorkerBrokenError, match="an illegal memory access"):
        _process(worker, images)


def test_images_run_alone_where_the_lease_says_so_and_those_given_up_are_told(worker, images):
    answers, running = _process(worker, images, Lease(1, 0, 4, frozenset({1, 2}), {5: "it killed two workers"}))
    assert running == [[1], [2], [0, 3, 4]]
    assert [row for row in answers if row.get("error")] == [
        {"prompt_id": "a", "image_index": 5, "error": "it killed two workers"}
    ]
    assert len(answers) == 1 + 5 * 8


def test_a_model_that_cannot_be_had_ends_the_setup_in_one_line(worker, tmp_path):
    worker.judge_name = f"hf:{tmp_path}/nowhere"
    with pytest.raises(SetupError, match=r"no such checkpoint folder: .*/nowhere \(on node gpu-7\)"):
        worker.setup(Place("worker", "gpu-7", 0.0))
