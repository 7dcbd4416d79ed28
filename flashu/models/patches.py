"""A latent image as tokens, a patch each: on its way into the network, and out of it."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flashu.models.geometry import PATCH_SIZE


def patchify(latents: Tensor) -> Tensor:
    """(images, channels, height, width) to (images, tokens, channels · patch · patch), tokens row-major."""
    return rearrange(
        latents,
        "images channels (height down) (width across) -> images (height width) (channels down across)",
        down=PATCH_SIZE,
        across=PATCH_SIZE,
    )


class PatchProduct(nn.Conv2d):
    """A convolution of patches that do not overlap, with each patch given as one vector.

    A convolution's result has channels first in memory, and so has what residual layers add to it, in every one.
    """

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """What `patchify` makes, to (images, tokens, hidden)."""

    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        self.proj = PatchProduct(channels, hidden_size, PATCH_SIZE, stride=PATCH_SIZE)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(rows, tokens, patch · patch · channels) to (rows, channels, height, width), as the weights expect it.

    The released model lays its patches out token by token and reads the result as rows of pixels, with no transpose
    between a patch's rows and the grid's columns. Its weights were trained so; a usual unpatchify scrambles them.
    """
    pixels = rearrange(patches, "rows tokens (pixels channels) -> rows channels (tokens pixels)", pixels=PATCH_SIZE**2)
    return rearrange(pixels, "rows channels (height width) -> rows channels height width", height=grid[0] * PATCH_SIZE)
