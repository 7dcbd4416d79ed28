"""What `benchmarks/quality.py` measures of pictures: likeness to others, and what the model itself says of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from shapes.captions import yes_no
from shapes.render import render
from shapes.scenes import random_scene

from flashu.pipeline import TextToImagePipeline
from jobs.metrics.pixels import METRICS, Picture, measure

QUESTIONS = 5  # about each render


def psnr(pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> float | None:
    """Peak signal-to-noise ratio of all pictures together, in dB; None where they are equal."""
    pairs = zip(pictures, references, strict=True)
    error = np.mean([(np.asarray(one, float) - np.asarray(other, float)) ** 2 for one, other in pairs])
    return None if error == 0 else float(10 * np.log10(255**2 / error))


_taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
SSIM_WINDOW = np.outer(_taps, _taps) / _taps.sum() ** 2


def ssim(picture: Image.Image, reference: Image.Image) -> float:
    """Structural similarity of luma (Wang et al. 2004: 11×11 Gaussian window, sigma 1.5), 1 where equal."""

    def local_mean(values: np.ndarray) -> np.ndarray:
        return np.einsum("yxij,ij->yx", sliding_window_view(values, SSIM_WINDOW.shape), SSIM_WINDOW)

    x, y = (Picture(one).luma.astype(np.float64) for one in (picture, reference))
    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())


def statistics_of(pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Means over pictures of each image statistic that is a number, and the share that is broken."""
    measured = [measure(picture) for picture in pictures]
    return {name: float(np.mean([one[name] for one in measured])) for name, m in METRICS.items() if m.type is not str}


def answers_right(pipe: TextToImagePipeline, renders: int, side: int, batch_size: int) -> float:
    """Per cent of yes-or-no questions about fresh renders that the model answers right: how good a judge it is."""
    rng = random.Random("questions about renders")
    scenes = [random_scene(rng) for _ in range(renders)]
    right = []
    for start in range(0, renders, batch_size):
        batch = scenes[start : start + batch_size]
        asked = [[yes_no(scene, rng) for _ in range(QUESTIONS)] for scene in batch]
        questions = [[statement.question for statement, _ in about] for about in asked]
        said = pipe.yes_probability([render(scene, side) for scene in batch], questions, batch_size=batch_size)
        right += [
            (yes > 0.5) == holds
            for one, about in zip(said, asked, strict=True)
            for yes, (_, holds) in zip(one, about, strict=True)
        ]
    return 100 * float(np.mean(right))
