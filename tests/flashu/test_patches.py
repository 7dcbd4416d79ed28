"""Layouts: patches to pixels in the order that the released weights expect, and memory looked at, not copied."""

import torch
from torch import nn

from flashu.models.patches import PatchEmbed, unpatchify
from flashu.models.wan_vae import AttentionBlock


def test_patches_become_pixels_token_by_token_as_the_release_reads_them():
    """Its order in its own words: the grid as (h, w, p, p, c), reshaped to (h·p·w·p, c), c first, seen as (c, H, W)."""
    height, width, patch, channels = 2, 3, 2, 4
    patches = torch.arange(2 * height * width * patch**2 * channels).reshape(2, height * width, -1)
    laid_out = patches.reshape(2, height, width, patch, patch, channels)
    rows = [row.reshape(-1, channels).T.reshape(channels, height * patch, width * patch) for row in laid_out]
    assert torch.equal(unpatchify(patches, (height, width)), torch.stack(rows))
    usual = laid_out.permute(0, 5, 1, 3, 2, 4).reshape(2, channels, height * patch, width * patch)
    assert not torch.equal(unpatchify(patches, (height, width)), usual)


def test_velocities_are_the_patches_own_memory():
    patches = torch.randn(2, 6, 16)
    assert unpatchify(patches, (2, 3)).data_ptr() == patches.data_ptr()


def test_tokens_of_an_image_are_row_by_row():
    embed = PatchEmbed(1, 1)
    nn.init.constant_(embed.proj.weight, 0.25)
    nn.init.zeros_(embed.proj.bias)
    grid = torch.arange(6.0).reshape(1, 1, 2, 3)
    latents = grid.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert embed(latents).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_the_vaes_attention_gives_channels_last_what_has_channels_last():
    block = AttentionBlock(8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last)
    assert block(x).is_contiguous(memory_format=torch.channels_last)
