"""The Wan 2.1 VAE's decoder as Show-o2's release runs it on images: 3-D convolutions over videos of one frame.

Half of the baseline that `gpu.py` measures against; the other is `release_shaped.py`. As in the release, weights are
float32 under autocast to bfloat16, all images of a batch are decoded at once, two frames of zeros go before the image,
and each convolution keeps a copy of its input for frames that never come. Left out are the encoder and the temporal
upsampling, which a first frame does not meet. Parameter names are those of `Wan2.1_VAE.pth`.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu.models import WanImageVAE
from flashu.models.geometry import VaeGeometry


class CausalConv3d(nn.Conv3d):
    """Over (images, channels, frames, height, width); sees this frame and the two before."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3)
        self.kept: Tensor | None = None

    def forward(self, video: Tensor) -> Tensor:
        self.kept = video.clone()
        return super().forward(F.pad(video, (1, 1, 1, 1, 2, 0)))


class ChannelNorm(nn.Module):
    def __init__(self, channels: int, other_dimensions: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * other_dimensions))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(channels_in, 3),
            nn.SiLU(),
            CausalConv3d(channels_in, channels_out),
            ChannelNorm(channels_out, 3),
            nn.SiLU(),
            nn.Dropout(0.0),
            CausalConv3d(channels_out, channels_out),
        )
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv3d(channels_in, channels_out, 1)

    def forward(self, video: Tensor) -> Tensor:
        return self.residual(video) + self.shortcut(video)


class AttentionBlock(nn.Module):
    """Single-head attention within each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, video: Tensor) -> Tensor:
        frames = _frames(video)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None].contiguous()
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        out = self.proj(out[:, 0].transpose(1, 2).reshape(frames.shape))
        return video + _video(out, video)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )

    def forward(self, video: Tensor) -> Tensor:
        upsample, convolution = self.resample
        frames = _frames(video)
        return _video(convolution(upsample(frames.float()).type_as(frames)), video)


class Decoder(nn.Module):
    def __init__(self, geometry: VaeGeometry):
        super().__init__()
        g = geometry
        widths = [g.dim * mult for mult in (g.dim_mult[-1], *reversed(g.dim_mult))]
        widest, narrowest = widths[0], widths[-1]
        self.conv1 = CausalConv3d(g.z_dim, widest)
        self.middle = nn.Sequential(
            ResidualBlock(widest, widest), AttentionBlock(widest), ResidualBlock(widest, widest)
        )
        blocks: list[nn.Module] = []
        for level, (before, width) in enumerate(pairwise(widths)):
            before = before if level == 0 else before // 2  # the upsampling above halved it
            blocks += [ResidualBlock(before if i == 0 else width, width) for i in range(g.num_res_blocks + 1)]
            if level < len(g.dim_mult) - 1:
                blocks.append(Upsample(width))
        self.upsamples = nn.Sequential(*blocks)
        self.head = nn.Sequential(ChannelNorm(narrowest, 3), nn.SiLU(), CausalConv3d(narrowest, 3))

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(video))))


class ReleaseVae(nn.Module):
    """Normalised latents (images, z_dim, height, width) to images (images, 3, 8 height, 8 width)."""

    def __init__(self, geometry: VaeGeometry):
        super().__init__()
        self.geometry = geometry
        self.conv2 = nn.Conv3d(geometry.z_dim, geometry.z_dim, 1)
        self.decoder = Decoder(geometry)
        self.autocast: torch.dtype | None = None  # to run in; None runs in float32

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1], float32."""
        try:
            with torch.autocast(latents.device.type, self.autocast) if self.autocast else nullcontext():
                mean, std = (
                    torch.tensor(value, dtype=self.autocast, device=latents.device)[:, None, None, None]
                    for value in (self.geometry.latent_mean, self.geometry.latent_std)
                )
                return self.decoder(self.conv2(latents[:, :, None] * std + mean))[:, :, 0].float().clamp(-1, 1)
        finally:  # also where memory ended, of which these would keep a large part
            for module in self.modules():
                if isinstance(module, CausalConv3d):
                    module.kept = None

    @torch.no_grad()
    def take_weights(self, vae: WanImageVAE) -> None:
        """Make the images that `vae` makes: its weights become the last temporal slices; the others stay."""
        folded = dict(vae.named_parameters())
        for name, parameter in self.named_parameters():
            seen = parameter[:, :, -1] if parameter.ndim == 5 else parameter
            seen.copy_(folded[name].reshape(seen.shape))


def _frames(video: Tensor) -> Tensor:
    """(images, channels, frames, height, width) to (images · frames, channels, height, width)."""
    return video.transpose(1, 2).flatten(0, 1)


def _video(frames: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_frames`, for a video of as many images as `like`."""
    return frames.unflatten(0, (like.shape[0], -1)).transpose(1, 2)
