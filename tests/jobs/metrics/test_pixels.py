"""Each metric against a value worked out by hand."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from jobs.metrics.pixels import METRICS, NEAR_DUPLICATE_BITS, measure
from tests.jobs.hashes import hamming


def picture_of(array):
    array = np.asarray(array, np.uint8)
    return Image.fromarray(array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2))


def flat(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def checkerboard(size=64, cell=1):
    rows, columns = np.indices((size, size)) // cell
    return picture_of((rows + columns) % 2 * 255)


def gradient(size=256):
    return picture_of(np.tile(np.linspace(0, 255, size).round(), (size, 1)))


def noise(size=128, seed=0):
    return picture_of(np.random.default_rng(seed).integers(0, 256, (size, size, 3)))


def scene(size=256, seed=0):
    """Smooth blobs: something with low frequencies, as photographs have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def cartoon():
    """White paper, one red disc of 0.8% of the area and nothing else."""
    image = flat("white", (200, 200))
    ImageDraw.Draw(image).ellipse((90, 90, 109, 109), fill="red")
    return image


def test_every_metric_returns_the_type_it_declares():
    values = measure(scene())
    assert list(values) == list(METRICS)
    assert {name: type(value) for name, value in values.items()} == {name: m.type for name, m in METRICS.items()}


def test_brightness_and_contrast_of_a_checkerboard_are_a_half():
    values = measure(checkerboard())
    assert values["brightness"] == pytest.approx(0.5)
    assert values["contrast"] == pytest.approx(0.5)


def test_brightness_weighs_colours_as_jpeg_does():
    assert measure(flat((0, 255, 0)))["brightness"] == pytest.approx(0.587, abs=0.002)
    assert measure(flat((0, 0, 255)))["brightness"] == pytest.approx(0.114, abs=0.002)


def test_contrast_of_a_gradient_is_that_of_a_uniform_distribution():
    assert measure(gradient())["contrast"] == pytest.approx(math.sqrt((256**2 - 1) / 12) / 255, rel=1e-4)


def test_sharpness_of_a_checkerboard_of_single_pixels_is_known():
    # Every pixel's four neighbours are the other colour, so the Laplacian is +1020 or -1020, half of each.
    assert measure(checkerboard())["sharpness"] == pytest.approx(1020**2, rel=1e-5)


def test_sharpness_of_a_ramp_is_zero():
    assert measure(gradient())["sharpness"] == pytest.approx(0, abs=1e-3)


def test_sharpness_falls_when_a_picture_is_blurred():
    sharp = checkerboard(256, cell=16)
    blurred = sharp.resize((64, 64), Image.Resampling.BOX).resize((256, 256), Image.Resampling.BICUBIC)
    assert measure(blurred)["sharpness"] < measure(sharp)["sharpness"] / 2


def test_sharpness_of_independent_noise_is_twenty_times_its_variance():
    # The Laplacian's weights are 1, 1, 1, 1 and -4: their squares sum to 20.
    levels = np.random.default_rng(0).integers(100, 150, (400, 400))
    assert measure(picture_of(levels))["sharpness"] == pytest.approx(20 * (50**2 - 1) / 12, rel=0.03)


def test_colourfulness_of_half_red_half_green():
    array = np.zeros((64, 64, 3))
    array[:, :32, 0] = 255
    array[:, 32:, 1] = 255
    # rg = +-255: mean 0, deviation 255. yb = 127.5 everywhere: deviation 0.
    assert measure(picture_of(array))["colourfulness"] == pytest.approx(255 + 0.3 * 127.5, rel=1e-5)


def test_gray_pictures_have_no_colour():
    assert measure(gradient())["colourfulness"] == 0


def test_entropy_counts_the_levels_of_luma():
    assert measure(flat("white"))["entropy"] == 0
    assert measure(checkerboard())["entropy"] == pytest.approx(1)
    assert measure(gradient())["entropy"] == pytest.approx(8)


@pytest.mark.parametrize("colour", ["black", "white", "gray", "red", (13, 200, 77)])
def test_one_colour_is_broken(colour):
    assert measure(flat(colour))["broken"]


def test_one_colour_with_faint_noise_or_few_stray_pixels_is_broken():
    faint = np.random.default_rng(0).integers(0, 4, (200, 200))
    strays = np.zeros((200, 200))
    strays[0, :20] = 255
    assert measure(picture_of(faint))["broken"]
    assert measure(picture_of(strays))["broken"]


@pytest.mark.parametrize("picture", [gradient(), noise(), scene(), cartoon(), checkerboard(cell=8)])
def test_gradients_noise_scenes_and_drawings_of_few_colours_are_not_broken(picture):
    assert not measure(picture)["broken"]


def test_a_dark_picture_with_detail_is_not_broken():
    assert not measure(picture_of(np.random.default_rng(0).integers(0, 12, (64, 64))))["broken"]


def test_colours_of_equal_luma_are_not_broken():
    array = np.zeros((64, 64, 3))
    array[:, :32] = (130, 60, 60)
    array[:, 32:] = (60, 95, 61)
    assert not measure(picture_of(array))["broken"]


def test_phash_of_a_cosine_has_that_one_frequency():
    # The picture is the first horizontal cosine: of the 64 coefficients only the mean and this one are above zero.
    columns = np.cos(np.pi * (np.arange(32) + 0.5) / 32)
    assert measure(picture_of(np.tile(128 + 100 * columns, (32, 1)).round()))["phash"].startswith("c")
    assert measure(flat("gray"))["phash"] == "8000000000000000"


def test_phash_survives_scaling_recompression_and_light(tmp_path):
    original = scene()
    original.save(tmp_path / "a.jpg", quality=40)
    hash_ = measure(original)["phash"]
    for changed in (
        Image.open(tmp_path / "a.jpg"),
        original.resize((100, 100), Image.Resampling.LANCZOS),
        original.point(lambda level: int(level * 0.9 + 10)),
    ):
        assert hamming(hash_, measure(changed)["phash"]) <= NEAR_DUPLICATE_BITS


def test_phash_tells_different_pictures_apart():
    hashes = [measure(scene(seed=seed))["phash"] for seed in range(20)]
    distances = [hamming(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > NEAR_DUPLICATE_BITS
    assert 28 < np.mean(distances) < 36


def test_hamming_counts_bits():
    assert hamming("0000000000000000", "0000000000000000") == 0
    assert hamming("000000000000000f", "0000000000000001") == 3
    assert hamming("ffffffffffffffff", "0000000000000000") == 64


def test_pictures_of_one_pixel_and_other_modes_are_measured():
    assert measure(Image.new("RGBA", (1, 1), "red"))["broken"]
    assert measure(Image.new("L", (2, 7)))["sharpness"] == 0
