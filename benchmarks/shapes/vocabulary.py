"""The embedded model's tokenizer: a byte-level BPE whose merges are learned from the world's captions and questions.

Any text can be written with it, and the world's own words are one token each. It carries Qwen2.5's framing tokens
under their own names and goes through the same code as the released tokenizer.
"""

from __future__ import annotations

import random
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from flashu.tokenizer import (
    ADDED_TOKENS,
    ASSISTANT,
    BOI,
    BOS,
    EOI,
    EOS,
    IMAGE_PLACEHOLDER,
    SYSTEM,
    USER,
    PromptTokenizer,
)

from .captions import DESCRIBE, caption, describe, plain_caption, question
from .scenes import random_scene

SCENES = 4000


@cache
def build_tokenizer(vocab_size: int, seed: int) -> PromptTokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    framing = (BOS, EOS, BOI, EOI, IMAGE_PLACEHOLDER)
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(framing) - len(ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(random.Random(seed)), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in framing])
    return PromptTokenizer(tokenizer, normalized=False)


def _texts(rng: random.Random) -> list[str]:
    texts = []
    for _ in range(SCENES):
        scene = random_scene(rng)
        for _ in range(4):
            texts += [caption(describe(scene, rng), rng), *question(scene, rng)]
        texts += [DESCRIBE, plain_caption(scene)]
        texts += [frame.replace(EOS, "").replace(BOS, "") for frame in (SYSTEM, USER, ASSISTANT)]
    return texts
