"""How well pictures fit their prompts, by networks that see both. Scores of different networks cannot be compared."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from PIL import Image

from flashu.errors import InputError
from flashu.pipeline import TextToImagePipeline

QUESTION = "Does the image show: {}?"


class ClipScorer:
    """CLIPScore (Hessel et al. 2021). `path` is a folder or a hub id, such as openai/clip-vit-large-patch14, of a CLIP
    checkpoint in transformers' layout.

    The score is 100 * max(cosine, 0), as torchmetrics and most papers on image generation report it, so that numbers
    can be set beside theirs. (Hessel et al. scale by 2.5 instead.)
    """

    def __init__(self, path: str, device: str | torch.device = "cpu"):
        try:
            # The processor that needs no torchvision, so that a node with it and one without score alike.
            from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
        except ImportError as error:
            raise InputError(
                "quality.clip needs transformers 5: pip install 'flashu[clip]', or leave out quality.clip "
                f"({str(error).splitlines()[0]})"
            ) from None
        try:
            # transformers prefers safetensors, and reads other weights without running code (weights_only).
            self.model = CLIPModel.from_pretrained(path).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.processor = CLIPImageProcessorPil.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"quality.clip: {path} cannot be read as a CLIP checkpoint: {reason}") from None

    @torch.inference_mode()
    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One score per picture and its prompt. CLIP reads the first 77 tokens of a prompt, about 55 words."""
        if not pictures:
            return []
        device = self.model.device
        length = self.model.config.text_config.max_position_embeddings
        texts = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self.processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")
        output = self.model(**texts.to(device), **pixels.to(device))
        cosine = torch.nn.functional.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())
        return (100 * cosine.clamp(min=0)).tolist()


class VqaScorer:
    """By the model that made the pictures: its probability of yes, asked whether a picture shows its prompt (as
    VQAScore, Lin et al. 2024, asks other models). None is a judge of itself.

    A model that FlashU accelerates answers by its `und_*` settings, which a run leaves off: unaccelerated. Raises
    `InputError` for a model that cannot be asked.
    """

    def __init__(self, pipe: TextToImagePipeline):
        self.pipe = pipe
        height, width = pipe.model.config.native_grid
        self.room = pipe.model.config.max_text_tokens(height * width)
        try:
            self.score([Image.new("RGB", (16, 16))], [""])
        except InputError as error:
            raise InputError(f"quality.vqa: {error}") from None

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The probability for each picture and its prompt, 0 to 1. All of the picture is shown; a prompt that is too
        long for a question is cut."""
        questions = [self.question(prompt) for prompt in prompts]
        return self.pipe.yes_probability(list(pictures), questions, fit="letterbox", batch_size=len(pictures))

    def question(self, prompt: str) -> str:
        """About the prompt, or as much from its beginning as fits beside an image."""
        if self._tokens(prompt) > self.room:
            ends = range(len(prompt))
            prompt = prompt[: bisect_left(ends, self.room + 1, key=lambda end: self._tokens(prompt[:end])) - 1]
        return QUESTION.format(prompt)

    def _tokens(self, prompt: str) -> int:
        return len(self.pipe.tokenizer.encode_question(QUESTION.format(prompt)).after)
