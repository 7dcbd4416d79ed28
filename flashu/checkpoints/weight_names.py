"""Which files of a checkpoint hold its weights, told by their names alone: a folder's, a repository's or a bucket's.

Every layout that Show-o2's release, diffusers and transformers write is known. With `STEM` one of `STEMS`, `FORMAT` one
of `FORMATS`, and `.VARIANT` there or not:

    STEM.VARIANT.FORMAT                            one file
    STEM-00001-of-0000N.VARIANT.FORMAT             one of several, or STEM.VARIANT-00001-of-0000N.FORMAT
    STEM.FORMAT.index.VARIANT.json                 what each of them holds, or STEM.VARIANT.FORMAT.index.json

An index says which files it is of, and its own name does not: the release's `save_pretrained` calls shards
`pytorch_model-…` and their index `diffusion_pytorch_model.bin.index.json`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from flashu.errors import CheckpointError

STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
FORMATS = ("safetensors", "bin")
SHOWN = 8  # names in an error

_STEM, _VARIANT, _FORMAT = f"(?P<stem>{'|'.join(STEMS)})", r"[\w-]+?", f"(?P<format>{'|'.join(FORMATS)})"
_WEIGHTS = re.compile(
    rf"{_STEM}(?:-(?P<number>\d{{5}})-of-(?P<count>\d{{5}}))?(?:\.(?P<variant>{_VARIANT}))?"
    rf"(?:-(?P<number2>\d{{5}})-of-(?P<count2>\d{{5}}))?\.{_FORMAT}"
)
_INDEX = re.compile(rf"{_STEM}(?:\.(?P<variant>{_VARIANT}))?\.{_FORMAT}\.index(?:\.(?P<variant2>{_VARIANT}))?\.json")


@dataclass(frozen=True)
class Weights:
    """One copy of a model's weights: an index, which names the files, or the files themselves."""

    variant: str | None
    format: str
    index: str | None
    files: tuple[str, ...]  # none where there is an index

    def holds(self, name: str) -> bool:
        """Whether a file of that name may be part of this copy."""
        other = _parse(name)
        return other is not None and (other.variant, other.format) == (self.variant, self.format)


@dataclass(frozen=True)
class _Name:
    stem: str
    variant: str | None
    format: str
    is_index: bool
    number: int = 0  # of a shard, from 1
    count: int = 0


def _parse(name: str) -> _Name | None:
    """What a file's name says; None for a file of something else."""
    if found := _INDEX.fullmatch(name):
        return _Name(found["stem"], found["variant"] or found["variant2"], found["format"], True)
    if found := _WEIGHTS.fullmatch(name):
        number, count = (int(found[key] or found[f"{key}2"] or 0) for key in ("number", "count"))
        return _Name(found["stem"], found["variant"], found["format"], False, number, count)
    return None


def is_weights(name: str) -> bool:
    """Whether a file of that name holds weights, or is an index of such files."""
    return _parse(name) is not None


def is_plain(name: str) -> bool:
    """Whether it does, and is of no variant."""
    return (meaning := _parse(name)) is not None and meaning.variant is None


def find_weights(names: Iterable[str], where: object, variant: str | None = None) -> Weights:
    """The weights among a folder's file names; of several formats the safer, and an index before what has none.

    variant: as in `pytorch_model.bf16.bin`. Without one, the plain files, or the variant that is there alone.
    `where` is what errors call the folder. Raises `CheckpointError` when there are none, or shards are missing.
    """
    names = sorted(names)
    parsed = {name: meaning for name in names if (meaning := _parse(name))}
    if not parsed:
        held = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        raise CheckpointError(
            f"{where} holds no weights. It has {held or 'no files'}; looked for {', '.join(STEMS)}, as .safetensors "
            "or .bin, in one file or shards (pytorch_model.bin, model.safetensors.index.json, …)"
        )
    variant = _choose_variant({meaning.variant for meaning in parsed.values()}, where, variant)
    of_variant = {name: meaning for name, meaning in parsed.items() if meaning.variant == variant}
    best = min(of_variant.values(), key=_preference)
    alike = {name: meaning for name, meaning in of_variant.items() if _preference(meaning) == _preference(best)}
    if best.is_index:
        return Weights(variant, best.format, next(iter(alike)), ())
    if not best.count:
        return Weights(variant, best.format, None, tuple(alike))
    return Weights(variant, best.format, None, _whole(alike, where))


def _choose_variant(variants: set[str | None], where: object, variant: str | None) -> str | None:
    if variant in variants:
        return variant
    named = ", ".join(sorted(name for name in variants if name))
    if variant is not None:
        raise CheckpointError(f"{where} has no variant {variant!r}; " + (f"it has {named}" if named else "it has none"))
    if len(variants) > 1:
        raise CheckpointError(f"{where} holds its weights in variants only: {named}. Choose one with variant=")
    return next(iter(variants))


def _preference(name: _Name) -> tuple[int, bool, int, bool]:
    """Safetensors before pickles, shards without an index last, and of one stem an index before one file."""
    return FORMATS.index(name.format), bool(name.count), STEMS.index(name.stem), not name.is_index


def _whole(shards: dict[str, _Name], where: object) -> tuple[str, ...]:
    """The shards in order. Raises `CheckpointError` unless they are all there."""
    sets: dict[int, dict[int, str]] = defaultdict(dict)
    for name, meaning in shards.items():
        sets[meaning.count][meaning.number] = name
    whole = [numbered for count, numbered in sorted(sets.items()) if set(numbered) == set(range(1, count + 1))]
    if len(whole) > 1:
        raise CheckpointError(
            f"{where} holds several sets of shards, of {' and '.join(str(len(numbered)) for numbered in whole)} files, "
            "and no index; remove those that are not wanted"
        )
    if whole:
        return tuple(whole[0][number] for number in sorted(whole[0]))
    count, numbered = max(sets.items(), key=lambda item: len(item[1]) / item[0])
    missing = [str(number) for number in range(1, count + 1) if number not in numbered]
    raise CheckpointError(
        f"{where} has no index, and lacks {len(missing)} of {count} shards: number {', '.join(missing[:SHOWN])} "
        f"beside {next(iter(numbered.values()))}"
    )
