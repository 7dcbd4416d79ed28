"""Questions about images, answered unaccelerated and with FlashU, here: seconds, operations, and what is right.

    OUT/understanding.json    settings, both arms' figures, and every answer; written when an arm is done
    OUT/pictures/             of the built-in model, where no questions were given

The same command goes on with the arm that is left.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from flashu import arguments
from flashu.checkpoints.files import EMBEDDED
from flashu.config import FLASHU_PRESETS, FlashUConfig
from flashu.errors import InputError
from jobs.scoring import questions as dpg
from jobs.settings.config import BASELINE, FLASHU
from manifests.sources import json_lines

if TYPE_CHECKING:
    from flashu.pipeline import TextToImagePipeline

RESULT, PICTURES = "understanding.json", "pictures"
FORM = '{"image": FILE, "question": TEXT}, with an "answer": TEXT where it is known'

# OmegaConf reads these annotations at run time, where Python 3.10 knows `X | None` but not every OmegaConf does.
# ruff: noqa: UP045


@dataclass
class AnsweredBySection:
    path: str = EMBEDDED  # a folder, a hub id, or the built-in model
    variant: Optional[str] = None  # of the weights, as in pytorch_model.bf16.bin
    vae: Optional[str] = None  # a file, folder or hub id; null looks beside the model, then on the hub
    tokenizer: Optional[str] = None  # a folder or hub id; null looks beside the model, then on the hub
    dtype: Optional[str] = None  # bfloat16 on CUDA, else float32
    device: Optional[str] = None  # cuda, cuda:1, cpu, …; null is CUDA if there is one


@dataclass
class AnsweringSection:
    max_new_tokens: int = 300  # where an answer is cut
    letterbox: bool = False  # show all of an image, on grey, instead of cutting its sides off
    images_at_once: int = 8  # images read together


@dataclass
class UnderstandingFlashUSection:
    und_r_p: float = 0.2  # share of each FFN's neurons left out
    und_r_LS: float = 0.1  # share of layers left out, always the same ones  # noqa: N815 - the paper's name
    und_r_tok: float = 0.25  # share of an image's tokens dropped
    und_tok_layer: int = 5  # the layer, from 0, after which they are dropped
    scores: Optional[str] = None  # a file of `flashu calibrate --task understanding`; null measures them first


@dataclass
class UnderstandingConfig:
    """What answers, how, and what."""

    model: AnsweredBySection = field(default_factory=AnsweredBySection)
    flashu: UnderstandingFlashUSection = field(default_factory=UnderstandingFlashUSection)
    answering: AnsweringSection = field(default_factory=AnsweringSection)
    questions: str = ""  # a file of JSON lines: an image, a question and, where it is known, the answer
    output: str = ""  # a folder on this machine


@dataclass
class Question:
    """A question about an image, and the answer, if it is known."""

    image: str
    text: str
    answer: str | None


def run_understanding(config: UnderstandingConfig, announce: Callable[[], object]) -> dict[str, Any]:
    """Answer what is left, write each arm when it is done, and return the result.

    `announce` is called once everything was found good. Raises `InputError` for what a user can mend, before a question
    is answered.
    """
    settings = _check(config)
    file = Path(config.output).expanduser() / RESULT
    result = _earlier(file, config)
    questions = read_questions(Path(config.questions).expanduser()) if config.questions else None
    left = [arm for arm in (BASELINE, FLASHU) if arm not in result["arms"]]
    if not left:
        announce()
        return result
    from flashu.acceleration.applied import unpatched
    from flashu.acceleration.wanda import WandaScores
    from flashu.patch import apply_flashu_patch
    from flashu.pipeline import TextToImagePipeline

    scores, options = WandaScores.load(config.flashu.scores) if config.flashu.scores else None, asdict(config.model)
    pipe = TextToImagePipeline.from_pretrained(options.pop("path"), **options)
    apply_flashu_patch(pipe.model, settings, understanding_scores=scores, tokenizer=pipe.tokenizer)
    announce()
    _write(file, result)  # which is known to be possible, then
    with unpatched(pipe.model):
        questions = _by_image(questions or _own_questions(pipe, file.parent / PICTURES))
    for arm in left:
        with unpatched(pipe.model) if arm == BASELINE else nullcontext():
            figures, answers = _answer(pipe, config.answering, questions)
        rows = result["answers"] or [
            {"image": question.image, "question": question.text, "answer": question.answer}
            for of_image in questions
            for question in of_image
        ]
        result["answers"] = [row | {arm: answer} for row, answer in zip(rows, answers, strict=True)]
        result["arms"][arm] = figures | {"right": _right(result["answers"], arm)}
        _write(file, result)
    return result


def _check(config: UnderstandingConfig) -> FlashUConfig:
    """FlashU's settings. Raises `InputError` for settings that cannot be used."""
    for name in ("questions", "output"):
        if "://" in getattr(config, name):
            raise InputError(
                f"{name} is {getattr(config, name)}; questions are answered on this machine: name a path here"
            )
    if not config.output:
        raise InputError("output is not set; give a folder with -o")
    if not config.questions and config.model.path != EMBEDDED:
        raise InputError(f"questions is not set; give a file of JSON lines {FORM}")
    arguments.whole("answering.images_at_once", config.answering.images_at_once, least=1)
    arguments.whole("answering.max_new_tokens", config.answering.max_new_tokens, least=1)
    given = asdict(config.flashu)
    del given["scores"]
    return replace(FLASHU_PRESETS["off"], **given)


def _earlier(file: Path, config: UnderstandingConfig) -> dict[str, Any]:
    """What is answered already. Raises `InputError` where that was with other settings, or is something else."""
    if not file.exists():
        return {"version": 1, "config": asdict(config), "arms": {}, "answers": []}
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        same = earlier["config"] == asdict(config) and isinstance(earlier["arms"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise InputError(f"{file} holds answers that were given with other settings; name another folder, or remove it")
    return earlier


def _write(file: Path, result: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None


def read_questions(file: Path) -> list[Question]:
    """Questions from JSON lines; images are named relative to the file.

    Raises `InputError`, `ManifestError`, naming the line.
    """
    questions = []
    try:
        with file.open("rb") as stream:
            for number, row in json_lines(stream, str(file)):
                questions.append(_question(row, file.parent, f"{file}:{number}"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    if not questions:
        raise InputError(f"{file} holds no questions; a line each is {FORM}")
    return questions


def _question(row: Any, folder: Path, where: str) -> Question:
    values = [row.get(name) for name in ("image", "question", "answer")] if isinstance(row, dict) else [None]
    if not all(isinstance(value, str) and value.strip() for value in values if value is not None) or None in values[:2]:
        raise InputError(f"{where}: needs {FORM}, none of them empty")
    image, text, answer = values
    if not (folder / image).is_file():
        raise InputError(f"{where}: there is no image {folder / image}")
    return Question(str(folder / image), text, answer)


def _own_questions(pipe: TextToImagePipeline, folder: Path) -> list[Question]:
    """DPG-Bench's demo: the model's own pictures of its prompts, and its questions, to which yes is right."""
    items = dpg.read_questions(dpg.DEMO_QUESTIONS.read_text(encoding="utf-8"), str(dpg.DEMO_QUESTIONS))
    pictures = pipe([item.prompt for item in items.values()], seeds=0)
    folder.mkdir(exist_ok=True)
    questions = []
    for number, (item, picture) in enumerate(zip(items.values(), pictures, strict=True)):
        file = folder / f"{number}.png"
        picture.save(file)
        questions += [Question(str(file), asked.text, "yes") for asked in item.questions]
    return questions


def _by_image(questions: Sequence[Question]) -> list[list[Question]]:
    """The questions about each image together, images in the order in which they are first asked about."""
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.image, []).append(question)
    return list(found.values())


def _answer(
    pipe: TextToImagePipeline, section: AnsweringSection, questions: Sequence[Sequence[Question]]
) -> tuple[dict[str, Any], list[str]]:
    """An arm's figures, and its answers in the order of the questions."""
    batches = [
        questions[start : start + section.images_at_once] for start in range(0, len(questions), section.images_at_once)
    ]

    def answers(batches: Sequence[Sequence[Sequence[Question]]]) -> Iterator[str]:
        for batch in batches:
            pictures = [of_image[0].image for of_image in batch]
            texts = [[question.text for question in of_image] for of_image in batch]
            fit = "letterbox" if section.letterbox else "crop"
            for of_image in pipe.answer(
                pictures, texts, max_new_tokens=section.max_new_tokens, fit=fit, batch_size=len(batch)
            ):
                yield from of_image

    list(answers(batches[:1]))  # warms up
    start = time.perf_counter()
    said = list(answers(batches))
    seconds = time.perf_counter() - start
    settings = pipe.model.acceleration
    return {
        "settings": settings.config.describe() if settings else "unaccelerated",
        "device": str(pipe.model.device),
        "dtype": pipe.model.number_format,
        "seconds_per_answer": seconds / len(said),
        **_costs(pipe, [question for of_image in questions for question in of_image], said, len(questions)),
    }, said


def _costs(
    pipe: TextToImagePipeline, questions: Sequence[Question], said: Sequence[str], images: int
) -> dict[str, float]:
    """Tokens of an answer, and the operations that one of them takes whose question and answer are as long as these are
    on average."""
    from flashu.flops import count_answer

    tokens = sum(len(pipe.tokenizer.tokenizer.encode(text, add_special_tokens=False).ids) + 1 for text in said)
    asked = [pipe.tokenizer.encode_question(question.text) for question in questions]
    network, each = pipe.model, max(round(len(said) / images), 1)
    flop = count_answer(
        network.config,
        network.acceleration,
        network.config.native_grid,
        questions=each,
        question_tokens=round(sum(len(question.after) - 1 for question in asked) / len(asked)),
        answer_tokens=max(round(tokens / len(said)), 1),
        frame_tokens=len(asked[0].before),
    )
    return {"tokens_per_answer": tokens / len(said), "tflop_per_answer": sum(flop.values()) / each / 1e12}


def _right(answers: Sequence[dict[str, Any]], arm: str) -> float | None:
    """The share of the known answers that an arm gave. None where none is known."""
    known = [answer for answer in answers if answer["answer"] is not None]
    return sum(_agree(answer[arm], answer["answer"]) for answer in known) / len(known) if known else None


def _agree(said: str, expected: str) -> bool:
    """Whether an answer is the expected one: the same words, or where that is yes or no, the same by its first word."""
    said, expected = (re.findall(r"\w+", text.casefold()) for text in (said, expected))
    return said[:1] == expected if expected in (["yes"], ["no"]) else said == expected
