"""What the ways of making images share that `gpu.py` compares: one model's weights, prompts, and settings."""

from __future__ import annotations

import random
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from random_weights import random_model
from release_vae import ReleaseVae
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from flashu.acceleration.wanda import WandaScores
from flashu.config import FlashUConfig
from flashu.models import PromptTokenizer, Showo2Qwen2_5, WanImageVAE
from flashu.models.geometry import PIXELS_PER_TOKEN, Showo2Config, VaeGeometry
from flashu.tokenizer import BOI, BOS, EOI, EOS, IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from release_shaped import ReleaseShaped

PROMPT_TOKENS = (60, 110)  # how long DPG-Bench's are, mostly
NATURAL_PROMPTS = 50
WORDS = 400


class Bench:
    """What all ways share: one model's weights, prompts, and the settings under which images are made."""

    def __init__(
        self,
        config: Showo2Config,
        vae_geometry: VaeGeometry,
        grid: tuple[int, int],
        settings: FlashUConfig,
        device: torch.device,
        dtype: torch.dtype,
        natural_prompts: int = NATURAL_PROMPTS,
    ):
        self.config, self.vae_geometry, self.grid, self.settings = config, vae_geometry, grid, settings
        self.device, self.dtype, self._natural_prompts = device, dtype, natural_prompts
        self.model = random_model(Showo2Qwen2_5, config, 0, dtype, device, draw_on_device=True)
        self.vae = random_model(WanImageVAE, vae_geometry, 1, dtype, device, draw_on_device=True).to("cpu")
        self.tokenizer = word_tokenizer(min(WORDS, config.llm_vocab_size // 2))
        self.scores: WandaScores | None = None  # set once they are measured

    @cached_property
    def release(self) -> ReleaseShaped:
        from release_shaped import ReleaseShaped  # here, as transformers takes seconds to import

        return ReleaseShaped.sharing(self.model)

    @cached_property
    def release_vae(self) -> ReleaseVae:
        """It makes the images that `vae` makes; like that one, it is on the CPU until a way uses it."""
        vae = random_model(ReleaseVae, self.vae_geometry, 2)
        vae.take_weights(self.vae)
        vae.autocast = self.dtype if self.dtype is torch.bfloat16 else None
        return vae

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.grid[0] * PIXELS_PER_TOKEN, self.grid[1] * PIXELS_PER_TOKEN

    def prompt_lengths(self, count: int) -> list[int]:
        """Tokens of each prompt's text."""
        longest = self.config.max_text_tokens(self.grid[0] * self.grid[1])
        rng = random.Random(0)
        return [min(rng.randint(*PROMPT_TOKENS), longest) for _ in range(count)]

    def prompts(self, count: int) -> list[str]:
        """The first `count` of one sequence of prompts, of natural lengths, in words without meaning."""
        return self._texts(self.prompt_lengths(count), seed=1)

    def natural_prompts(self) -> list[str]:
        """Prompts of which no two are of one length, as far as the model's longest allows, in no order."""
        longest = min(PROMPT_TOKENS[1], self.config.max_text_tokens(self.grid[0] * self.grid[1]))
        lengths = [max(1, longest - shorter) for shorter in range(self._natural_prompts)]
        random.Random(2).shuffle(lengths)
        return self._texts(lengths, seed=3)

    def _texts(self, lengths: list[int], seed: int) -> list[str]:
        rng, words = random.Random(seed), [word for word in self.tokenizer.tokenizer.get_vocab() if word[0] == "w"]
        return [" ".join(rng.choices(sorted(words), k=length)) for length in lengths]


def word_tokenizer(words: int) -> PromptTokenizer:
    """A tokenizer of so many words, of one token each, that needs no files."""
    names = [BOS, EOS, BOI, EOI, IMAGE_PLACEHOLDER, *(f"w{number}" for number in range(words))]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token=EOS))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PromptTokenizer(tokenizer)
