"""Attention: what is seen, as keys and values, and the one place that chooses how it is run.

Over a *prefix* it is causal; over the image *span* every position sees the whole prefix and the whole span. A mask says
otherwise, as for questions about an image, which add to a cache. All choices come to the same numbers, to rounding;
which is quickest is for a device and its kernels to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionChoice:
    """How attention is run."""

    # Query heads that share a key-value head are PyTorch's to run (`enable_gqa`). Otherwise they are laid out in a form
    # that every fused kernel takes, with a mask too.
    native_groups: bool = False
    # Up to so many rows both halves of a guided batch are one call under a mask, where they could be two without.
    joint_rows: int = 0


_choice = AttentionChoice()


def choice() -> AttentionChoice:
    """The one that is on, for prefixes and blocks alike."""
    return _choice


@contextmanager
def choosing(other: AttentionChoice) -> Iterator[None]:
    """Attend otherwise for a while, in all threads; prefixes that were made before are not to be used in it.

    Blocks that were compiled before know how they attend: have them compiled anew (`torch.compiler.reset`).
    """
    global _choice
    before, _choice = _choice, other
    try:
        yield
    finally:
        _choice = before


class KeyValue(NamedTuple):
    """Keys (already rotated) and values of some positions, each (rows, kv_heads, positions, head_dim)."""

    key: Tensor
    value: Tensor

    def select(self, index: Tensor | slice) -> KeyValue:
        """Those of some rows only."""
        return KeyValue(self.key[index], self.value[index])

    def halves(self) -> tuple[KeyValue, KeyValue]:
        """Those of the first half of the rows, and those of the second."""
        (key, other_key), (value, other_value) = self.key.chunk(2), self.value.chunk(2)
        return KeyValue(key, value), KeyValue(other_key, other_value)

    def copied_upto(self, length: int) -> KeyValue:
        """Those of the first `length` positions, in memory of their own: views and layouts would be compiled apart."""
        return KeyValue(*(states[:, :, :length].clone(memory_format=torch.contiguous_format) for states in self))

    def followed_by(self, own: KeyValue) -> KeyValue:
        """These positions and, behind them, those of `own`."""
        return KeyValue(torch.cat((self.key, own.key), dim=2), torch.cat((self.value, own.value), dim=2))


class Halves(NamedTuple):
    """Keys and values of rows in CFG order, of which the second half, (rows / 2, …), are all of one length.

    So those need no mask, which fused attention kernels are much faster without.
    """

    first: KeyValue
    second: KeyValue


class KeyValueCache:
    """Keys and values that grow: like a `KeyValue`, but `followed_by` keeps what it is given, in memory set aside."""

    def __init__(self, past: KeyValue, room: int):
        """Begins with `past`, and has room for so many positions more."""
        rows, heads, self.length, width = past.key.shape
        self._states = [states.new_empty(rows, heads, self.length + room, width) for states in past]
        for states, old in zip(self._states, past, strict=True):
            states[:, :, : self.length] = old

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, heads, positions so far, and head_dim; of keys, as of values."""
        rows, heads, _, width = self._states[0].shape
        return rows, heads, self.length, width

    def followed_by(self, own: KeyValue) -> KeyValue:
        """All positions so far, those of `own` last."""
        start, self.length = self.length, self.length + own.key.shape[2]
        for states, new in zip(self._states, own, strict=True):
            states[:, :, start : self.length] = new
        return KeyValue(*(states[:, :, : self.length] for states in self._states))


def attend(
    query: Tensor,
    own: KeyValue,
    prefix: KeyValue | Halves | KeyValueCache | None,
    mask: Tensor | None,
    tail: Tensor | None,
) -> Tensor:
    """From `query` (rows, heads, positions, head_dim), shaped like it; see `layers.Attention.forward`."""
    if isinstance(prefix, Halves):
        return _attend_in_halves(query, own, prefix, mask)
    key, value = own if prefix is None else prefix.followed_by(own)
    if prefix is None and mask is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    if tail is None:
        return _attend_in_groups(query, key, value, mask)
    span = -tail.shape[2]
    out = _attend_in_groups(query[:, :, :span], key[:, :, :span], value[:, :, :span], mask)
    return torch.cat((out, _attend_in_groups(query[:, :, span:], key, value, tail)), dim=2)


def _attend_in_halves(query: Tensor, own: KeyValue, prefix: Halves, mask: Tensor | None) -> Tensor:
    """Attention of each half of the rows to its own prefix, and to what follows it."""
    out = []
    for part, seen, its_own, its_mask in zip(query.chunk(2), prefix, own.halves(), (mask, None), strict=True):
        out.append(_attend_in_groups(part, *seen.followed_by(its_own), its_mask))
    return torch.cat(out)


def _attend_in_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention in which several query heads share a key-value head, as the choice says.

    Not all fused kernels take grouped heads, least of all with a mask. In a form for all of them: where all positions
    see alike, the heads that share a key-value head are laid end to end along the positions; otherwise keys and values
    are repeated.
    """
    if _choice.native_groups:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    kv_heads, positions = key.shape[1], query.shape[2]
    group = query.shape[1] // kv_heads
    if mask is not None and mask.shape[2] > 1:
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    folded = query.unflatten(1, (kv_heads, group)).flatten(2, 3)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
    return out.unflatten(2, (group, positions)).flatten(1, 2)
