"""Qwen2.5's real tokenizer, from the vocabulary that the package `dashscope` ships: tests need no download for it.

The release's `tokenizer.json` is a vocabulary with its merges, a pipeline, and 22 added tokens. The vocabulary is in
`dashscope/resources/qwen.tiktoken`; nothing of the package is imported. The merges follow from the ranks.

    python -m tests.qwen qwen2.5        # writes qwen2.5/tokenizer.json
"""

import base64
import sys
from functools import cache
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path

from tests.fakes import qwen_pipeline

VOCABULARY = "dashscope/resources/qwen.tiktoken"


def write_tokenizer(folder):
    """Write the `tokenizer.json` of Qwen2.5 into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))


def build_tokenizer():
    """A new tokenizer of 151,665 entries: without what Show-o2 adds."""
    return qwen_pipeline(*read_vocabulary())


@cache
def read_vocabulary():
    """The ids of 151,643 pieces, spelt as byte-level BPE spells bytes, and their 151,387 merges in order."""
    lines = distribution("dashscope").locate_file(VOCABULARY).read_bytes().splitlines()
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in (line.split() for line in lines)}
    letters = byte_letters()
    vocabulary = {spell(piece, letters): rank for piece, rank in ranks.items()}
    merges = [
        tuple(spell(half, letters) for half in last_merge(piece, ranks))
        for piece in sorted(ranks, key=ranks.get)
        if len(piece) > 1
    ]
    return vocabulary, merges


def last_merge(piece, ranks):
    """The two parts that `piece` is merged from: those that are left once every merge of a lower rank was made."""
    parts = [piece[index : index + 1] for index in range(len(piece))]
    limit = ranks[piece]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(pairs)
        assert lowest < limit, f"{piece} cannot be merged"
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def byte_letters():
    """The letter that stands for each byte: Latin-1's own where it is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in visible)
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + index) for index, byte in enumerate(hidden)}


def spell(piece, letters):
    return "".join(letters[byte] for byte in piece)


if __name__ == "__main__":
    write_tokenizer(Path(sys.argv[1]))
