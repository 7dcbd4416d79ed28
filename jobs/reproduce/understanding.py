"""Questions about images, answered unaccelerated and with FlashU, here: seconds, operations, and what is right.

OUT/understanding.json    settings, both arms' figures, and every answer
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from flashu.config import FLASHU_PRESETS, FlashUConfig
from flashu.errors import InputError
from jobs.reproduce.published import BASELINE, FLASHU

if TYPE_CHECKING:
    from flashu.pipeline import TextToImagePipeline

RESULT = "understanding.json"
FORM = '{"image": FILE, "question": TEXT}, with an "answer": TEXT where it is known'

# OmegaConf reads these annotations at run time, where Python 3.10 knows `X | None` but not every OmegaConf does.
# ruff: noqa: UP045


@dataclass
class AnsweredBySection:
    path: str = "embedded"  # folder, hub id, or "embedded", the built-in model
    variant: Optional[str] = None  # of the weights, as in pytorch_model.bf16.bin
    vae: Optional[str] = None  # beside the model, else the hub
    tokenizer: Optional[str] = None  # beside the model, else the hub
    dtype: Optional[str] = None  # bfloat16 on CUDA, else float32
    device: Optional[str] = None  # CUDA if there is one


@dataclass
class AnsweringSection:
    max_new_tokens: int = 300  # where an answer is cut
    letterbox: bool = False  # show all of an image, on grey, instead of cutting its sides off
    images_at_once: int = 8


@dataclass
class UnderstandingFlashUSection:
    und_r_p: float = 0.2
    und_r_LS: float = 0.1  # noqa: N815 - the paper's name
    und_r_tok: float = 0.25
    und_tok_layer: int = 5
    scores: Optional[str] = None  # of `flashu calibrate --task understanding`; null measures them first


@dataclass
class UnderstandingConfig:
    """What answers, how, and what."""

    model: AnsweredBySection = field(default_factory=AnsweredBySection)
    flashu: UnderstandingFlashUSection = field(default_factory=UnderstandingFlashUSection)
    answering: AnsweringSection = field(default_factory=AnsweringSection)
    questions: str = ""  # JSON lines
    output: str = ""  # a folder here


@dataclass
class Question:
    """A question about an image, and the answer, if it is known."""

    image: str
    text: str
    answer: str | None


def run_understanding(config: UnderstandingConfig, announce: Callable[[], object]) -> dict[str, Any]:
    """Answer both ways, write the result, and return it. `announce` is called once everything was found good.

    Raises `InputError` for what a user can mend; before the model is loaded, but for what only it can tell.
    """
    settings = replace(FLASHU_PRESETS["off"], **{k: v for k, v in asdict(config.flashu).items() if k != "scores"})
    if not config.output:
        raise InputError("output is not set; give a folder with -o")
    result_file = Path(config.output) / RESULT
    if result_file.exists():
        raise InputError(f"{result_file} exists already; name another folder, or remove it first")
    if not config.questions and config.model.path != "embedded":
        raise InputError(f"questions is not set; give a file of JSON lines {FORM}")
    questions = read_questions(Path(config.questions)) if config.questions else None
    from flashu.acceleration.wanda import WandaScores

    scores = WandaScores.load(config.flashu.scores) if config.flashu.scores else None
    pipe, measured = _load(config), {}
    announce()
    with tempfile.TemporaryDirectory() as scratch:
        questions = questions or _own_questions(pipe, Path(scratch))
        pictures, of_picture = _by_picture(questions)
        places = {picture: place for place, picture in enumerate(pictures)}
        questions = sorted(questions, key=lambda question: places[question.image])  # as answers come
        for arm in (BASELINE, FLASHU):
            measured[arm] = _answer(pipe, config, settings if arm == FLASHU else None, scores, pictures, of_picture)
    result = {
        "version": 1,
        "config": asdict(config),
        "device": str(pipe.model.device),
        "dtype": pipe.model.number_format,
        "questions": len(questions),
        "images": len(pictures),
        "arms": {arm: figures for arm, (figures, _) in measured.items()},
        "speed_up": _ratio(measured, "seconds_per_answer"),
        "fewer_operations": _ratio(measured, "tflop_per_answer"),
        "same_answers": sum(map(str.__eq__, *(answers for _, answers in measured.values()))),
        "answers": [
            {"image": question.image, "question": question.text, "answer": question.answer}
            | {arm: answers[index] for arm, (_, answers) in measured.items()}
            for index, question in enumerate(questions)
        ],
    }
    for arm, (figures, _) in measured.items():
        figures["right"] = _right(result["answers"], arm)
    try:
        result_file.parent.mkdir(parents=True, exist_ok=True)
        result_file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{result_file} cannot be written: {error.strerror}") from None
    return result


def read_questions(file: Path) -> list[Question]:
    """Questions from JSON lines; images are named relative to the file. Raises `InputError` naming the line."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, text, answer = row["image"], row["question"], row.get("answer")
            if not all(isinstance(value, str) and value.strip() for value in (image, text, answer or "none")):
                raise ValueError("a text is empty, or is none")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}, line {number}: needs {FORM}: {error!r}") from None
        path = file.expanduser().parent / image
        if not path.is_file():
            raise InputError(f"{file}, line {number}: there is no image {path}")
        questions.append(Question(str(path), text, answer))
    if not questions:
        raise InputError(f"{file} holds no questions; a line each is {FORM}")
    return questions


def _load(config: UnderstandingConfig) -> TextToImagePipeline:
    from flashu.pipeline import TextToImagePipeline

    options = {key: value for key, value in asdict(config.model).items() if key != "path"}
    return TextToImagePipeline.from_pretrained(config.model.path, **options)


def _own_questions(pipe: TextToImagePipeline, folder: Path) -> list[Question]:
    """DPG-Bench's demo: the model's own pictures of its prompts, and its questions, to which yes is right."""
    from jobs.dpg.benchmark import DEMO_QUESTIONS
    from jobs.dpg.questions import read_questions as read_dpg

    items = read_dpg(DEMO_QUESTIONS.read_text(encoding="utf-8"), str(DEMO_QUESTIONS))
    pictures = pipe([item.prompt for item in items.values()], seeds=0)
    questions = []
    for (name, item), picture in zip(items.items(), pictures, strict=True):
        picture.save(folder / f"{name}.png")
        questions += [Question(str(folder / f"{name}.png"), asked.text, "yes") for asked in item.questions]
    return questions


def _by_picture(questions: Sequence[Question]) -> tuple[list[str], list[list[str]]]:
    """The images in the order in which they are first asked about, and the questions about each."""
    found: dict[str, list[str]] = {}
    for question in questions:
        found.setdefault(question.image, []).append(question.text)
    return list(found), list(found.values())


def _answer(
    pipe: TextToImagePipeline,
    config: UnderstandingConfig,
    settings: FlashUConfig | None,
    scores: Any,
    pictures: Sequence[str],
    questions: Sequence[Sequence[str]],
) -> tuple[dict[str, Any], list[str]]:
    """An arm's figures, and its answers in the order of the pictures."""
    from flashu.flops import count_answer
    from flashu.patch import apply_flashu_patch, remove_flashu_patch

    if settings:
        apply_flashu_patch(pipe.model, settings, understanding_scores=scores, tokenizer=pipe.tokenizer)
    options = {
        "max_new_tokens": config.answering.max_new_tokens,
        "fit": "letterbox" if config.answering.letterbox else "crop",
        "batch_size": config.answering.images_at_once,
    }
    pipe.answer(pictures[0], list(questions[0]), **options)  # warms up
    start = time.perf_counter()
    answers = [
        text for of_picture in pipe.answer(list(pictures), list(map(list, questions)), **options) for text in of_picture
    ]
    seconds = time.perf_counter() - start
    count = len(answers)
    tokens = [len(pipe.tokenizer.tokenizer.encode(text, add_special_tokens=False).ids) + 1 for text in answers]
    lengths = {
        "questions": max(round(count / len(pictures)), 1),
        "question_tokens": round(
            sum(len(pipe.tokenizer.encode_question(text).after) - 1 for of in questions for text in of) / count
        ),
        "answer_tokens": max(round(sum(tokens) / count), 1),
        "frame_tokens": len(pipe.tokenizer.encode_question("?").before),
    }
    network = pipe.model
    flop = sum(count_answer(network.config, network.acceleration, network.config.native_grid, **lengths).values())
    remove_flashu_patch(network)
    return {
        "settings": settings.describe() if settings else "unaccelerated",
        "seconds_per_answer": seconds / count,
        "tflop_per_answer": flop / lengths["questions"] / 1e12,
        "tokens_per_answer": sum(tokens) / count,
    }, answers


def _ratio(measured: dict[str, Any], key: str) -> float:
    return measured[BASELINE][0][key] / measured[FLASHU][0][key]


def _right(answers: Sequence[dict[str, Any]], arm: str) -> float | None:
    """The share of the known answers that an arm gave: the same words, or yes or no. None where none is known."""
    known = [answer for answer in answers if answer["answer"] is not None]
    return sum(_agree(answer[arm], answer["answer"]) for answer in known) / len(known) if known else None


def _agree(said: str, expected: str) -> bool:
    from jobs.dpg.vqa import verdict

    if verdict(expected) is not None:
        return verdict(said) == verdict(expected)
    return said.strip(" .").casefold() == expected.strip(" .").casefold()
