"""The Wan 2.1 VAE for single images: its causal 3-D convolutions folded to 2-D ones.

A causal convolution pads time with zeros before the first frame, so a lone image meets only the last temporal slice
of each kernel; and the temporal resampling convolutions are passed over on a first frame. Keeping just those slices
gives the same numbers at 2.6 times fewer operations. Parameter names are those of `Wan2.1_VAE.pth`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flashu.models.geometry import VAE_STRIDE, VaeGeometry


class ChannelNorm(nn.Module):
    """RMS norm over channels, written as Wan does: unit length times the square root of the width."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (x.shape[1] ** 0.5 * self.gamma)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(channels_in),
            nn.SiLU(),
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            ChannelNorm(channels_out),
            nn.SiLU(),
            nn.Identity(),  # a dropout in training; holds the place of the names after it
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
        )
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head attention over all pixels of a latent."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous, or the fused attention kernels refuse it and all scores are held in memory. No copy is made, as
        # channels come last in memory already.
        qkv = rearrange(self.to_qkv(self.norm(x)), "images channels height width -> images 1 (height width) channels")
        query, key, value = qkv.contiguous().chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(query, key, value)
        pixels = rearrange(out, "images 1 (height width) channels -> images channels height width", height=x.shape[2])
        return x + self.proj(pixels)


class Upsample(nn.Module):
    """Twice the side, half the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Downsample(nn.Module):
    """Half the side, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Middle(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


class Encoder(nn.Module):
    def __init__(self, geometry: VaeGeometry):
        super().__init__()
        g = geometry
        widths = [g.dim * mult for mult in (1, *g.dim_mult)]
        self.conv1 = nn.Conv2d(3, g.dim, 3, padding=1)
        blocks: list[nn.Module] = []
        for level, (before, width) in enumerate(pairwise(widths)):
            blocks += [ResidualBlock(before if i == 0 else width, width) for i in range(g.num_res_blocks)]
            if level < len(g.dim_mult) - 1:
                blocks.append(Downsample(width))
        self.downsamples = nn.Sequential(*blocks)
        self.middle = Middle(widths[-1])
        self.head = nn.Sequential(ChannelNorm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 2 * g.z_dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    def __init__(self, geometry: VaeGeometry):
        super().__init__()
        g = geometry
        widths = [g.dim * mult for mult in (g.dim_mult[-1], *reversed(g.dim_mult))]
        self.conv1 = nn.Conv2d(g.z_dim, widths[0], 3, padding=1)
        self.middle = Middle(widths[0])
        blocks: list[nn.Module] = []
        for level, (before, width) in enumerate(pairwise(widths)):
            before = before if level == 0 else before // 2  # the upsampling above halved it
            blocks += [ResidualBlock(before if i == 0 else width, width) for i in range(g.num_res_blocks + 1)]
            if level < len(g.dim_mult) - 1:
                blocks.append(Upsample(width))
        self.upsamples = nn.Sequential(*blocks)
        self.head = nn.Sequential(ChannelNorm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(x))))


class WanVae(nn.Module):
    """Images (n, 3, height, width) in [-1, 1] to and from normalised latents (n, z_dim, height / 8, width / 8).

    Its weights lie in memory with channels last, in which what it computes follows them: the layout that convolutions
    are quickest in, on a CPU too, and that norms over channels and attention over pixels want.
    """

    def __init__(self, geometry: VaeGeometry):
        super().__init__()
        self.geometry = geometry
        self.source: Path | None = None  # the first of the files that its weights are from
        self.encoder = Encoder(geometry)
        self.conv1 = nn.Conv2d(2 * geometry.z_dim, 2 * geometry.z_dim, 1)
        self.conv2 = nn.Conv2d(geometry.z_dim, geometry.z_dim, 1)
        self.decoder = Decoder(geometry)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_load_state_dict_pre_hook(_channels_last)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        return self.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (n, z_dim, h, w) to images (n, 3, 8h, 8w), clamped to [-1, 1]."""
        mean, std = _statistics(self.geometry, latents.device, latents.dtype)
        return self.decoder(self.conv2((latents * std + mean).to(self.dtype))).clamp(-1, 1)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Normalised latents (n, z_dim, h, w), on any device, to pixels (n, 8h, 8w, 3) on this one; see `to_pixels`.

        One by one: decoding takes by far the most memory per image, and gains nothing from a batch.
        """
        count, _, height, width = latents.shape
        shape = count, VAE_STRIDE * height, VAE_STRIDE * width, 3
        pixels = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for index, one in enumerate(latents.to(self.device)):
            pixels[index] = to_pixels(self.decode(one[None])[0])
        return pixels

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, 8h, 8w) in [-1, 1] to the posterior: normalised mean, and log variance as it comes."""
        height, width = images.shape[-2:]
        if height % VAE_STRIDE or width % VAE_STRIDE:
            raise ValueError(f"image of {height}x{width}: both sides must be multiples of {VAE_STRIDE}")
        posterior_mean, log_variance = self.conv1(self.encoder(images.to(self.dtype))).chunk(2, dim=1)
        mean, std = _statistics(self.geometry, posterior_mean.device, posterior_mean.dtype)
        return (posterior_mean - mean) / std, log_variance


def to_pixels(image: Tensor) -> Tensor:
    """An image (3, height, width) in [-1, 1] to (height, width, 3), rounded to the nearest of 256 levels: uint8."""
    levels = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(levels, "channels height width -> height width channels")


def _statistics(geometry: VaeGeometry, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, (z_dim, 1, 1) each. A GPU is sent them without waiting for it."""
    both = torch.tensor(
        (geometry.latent_mean, geometry.latent_std), dtype=dtype, device="cpu", pin_memory=device.type == "cuda"
    )
    mean, std = both.to(device, non_blocking=True)[..., None, None]
    return mean, std


def _channels_last(vae: WanVae, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded, whose tensors may become the parameters: lay its kernels channels last."""
    for name, value in state.items():
        if name.startswith(prefix) and value.ndim == 4:
            state[name] = value.contiguous(memory_format=torch.channels_last)


def fold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released 3-D weights to those of an image: the last temporal slice of each kernel, no temporal resampling.

    Weights that are folded already pass through.
    """
    folded = {}
    for key, value in tensors.items():
        if ".time_conv." in key:
            continue
        if key.endswith(".gamma"):
            value = value.reshape(-1, 1, 1)
        elif value.ndim == 5:
            value = value[:, :, -1].contiguous()
        folded[key] = value
    return folded
