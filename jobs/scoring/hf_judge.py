"""Judges in transformers' layout: classifiers (ViLT), readers of a question (BLIP, BLIP-2), chat models that see.

Nothing here runs code that comes with a checkpoint. Answers are greedy, and do not depend on what shares their batch
but by rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image

from flashu.checkpoints.hub import resolve_folder
from flashu.devices import resolve_dtype
from flashu.errors import InputError
from flashu.fingerprint import fingerprint
from jobs.scoring.judges import Judge, unusable

PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "pytorch_model*.bin")
MAX_NEW_TOKENS = 16
INSTRUCTION = "Answer yes or no."
BLIP_2_PROMPT = "Question: {} Answer:"  # which it was trained on
TRIAL = ("Is it red?", "Is there anything blue in this picture?")
SHOWN = 3  # names of weights


class HfJudge(Judge):
    """A loaded model and its processor."""

    at_once = 32

    def __init__(self, model: Any, processor: Any, dtype: torch.dtype):
        self.model, self.processor, self.dtype = model, processor, dtype
        weights = fingerprint(model)[:16]
        self.identity = f"{type(model).__name__} {weights}, {str(dtype).removeprefix('torch.')}"

    @torch.inference_mode()
    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        return self._answer([picture.convert("RGB") for picture in pictures], list(questions))

    @abstractmethod
    def _answer(self, pictures: list[Image.Image], questions: list[str]) -> list[str]:
        """The answers to questions about RGB pictures."""

    def _inputs(self, **inputs: Any) -> Any:
        return self.processor(**inputs, return_tensors="pt").to(self.model.device, dtype=self.dtype)

    def _generate(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)

    def _decode(self, tokens: torch.Tensor) -> list[str]:
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]


class Classifier(HfJudge):
    """Chooses one of its labels, as ViLT does. Reads as much of a question as it has room for."""

    def _answer(self, pictures: list[Image.Image], questions: list[str]) -> list[str]:
        fitting = {"padding": True, "truncation": True, "max_length": self.model.config.max_position_embeddings}
        logits = self.model(**self._inputs(images=pictures, text=questions, **fitting)).logits
        return [self.model.config.id2label[label] for label in logits.argmax(dim=-1).tolist()]


class QuestionReader(HfJudge):
    """Writes an answer to a bare question, as BLIP and BLIP-2 do."""

    def _answer(self, pictures: list[Image.Image], questions: list[str]) -> list[str]:
        if self.model.config.model_type == "blip-2":
            questions = [BLIP_2_PROMPT.format(question) for question in questions]
        lengths: dict[int, list[int]] = defaultdict(list)
        for place, tokens in enumerate(self.processor.tokenizer(questions)["input_ids"]):
            lengths[len(tokens)].append(place)
        answers = [""] * len(questions)
        for places in lengths.values():  # these models let padding be seen, so none is used
            inputs = self._inputs(images=[pictures[at] for at in places], text=[questions[at] for at in places])
            tokens = self._generate(inputs)
            if getattr(self.model.config, "use_decoder_only_language_model", False):
                tokens = tokens[:, inputs["input_ids"].shape[1] :]  # it goes on where the question ends
            for place, text in zip(places, self._decode(tokens), strict=True):
                answers[place] = text
        return answers


class ChatModel(HfJudge):
    """Answers a user's message of a picture, the question and `INSTRUCTION`, by its own chat template."""

    def __init__(self, model: Any, processor: Any, dtype: torch.dtype):
        super().__init__(model, processor, dtype)
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # an answer goes on from the last token
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        # A model that may think aloud first would have no tokens left to answer in.
        self.options = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}

    def _answer(self, pictures: list[Image.Image], questions: list[str]) -> list[str]:
        texts = [{"type": "text", "text": f"{question} {INSTRUCTION}"} for question in questions]
        messages = [[{"role": "user", "content": [{"type": "image"}, text]}] for text in texts]
        template = self.processor.apply_chat_template
        prompts = template(messages, add_generation_prompt=True, tokenize=False, **self.options)
        begin = self.processor.tokenizer.bos_token
        once = {"add_special_tokens": False} if begin and prompts[0].startswith(begin) else {}
        inputs = self._inputs(images=[[picture] for picture in pictures], text=prompts, padding=True, **once)
        return self._decode(self._generate(inputs)[:, inputs["input_ids"].shape[1] :])


def open_hf(name: str, path: str, device: torch.device) -> HfJudge:
    """Load the model of a folder or a hub id, in bfloat16 on CUDA and in float32 elsewhere, and ask it something.

    `name` is for errors. Raises `InputError` for a checkpoint that is not there, is damaged, needs a package or its own
    code, or is of a model that does not answer questions about pictures.
    """
    try:
        judge = _load(name, resolve_folder(path, PATTERNS), device)
        judge.answer([Image.new("RGB", (width, 64), "red") for width in (64, 96)], TRIAL)
    except UnpicklingError:
        raise InputError(f"{name}: its weights hold code, which is not run; only tensors are read") from None
    except Exception as error:  # whatever transformers can raise over a checkpoint
        raise unusable(name, "vqa", error) from None
    return judge


def _load(name: str, folder: Path, device: torch.device) -> HfJudge:
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # elsewhere it wants torchvision

    # It warns of what is as it should be, and each worker draws progress bars.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    safely = {"trust_remote_code": False, "local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(folder, **safely)
    if type(config) in transformers.MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING:
        auto = transformers.AutoModelForVisualQuestionAnswering
    elif type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto = transformers.AutoModelForImageTextToText
    else:
        raise InputError(
            f"{name} is a model of the kind {config.model_type!r}, which answers no questions about pictures; ViLT, "
            "BLIP and chat models such as Qwen2.5-VL do"
        )
    dtype = resolve_dtype(None, device)
    # It prefers safetensors, and reads other weights without running code (weights_only).
    model, loading = auto.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **safely
    )
    random = sorted(loading["missing_keys"]) + sorted(key for key, *_ in loading["mismatched_keys"])
    if random:
        raise InputError(
            f"{name} is no checkpoint of {type(model).__name__}: {len(random)} of its weights are missing, or of "
            f"another size ({', '.join(random[:SHOWN])}{', …' if len(random) > SHOWN else ''})"
        )
    processor = transformers.AutoProcessor.from_pretrained(folder, **safely)
    # The one that needs no torchvision, so that nodes with and without it answer alike.
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **safely)
    tokens = processor.tokenizer(TRIAL[0], add_special_tokens=False)["input_ids"]
    if set(tokens) <= {processor.tokenizer.unk_token_id}:  # transformers makes an empty one where files are missing
        raise InputError(f"{name}: its tokenizer knows no words; are all of its files there?")
    model = model.to(device).eval()
    if auto is transformers.AutoModelForVisualQuestionAnswering:
        return (QuestionReader if hasattr(model, "generate") else Classifier)(model, processor, dtype)
    if not getattr(processor, "chat_template", None):
        raise InputError(f"{name} has no chat template, so it cannot be asked")
    return ChatModel(model, processor, dtype)
