"""A latent image as tokens, a patch each: on its way into the network, and out of it."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from flashu.models.geometry import PATCH_SIZE


class PatchEmbed(nn.Module):
    """(images, channels, height, width) latents to (images, tokens, hidden), tokens row-major."""

    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, PATCH_SIZE, stride=PATCH_SIZE)

    def forward(self, latents: Tensor) -> Tensor:
        return rearrange(self.proj(latents), "images hidden height width -> images (height width) hidden")


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(rows, tokens, patch · patch · channels) to (rows, channels, height, width), as the weights expect it.

    The released model lays its patches out token by token and reads the result as rows of pixels, with no transpose
    between a patch's rows and the grid's columns. Its weights were trained so; a usual unpatchify scrambles them.
    """
    pixels = rearrange(patches, "rows tokens (pixels channels) -> rows channels (tokens pixels)", pixels=PATCH_SIZE**2)
    return rearrange(pixels, "rows channels (height width) -> rows channels height width", height=grid[0] * PATCH_SIZE)
