"""Make the embedded model's tokenizer: `python -m flashu.embedded.build_tokenizer`.

A byte-level BPE, so that any text can be written, with merges learned from captions of simple scenes, so that such
captions are short. It carries Qwen2.5's framing tokens under their own names and goes through the same code.
"""

from __future__ import annotations

from itertools import product

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from flashu.models.geometry import PRESETS
from flashu.models.tokenizer import (
    ADDED_TOKENS,
    BOI,
    BOS,
    EMBEDDED_FOLDER,
    EOI,
    EOS,
    IMAGE_PLACEHOLDER,
    PromptTokenizer,
)

COUNTS = ("a", "one", "two", "three")
SIZES = ("small", "medium", "large", "big", "tiny")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white", "grey", "pink", "cyan", "brown")
SHAPES = ("circle", "square", "triangle", "star", "ring")
RELATIONS = ("left of", "to the left of", "right of", "to the right of", "above", "below", "next to", "on top of")
FRAMES = (
    "{}",
    "a picture of {}",
    "an image showing {} on a plain background",
    "there is {}",
    "Is there {} in the image? yes no",
    "How many {} are there? none one two three",
    "What colour is {}?",
    "Where is {}? at the top, bottom, left, right, centre of the picture",
)


def captions() -> list[str]:
    things = [
        f"{count} {size} {colour} {shape}{'s' if count in ('two', 'three') else ''}"
        for count, size, colour, shape in product(COUNTS, SIZES, COLOURS, SHAPES)
    ]
    pairs = [f"{a} {RELATIONS[i % len(RELATIONS)]} {b}, and {a}" for i, (a, b) in enumerate(zip(things, things[7:]))]  # noqa: B905
    return [FRAMES[i % len(FRAMES)].format(text) for i, text in enumerate(things + pairs)]


def build() -> PromptTokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    framing = (BOS, EOS, BOI, EOI, IMAGE_PLACEHOLDER)
    trainer = BpeTrainer(
        vocab_size=PRESETS["embedded"].llm_vocab_size - len(framing) - len(ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in framing])
    return PromptTokenizer(tokenizer)


if __name__ == "__main__":
    built = build()
    built.save_pretrained(EMBEDDED_FOLDER)
    print(f"{len(built)} tokens written to {EMBEDDED_FOLDER}")
