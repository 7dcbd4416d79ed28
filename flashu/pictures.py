"""Pictures as a caller has them, of any size and mode, to the clean latents that the network reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from flashu.errors import InputError
from flashu.models.geometry import PIXELS_PER_TOKEN
from flashu.models.wan_vae import WanVae

LONGEST = 128  # times the size asked for: a longer picture is not resized whole


def open_picture(image: Image.Image | str | Path) -> Image.Image:
    """A picture in RGB, upright, of a PIL image or a file. Raises `InputError` for what cannot be read as an image."""
    if not isinstance(image, (str, Path, Image.Image)):
        raise InputError(f"images holds {image!r}; give PIL images, or paths of image files")
    name = "an image" if isinstance(image, Image.Image) else image
    try:
        if isinstance(image, Image.Image):
            picture = _as_rgb(image)
        else:
            with Image.open(image) as opened:
                picture = _as_rgb(opened)
    except FileNotFoundError:
        raise InputError(f"{image}: there is no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} cannot be read as an image: {error}") from None
    if not picture.width * picture.height:
        raise InputError(f"{name} is {picture.width}x{picture.height} pixels")
    return picture


def _as_rgb(picture: Image.Image) -> Image.Image:
    """Transparent parts are white; 16-bit grey is scaled, not clipped."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return _grey(picture, 1 / 257)
    if picture.mode == "I":  # 16 bits in a wider type, or 8
        return _grey(picture, 1 / 257 if np.asarray(picture).max(initial=0) > 255 else 1)
    if picture.mode == "F":
        return _grey(picture, 255 if np.asarray(picture).max(initial=0) <= 1 else 1)
    if picture.mode == "LAB":
        raise ValueError("LAB pixels; convert them to RGB first")
    if picture.has_transparency_data or picture.mode == "La":
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA").convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _grey(picture: Image.Image, scale: float) -> Image.Image:
    values = np.nan_to_num(np.asarray(picture, dtype=np.float32)) * scale
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")


@torch.no_grad()
def picture_latents(vae: WanVae, picture: Image.Image, grid: tuple[int, int], fit: str = "crop") -> Tensor:
    """An RGB picture of any size to clean latents (1, channels, height, width) for a token grid.

    "crop" has it `cover` them, as the release does; "letterbox" shows all of it, on grey. The posterior's mean.
    """
    height, width = (side * PIXELS_PER_TOKEN for side in grid)
    if fit == "letterbox":
        scale = min(width / picture.width, height / picture.height)
        inner = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
        fitted = Image.new("RGB", (width, height), (128, 128, 128))
        fitted.paste(
            picture.resize(inner, Image.Resampling.BICUBIC), ((width - inner[0]) // 2, (height - inner[1]) // 2)
        )
    else:
        fitted = cover(picture, width, height)
    pixels = rearrange(torch.from_numpy(np.array(fitted)), "height width channels -> channels height width")[None]
    pixels = pixels.float() / 127.5 - 1
    return vae.encode(pixels.to(vae.device))[0]


def cover(picture: Image.Image, width: int, height: int) -> Image.Image:
    """A picture resized until it covers so many pixels, and cut to them; see `covering`."""
    left, top, *inner = covering(picture.size, (width, height))
    if max(inner) <= LONGEST * max(width, height):
        return picture.resize(inner, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    # A strip, of which the whole would fill the memory; its cut edges are resized without what lies beyond them.
    scales = picture.width / inner[0], picture.height / inner[1]
    box = (left * scales[0], top * scales[1], (left + width) * scales[0], (top + height) * scales[1])
    return picture.resize((width, height), Image.Resampling.BICUBIC, box)


def covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """How pictures of `size` (width, height) come to cover `target`: left and top of what is kept of them, once they
    are resized to a width and a height. In whole pixels, for a square those of torchvision's `Resize` and `CenterCrop`,
    with which the release prepares pictures: the longer side is rounded down, half a pixel of a margin to even.
    """
    (width, height), (wanted_width, wanted_height) = size, target
    if width * wanted_height <= height * wanted_width:
        inner = wanted_width, max(int(wanted_width * height / width), wanted_height)
    else:
        inner = max(int(wanted_height * width / height), wanted_width), wanted_height
    return round((inner[0] - wanted_width) / 2), round((inner[1] - wanted_height) / 2), *inner
