"""Layouts: patches to pixels in the order that the released weights expect, and memory looked at, not copied."""

import pytest
import torch
import torch.nn.functional as F
from random_weights import random_model
from torch import nn

from flashu.models import Showo2Qwen2_5
from flashu.models.patches import PatchEmbed, patchify, unpatchify
from flashu.models.presets import PRESETS
from flashu.models.wan_vae import AttentionBlock
from tests.bounds import SUM
from tests.reference import relative_error


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
    assert embed(patchify(latents)).flatten().tolist() == [0, 1, 2, 3, 4, 5]


@torch.no_grad()
def test_a_patch_embedder_is_its_convolution_with_tokens_first_in_memory():
    """What watches the convolution still sees it."""
    embed, seen = PatchEmbed(16, 48), []
    embed.proj.register_forward_hook(lambda *_: seen.append("proj"))
    latents = torch.randn(3, 16, 8, 12)
    embedded = embed(patchify(latents))
    convolved = F.conv2d(latents, embed.proj.weight, embed.proj.bias, stride=2)
    assert relative_error(embedded, convolved.flatten(2).mT) < SUM
    assert embedded.is_contiguous()
    assert seen == ["proj"]


@pytest.mark.parametrize("grid", [(4, 4), (5, 7)], ids=["its own", "another"])
@torch.no_grad()
def test_every_vision_layer_takes_tokens_that_are_whole_in_memory(grid):
    """On the grid of its positions, and on one to which they are resized."""
    model, taken = random_model(Showo2Qwen2_5, PRESETS["embedded"], 0), []
    for layer in model.und_trans.layers:
        layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].is_contiguous()))
    latents = torch.randn(2, model.config.image_latent_dim, *(2 * side for side in grid))
    model.embed_images(latents, model.semantic_positions(grid))
    assert taken == [True] * len(model.und_trans.layers)


def test_the_vaes_attention_gives_channels_last_what_has_channels_last():
    block = AttentionBlock(8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last)
    assert block(x).is_contiguous(memory_format=torch.channels_last)
