"""What the steps of a generation take from its text, and no step changes: keys and values, rotations, masks.

`Showo2.lay_out_text` makes a `TextLayout`, and `Showo2.read_text` of that a `Prefix`. What they hold is laid out here;
nothing here runs a network.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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


@dataclass(frozen=True)
class TextLayout:
    """A batch's rows of text on the device, and the place of what follows them, which is one whatever part of the
    network reads them: laid out once a batch."""

    lengths: Sequence[int]  # of the rows, without padding
    grid: tuple[int, int]  # token grid of the image, (height, width)
    ids: Tensor  # (rows that differ, padded length)
    valid: Tensor  # (rows that differ, padded length): false on padding
    alike: Tensor | None  # (rows,): the row of `ids` that each is; None where all differ
    llm_rotary: Rotary  # of the text
    head_rotary: Rotary
    span_llm_rotary: Rotary
    span_head_rotary: Rotary
    halves: tuple[int, int] | None  # where a guided batch's halves are cut, if they are
    mask: Tensor | None  # of the span, see `Prefix`
    semantic_positions: Tensor
    suffix: SuffixLayout | None  # where whole rows may be measured


@dataclass(frozen=True)
class SuffixLayout:
    """The positions after the span, which no velocity depends on and a measuring step runs beside it.

    Suffixes complete their rows to one common length; shorter ones are padded.
    """

    embeds: Tensor  # (rows, suffix, llm hidden)
    prefix_mask: Tensor | None  # (rows, 1, 1, prefix + span)
    rotary: Rotary  # of span and suffix together
    mask: Tensor  # (rows, 1, suffix, prefix + span + suffix): what the suffix sees
    valid: Tensor  # (rows, span + suffix): false on padding
    row_length: int


@dataclass(frozen=True)
class Suffix(SuffixLayout):
    """With what was made of the text before."""

    llm: list[KeyValue]  # of the prefix, for all rows alike
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


def padded_rows(rows: Iterable[Sequence[int]], length: int) -> list[list[int]]:
    """Token ids, each row filled up to one length; what pads it is run, and never seen."""
    return [[*row, *[0] * (length - len(row))] for row in rows]


def prefix_mask(lengths: Sequence[int], valid: Tensor, span: int, always: bool = False) -> Tensor | None:
    """What a span sees, (rows, 1, 1, prefix + span): itself, and its prefix but for padding, where `valid` is false.

    In memory of its own, as a view would be compiled apart. None, where prefixes of these `lengths` are of one, and so
    have no padding, unless they have it `always`.
    """
    if len(set(lengths)) == 1 and not always:
        return None
    return torch.cat((valid[:, None, None], valid.new_ones(len(valid), 1, 1, span)), dim=3)


def halves_of(lengths: Sequence[int], padded: int, always: bool = False) -> tuple[int, int] | None:
    """Where to cut the prefixes of the two halves of guided rows, so that the second needs no mask: where it ends, of
    rows padded to one length, as they are where lengths differ, or `always`. None where it would have none, or needs
    one."""
    half = len(lengths) // 2
    if (len(set(lengths)) == 1 and not always) or len(set(lengths[half:])) > 1:
        return None
    return padded if always or len(set(lengths[:half])) > 1 else lengths[0], lengths[half]


def _first(states: KeyValue | Halves, rows: slice) -> KeyValue:
    """Those of the first half of the rows, which are `rows`."""
    return states.first if isinstance(states, Halves) else states.select(rows)


class KeptStates(NamedTuple):
    """What is kept of the keys and values of a text."""

    halves: tuple[int, int] | None  # see `TextLayout`
    copied: bool  # into memory of its own, whatever made it: other layouts would be compiled apart
    whole: bool  # also as it is, for measuring whole rows
    made_by: Hashable  # tells apart what is kept at one time

    def of(self, states: KeyValue, alike: Tensor | None) -> tuple[KeyValue | Halves, KeyValue | None]:
        """What spans see of `states`, and the whole where it is wanted.

        `alike` (rows,) is which of their rows each row is; None where they are the rows.
        """
        rows = states if alike is None else states.select(alike)
        seen: KeyValue | Halves = rows
        if self.halves:
            parts = zip(rows.halves(), self.halves, strict=True)
            seen = Halves(*(half.copied_upto(end) for half, end in parts))
        elif self.copied:
            seen = rows.copied_upto(rows.key.shape[2])
        return seen, rows if self.whole else None


def suffix_mask(prefix: Tensor, span: int, suffix: int) -> Tensor:
    """What the positions after the span see, (rows, 1, suffix, prefix + span + suffix): all before, and themselves.

    `prefix` (rows, prefix) is false on padding.
    """
    rows = len(prefix)
    before = torch.cat((prefix, prefix.new_ones(rows, span)), dim=1)[:, None, None].expand(-1, -1, suffix, -1)
    causal = torch.ones(suffix, suffix, dtype=torch.bool, device=prefix.device).tril().expand(rows, 1, -1, -1)
    return torch.cat((before, causal), dim=3)
