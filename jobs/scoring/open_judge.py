"""The judge that a name means: `self`, `mplug`, or `hf:` with a checkpoint in transformers' layout (`hf_judge`)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby

from PIL import Image

from cluster.checkpoint_cache import local_copy
from cluster.open_storage import open_storage
from cluster.storage import S3Options, Storage
from flashu.checkpoints.hub import HUB_ID
from flashu.devices import resolve_device
from flashu.errors import InputError
from flashu.fingerprint import fingerprint
from jobs.scoring.hf_judge import open_hf
from jobs.scoring.judges import Judge, unusable
from jobs.settings.config import FlashUSection, ModelSection, RunConfig
from jobs.settings.inputs import absolute, check_model, check_transformers, local
from jobs.worker.model import load

SELF, MPLUG, HF = "self", "mplug", "hf:"
MPLUG_CHECKPOINT = "damo/mplug_visual-question-answering_coco_large_en"
FORMS = (
    f"{SELF}, the model that made the pictures; {HF}ID_OR_PATH, a visual-question-answering or chat model of "
    f"transformers (a hub id, a folder or an s3:// folder); {MPLUG}, DPG-Bench's official judge"
)
LIKELY = 0.5  # a probability of yes above this is a yes
IMAGES_AT_ONCE = 16  # read by the model that made them


class SelfJudge(Judge):
    """The model that made the pictures, unaccelerated: "yes" where that is likelier than "no". All of a picture is
    shown."""

    at_once = 128

    def __init__(self, model: ModelSection, run: Storage, s3: S3Options, device: str | None):
        loaded = load(model, FlashUSection(), None, run, s3, device)
        self.pipe, self.identity = loaded.pipe, f"{SELF}: {loaded.identity}"

    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        pairs = zip(pictures, questions, strict=True)
        grouped = [list(group) for _, group in groupby(pairs, key=lambda pair: id(pair[0]))]  # a picture is read once
        each = [group[0][0] for group in grouped]
        asked = [[question for _, question in group] for group in grouped]
        probabilities = self.pipe.yes_probability(each, asked, fit="letterbox", batch_size=IMAGES_AT_ONCE)
        return ["yes" if likely > LIKELY else "no" for of_picture in probabilities for likely in of_picture]


class MplugJudge(Judge):
    """mPLUG-large, loaded and asked as DPG-Bench's official script does it, one question at a time.

    The official weights could not be fetched where this was written: it has run on random ones of their layout only.
    modelscope gets them from its own hub and reads them its own way, as a pickle and YAML that may run code they hold.
    """

    at_once = 16

    def __init__(self, device: str | None):
        try:
            from modelscope.pipelines import pipeline
            from modelscope.utils.constant import Tasks

            self.pipeline = pipeline(
                Tasks.visual_question_answering, model=MPLUG_CHECKPOINT, device=str(resolve_device(device))
            )
        except Exception as error:  # whatever modelscope can raise: its hub, its imports, its checkpoint
            raise unusable(MPLUG, MPLUG, error) from None
        self.identity = f"{MPLUG}: {fingerprint(self.pipeline.model)[:16]}"

    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        pairs = zip(pictures, questions, strict=True)
        return [self.pipeline({"image": picture, "question": question})["text"] for picture, question in pairs]


def check_judge_name(name: str, s3: S3Options | None = None, on_cluster: bool = False) -> None:
    """Raises `InputError`, `StorageError` for a judge that cannot be had, as far as can be told without loading it.

    Without `s3`, what is in S3 is not looked at. On a cluster, the nodes may have a folder that is not here.
    """
    if name == SELF:
        return
    if name == MPLUG:
        if find_spec("modelscope") is None:
            raise InputError(f"{MPLUG} needs modelscope: pip install 'flashu[mplug]', here and on every node")
        return
    path = name.removeprefix(HF)
    if path == name or not path:
        kind = name.partition("://")[0]  # without the rest of a URL, which may hold a password
        raise InputError(f"there is no judge {kind!r}; there are: {FORMS}")
    if "://" in path:
        if not path.startswith("s3://"):
            raise InputError(f"a judge cannot be read from {path.partition('://')[0]}://; there are: {FORMS}")
        folder = open_storage(path, s3)
        if s3 is not None and not folder.exists("config.json"):
            raise InputError(f"{name} is no checkpoint: there is no {folder.url}/config.json")
    elif local(path) is not None:
        if not (local(path) / "config.json").is_file():
            raise InputError(f"{name} is no checkpoint of a model: it has no config.json")
    elif on_cluster and os.path.isabs(path):
        pass
    elif not HUB_ID.fullmatch(path) or path.startswith("."):
        raise InputError(f"{name}: there is no such folder, and a hub id is written OWNER/NAME")


def check_judge_checkpoint(name: str, model: ModelSection, config: RunConfig) -> list[str]:
    """As `check_judge_name`, with a look at the hub too; `model` is that of the pictures. Returns warnings."""
    if name == SELF:
        return check_model(model, config)
    return [] if name == MPLUG else check_transformers(name, name.removeprefix(HF), config)


def absolute_name(name: str) -> str:
    """The name as workers understand it, which run in another folder: one name for a model, however it was given."""
    path = name.removeprefix(HF)
    return name if path == name else HF + absolute(path)


def scores_folder(name: str) -> str:
    """Where a run keeps the answers of a judge, by its absolute name: another folder for another name."""
    if re.fullmatch("[a-z]+", name):
        return f"scores/{name}/"
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(name.rstrip("/").removeprefix(HF).split("/")[-2:]))
    return f"scores/hf-{readable[-60:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}/"


def open_judge(name: str, model: ModelSection, run: Storage, s3: S3Options, device: str | None) -> Judge:
    """Load the judge of that name. `model` is the run's own. Raises `InputError`, `StorageError`."""
    if name == SELF:
        return SelfJudge(model, run, s3, device)
    if name == MPLUG:
        return MplugJudge(device)
    return open_hf(name, local_copy(name.removeprefix(HF), s3, model.cache_dir), resolve_device(device))
