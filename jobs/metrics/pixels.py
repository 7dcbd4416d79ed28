"""What can be told of a picture from its pixels alone. A new metric is one function under `@metric`.

How well a picture fits its prompt needs a network (`clip`, `vqa`); what such scores mean is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from jobs.metrics.bins import Range

Value = float | bool | str

NEAR_DUPLICATE_BITS = 4  # of a perceptual hash's 64
FLAT_LEVELS = 4  # of 255
FLAT_STRAYS = 0.001


@dataclass(frozen=True)
class Picture:
    """What the metrics read, each form made once."""

    image: Image.Image  # RGB

    @cached_property
    def gray(self) -> Image.Image:
        """Luma as in JPEG (Rec. 601), in 256 levels."""
        return self.image.convert("L")

    @cached_property
    def luma(self) -> np.ndarray:
        """(height, width), float32, 0 to 1."""
        return np.asarray(self.gray, np.float32) / 255


@dataclass(frozen=True)
class Metric:
    function: Callable[[Picture], Value]
    type: type
    range: Range | None  # of its histogram; None where there is none to draw

    @property
    def meaning(self) -> str:
        return (self.function.__doc__ or "").split("\n")[0]


@dataclass(frozen=True)
class Score:
    """What a network says of a picture and its prompt."""

    meaning: str
    range: Range


METRICS: dict[str, Metric] = {}
SCORES = {
    "clip_score": Score(
        "How well the image fits its prompt: 100 times the cosine of their CLIP embeddings.",
        Range(0, 50),  # of 100: photographs and their captions reach 30 to 35
    ),
    "vqa_score": Score("The model's own probability that the image shows its prompt, 0 to 1.", Range(0, 1)),
}


def metric(type_: type = float, range: Range | None = None) -> Callable:
    """Adds a function to what `measure` returns, under its own name."""

    def register(function: Callable[[Picture], Value]) -> Callable[[Picture], Value]:
        METRICS[function.__name__] = Metric(function, type_, range)
        return function

    return register


def measure(picture: Image.Image) -> dict[str, Value]:
    """Every metric of one picture, by name."""
    prepared = Picture(picture.convert("RGB"))
    return {name: metric.function(prepared) for name, metric in METRICS.items()}


@metric(range=Range(0, 1))
def brightness(picture: Picture) -> float:
    """Mean luma, 0 to 1."""
    return float(picture.luma.mean())


@metric(range=Range(0, 0.5))
def contrast(picture: Picture) -> float:
    """RMS contrast: the standard deviation of luma, at most 0.5."""
    return math.sqrt(_variance(picture.luma))


@metric(range=Range(1, 1e5, log=True))
def sharpness(picture: Picture) -> float:
    """Variance of the Laplacian of luma in 0..255, the unit in which others quote it. Blur is low, noise is highest."""
    luma = picture.luma * 255
    if min(luma.shape) < 3:
        return 0.0
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    return _variance(laplacian)


@metric(range=Range(0, 150))
def colourfulness(picture: Picture) -> float:
    """Hasler and Süsstrunk 2003: 0 is gray, 33 moderate, 59 quite, above 109 extremely colourful."""
    red, green, blue = (np.asarray(channel, np.float32) for channel in picture.image.split())
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = math.sqrt(_variance(red_green) + _variance(yellow_blue))
    return float(spread + 0.3 * math.hypot(red_green.mean(), yellow_blue.mean()))


@metric(range=Range(0, 8))
def entropy(picture: Picture) -> float:
    """Of the histogram of luma in 256 levels, in bits: 0 is one level, 8 is all levels alike."""
    counts = np.array(picture.gray.histogram(), np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # no negative zero


@metric(bool)
def broken(picture: Picture) -> bool:
    """Whether the picture is flat: no colour channel spans more than 4 of 255 levels, 0.1% of strays at each end aside.

    That is what a failed generation looks like: numbers that are not finite decode to one colour. A drawing with two
    colours, a dark night or a fog spans more; asking for entropy or contrast would call such drawings broken.
    """
    counts = np.array(picture.image.histogram()).reshape(3, 256)
    share = np.cumsum(counts, axis=1) / counts.sum(axis=1, keepdims=True)
    lowest = (share <= FLAT_STRAYS).sum(axis=1)
    highest = (share < 1 - FLAT_STRAYS).sum(axis=1)
    return bool((highest - lowest <= FLAT_LEVELS).all())


@metric(str)
def phash(picture: Picture) -> str:
    """64-bit perceptual hash, as 16 hex digits: signs of the 8x8 lowest frequencies of the picture at 32x32.

    Survives scaling, recompression and small changes of light; compare by the number of bits that differ.
    """
    small = np.asarray(picture.gray.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=2), np.float64)
    # Rounded so that frequencies that are absent are zero, and not rounding errors with a sign.
    frequencies = np.round(_COSINES @ small @ _COSINES.T, 3).ravel()
    bits = frequencies > np.median(frequencies[1:])  # [0] is the mean, and says nothing of the shape
    return np.packbits(bits).tobytes().hex()


def _variance(values: np.ndarray) -> float:
    centred = (values - values.mean()).ravel()  # a dot product is three times as fast as `var`
    return float(np.dot(centred, centred)) / centred.size


_COSINES = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))
