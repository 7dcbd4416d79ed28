"""Dynamic layer skipping (FlashU §3.3): layers that hardly change what passes through them are left out for a while.

A layer's importance is one minus the mean cosine similarity of its input and output, over every position of an
image's rows. The release measures one prompt at a time; here each image of a batch is measured on its own rows and
gets its own set, so that an image does not depend on its neighbours.
"""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor

from flashu.devices import send_numbers

SkipSets = tuple[tuple[int, ...], ...]  # per image, the numbers of the layers it leaves out, ascending


def importance(similarity: Tensor, images: int) -> Tensor:
    """Mean similarity (rows, layers), rows in CFG order, to each image's layer importances (images, layers)."""
    return 1 - reduce(similarity, "(rows images) layers -> images layers", "mean", images=images)


def least_important(importances: Tensor, count: int) -> SkipSets:
    """The `count` least important layers of each image (images, layers). Waits for the device once."""
    if importances.is_meta:  # counting operations: any set costs the same
        return tuple(tuple(range(count)) for _ in importances)
    order = importances.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
    return tuple(map(tuple, order.tolist()))


def rows_that_run(
    skipped: SkipSets, num_layers: int, rows_per_image: int, device: torch.device, least: int = 1
) -> tuple[Tensor | None, ...]:
    """Per layer, the rows (CFG order) whose image does not skip it; None where all run it.

    Layers that the same rows run have the same tensor, and all are laid out on the device at once. Where fewer than
    `least` of several images run a layer, one of them stands there as often as it takes.
    """
    images = len(skipped)
    rows_by_layer: list[tuple[int, ...] | None] = []
    for layer in range(num_layers):
        running = [image for image in range(images) if layer not in skipped[image]]
        if len(running) == images:
            rows_by_layer.append(None)
            continue
        running += running[-1:] * (least - len(running))
        rows_by_layer.append(tuple(row * images + image for row in range(rows_per_image) for image in running))
    distinct = [rows for rows in dict.fromkeys(rows_by_layer) if rows is not None]
    on_device = dict(zip(distinct, send_numbers(device, *distinct), strict=True))
    return tuple(rows if rows is None else on_device[rows] for rows in rows_by_layer)


def count_to_skip(num_layers: int, ratio: float) -> int:
    """How many layers a ratio r_LS skips."""
    return int(num_layers * ratio)
