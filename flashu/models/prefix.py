"""What the steps of a generation take from its text, and no step changes: keys and values, rotations, masks.

`Showo2.encode_prefix` makes a `Prefix`. What it holds is laid out here; nothing here runs a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashu.models.attention import Halves, KeyValue
from flashu.models.layers import Rotary
from flashu.models.qwen2 import Subnetwork


@dataclass
class Prefix:
    """Everything about a batch of rows that the steps need and do not change.

    Rows come in CFG order: all conditional rows, then (with guidance) all unconditional ones, images in one order.
    """

    rows: int
    grid: tuple[int, int]  # token grid of the image, (height, width)
    subnetwork: Subnetwork  # of the LLM that made it and goes on from it
    llm: Sequence[KeyValue | Halves | None]
    head: Sequence[KeyValue | Halves]
    llm_rotary: Rotary  # of the span's positions, which start where each row's text ends
    head_rotary: Rotary
    mask: Tensor | None  # (rows, or half of them, 1, 1, prefix + span); None when their prefixes are of one length
    semantic_positions: Tensor  # (tokens, vision hidden): SigLIP's position embedding, resized to the grid
    suffix: Suffix | None = None  # where whole rows are to be measured

    def conditional(self, subnetwork: Subnetwork) -> Prefix:
        """Of the first half of rows in CFG order, as views. `subnetwork` is this one's, as those rows run it."""
        rows = self.rows // 2
        some = slice(rows)
        ran_by = [subnetwork.rows_through(layer) for layer in range(len(self.llm))]
        return replace(
            self,
            rows=rows,
            subnetwork=subnetwork,
            llm=[
                own and _first(own, some if ran is None else slice(len(ran)))
                for own, ran in zip(self.llm, ran_by, strict=True)
            ],
            head=[_first(own, some) for own in self.head],
            llm_rotary=self.llm_rotary.select(some),
            head_rotary=self.head_rotary.select(some),
            mask=None if self.mask is None else self.mask[some],  # beside halves it is the first one's already
            suffix=self.suffix and self.suffix.select(some),
        )


@dataclass
class TextLayout:
    """Rows of text, padded to one length."""

    lengths: Sequence[int]  # without padding
    starts: Tensor  # (rows, 1): the position at which each row's span begins, which is its length
    valid: Tensor  # (rows, prefix): false on padding


@dataclass
class Suffix:
    """What a measuring step runs beside the span: the positions after it, which no velocity depends on.

    Suffixes complete their rows to one common length; shorter ones are padded.
    """

    embeds: Tensor  # (rows, suffix, llm hidden)
    llm: list[KeyValue]  # of the prefix, for all rows alike
    prefix_mask: Tensor | None  # (rows, 1, 1, prefix + span)
    rotary: Rotary  # of span and suffix together
    mask: Tensor  # (rows, 1, suffix, prefix + span + suffix): what the suffix sees
    valid: Tensor  # (rows, span + suffix): false on padding
    row_length: int
    prefix_similarity: Tensor  # (rows, layers): summed over the prefix, which no step changes

    def select(self, some: slice) -> Suffix:
        """Of some rows only, as views."""
        return replace(
            self,
            embeds=self.embeds[some],
            llm=[own.select(some) for own in self.llm],
            prefix_mask=None if self.prefix_mask is None else self.prefix_mask[some],
            rotary=self.rotary.select(some),
            mask=self.mask[some],
            valid=self.valid[some],
            prefix_similarity=self.prefix_similarity[some],
        )


def prefix_mask(lengths: Sequence[int], valid: Tensor, span: int) -> Tensor | None:
    """What a span sees, (rows, 1, 1, prefix + span): itself, and its prefix but for padding, where `valid` is false.

    In memory of its own, as a view would be compiled apart. None, where prefixes of these `lengths` have no padding.
    """
    if len(set(lengths)) == 1:
        return None
    return torch.cat((valid[:, None, None], valid.new_ones(len(valid), 1, 1, span)), dim=3)


def _first(states: KeyValue | Halves, rows: slice) -> KeyValue:
    """Those of the first half of the rows, which are `rows`."""
    return states.first if isinstance(states, Halves) else states.select(rows)


def cut_halves(states: KeyValue, end: int, second_end: int) -> Halves:
    """Those of the two halves of the rows, up to the end of each one's longest prefix."""
    first, second = states.halves()
    return Halves(first.copied_upto(end), second.copied_upto(second_end))


def suffix_mask(prefix: Tensor, span: int, suffix: int) -> Tensor:
    """What the positions after the span see, (rows, 1, suffix, prefix + span + suffix): all before, and themselves.

    `prefix` (rows, prefix) is false on padding.
    """
    rows = len(prefix)
    before = torch.cat((prefix, prefix.new_ones(rows, span)), dim=1)[:, None, None].expand(-1, -1, suffix, -1)
    causal = torch.ones(suffix, suffix, dtype=torch.bool, device=prefix.device).tril().expand(rows, 1, -1, -1)
    return torch.cat((before, causal), dim=3)
