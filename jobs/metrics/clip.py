"""CLIP scores: how well a picture fits its prompt, by a CLIP checkpoint. Scores of different checkpoints differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from flashu.errors import InputError


class ClipScorer:
    """CLIPScore (Hessel et al. 2021). `path` is a folder or a hub id, such as openai/clip-vit-large-patch14, of a CLIP
    checkpoint in transformers' layout.

    The score is 100 * max(cosine, 0), as torchmetrics and most papers on image generation report it, so that numbers
    can be set beside theirs. (Hessel et al. scale by 2.5 instead.)
    """

    def __init__(self, path: str, device: str | torch.device = "cpu"):
        import transformers  # takes seconds

        # The processor that needs no torchvision, so that a node with it and one without score alike. In transformers 4
        # it has the name that in 5 is the other one's.
        processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        try:
            # transformers prefers safetensors, and reads other weights without running code (weights_only).
            self.model = transformers.CLIPModel.from_pretrained(path).to(device).eval()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            self.processor = processor.from_pretrained(path)
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
