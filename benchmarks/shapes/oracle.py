"""What a picture shows, from its pixels alone: background, shapes, their colours, sizes and places.

What stands out from the background is joined to blobs, and blobs are told apart by colour. Each is moved to one place,
scaled to one area and held against renderings of every shape. A blob that looks like none of them is nothing: a
picture gets no credit for what a person would not recognise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product

import numpy as np
from PIL import Image, ImageFilter

from .propositions import Proposition
from .render import render
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing

SIDE = 64  # pixels at which pictures are looked at
FRAME = 1  # pixels

BACKGROUND_TOLERANCE = 60  # RGB distance, of 442
PLAIN = 0.6  # share of the frame that has to be of the background's colour
FAINT = 44  # RGB distance from the background; half of that from grey to purple, the nearest two

COLOUR_TOLERANCE = 28  # CIELAB distance; orange and yellow are 44 apart, blue and purple 29
PURE = 0.3  # share of a blob's inner pixels that have to be of some colour of the world
OWN = 0.2  # share of those from which a colour is one of the blob's; or as many as a small shape has
COVERED = 0.5  # share of a pixel from which it counts as a shape's

SPECK = 24  # pixels; a third of the smallest shape
CANVAS, CANVAS_AREA = 32, 300  # pixels: the side and the shape's area where blobs are compared
BLURS = (0.0, 0.8, 1.2, 1.6)  # pixels: how soft an edge may be
LEAST_OVERLAP = 0.75  # with a rendered shape, as intersection over union
OTHER_SIZE = 1.35  # times larger or smaller than every size of the world

# RGB to luma and chroma. Chroma counts for half: JPEG keeps it at half the resolution, so edges are in the luma.
LUMA_CHROMA = np.array([[0.299, -0.085, 0.25], [0.587, -0.165, -0.21], [0.114, 0.25, -0.04]])
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # from linear sRGB


def look(picture: Image.Image) -> Scene:
    """The scene in a square picture. A background that is none of the world's is `""`; odd blobs are left out."""
    filtered = Image.Resampling.BOX if picture.width > SIDE else Image.Resampling.BICUBIC
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), filtered), dtype=np.float32)
    frame = np.ones((SIDE, SIDE), dtype=bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    background = np.median(pixels[frame], axis=0)
    away = np.linalg.norm(pixels - background, axis=-1)
    if (away[frame] < BACKGROUND_TOLERANCE).mean() < PLAIN:
        return Scene("", ())
    things: list[Thing] = []
    for blob in _blobs(away > FAINT):
        for colour, cover in _colours(blob, pixels, background):
            things += [thing for part in _blobs(cover > COVERED) if (thing := _recognised(part, cover, colour))]
    return Scene(_background_name(background), tuple(things))


def answers(picture: Image.Image, propositions: Sequence[Proposition]) -> list[bool]:
    """Whether each proposition holds of what the picture shows."""
    scene = look(picture)
    return [proposition.holds(scene) for proposition in propositions]


def _background_name(colour: np.ndarray) -> str:
    distances = {name: np.linalg.norm(colour - known) for name, known in BACKGROUNDS.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= BACKGROUND_TOLERANCE else ""


def _blobs(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The connected regions of a mask (side, side), each as a mask, without specks."""
    numbers = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    spread = np.where(mask, _beside(numbers).max(axis=0), 0)
    while (spread > numbers).any():  # each pixel takes the highest number beside it, until a region has only one
        numbers = np.maximum(numbers, spread)
        spread = np.where(mask, _beside(numbers).max(axis=0), 0)
    found, areas = np.unique(numbers[mask], return_counts=True)
    for number in found[areas >= SPECK]:
        yield numbers == number


def _colours(blob: np.ndarray, pixels: np.ndarray, background: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The colours of the world in a blob, each with how much of every pixel it covers, (side, side) in [0, 1].

    Inner pixels vote on which they are. A pixel on an edge is a blend, a point on the line from the background to its
    colour, and may look like a third colour: red on white blends to pink. It goes to the line that it is nearest to.
    """
    names, known = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float32)
    inner = blob & _beside(blob).all(axis=0)
    unlike = np.linalg.norm(_lab(pixels[inner])[:, None] - _lab(known), axis=-1)
    near = unlike.min(axis=1) <= COLOUR_TOLERANCE
    if near.sum() <= PURE * inner.sum():
        return
    votes = np.bincount(unlike.argmin(axis=1)[near], minlength=len(names))
    own = np.nonzero(votes >= min(OWN * votes.sum(), SPECK))[0]
    away, ways = pixels - background, known[own] - background
    share = np.clip(away @ ways.T / np.maximum((ways**2).sum(axis=1), 1), 0, 1)
    nearest = np.linalg.norm(away[:, :, None] - share[..., None] * ways, axis=-1).argmin(axis=-1)
    for place, colour in enumerate(own):
        mine = nearest == place
        if not (inner & mine).any():
            continue
        purer_half = inner & mine & (share[..., place] >= np.median(share[inner & mine, place]))
        seen = np.median(pixels[purer_half], axis=0)
        if np.linalg.norm(_lab(seen) - _lab(known[colour])) > COLOUR_TOLERANCE:
            continue
        way = (seen - background) @ LUMA_CHROMA
        cover = np.clip(away @ LUMA_CHROMA @ way / (way @ way), 0, 1)
        yield names[colour], np.where(mine & _grown(blob), cover, 0)


def _recognised(part: np.ndarray, cover: np.ndarray, colour: str) -> Thing | None:
    """The thing that a blob of one colour is, or None."""
    seen = np.where(_grown(part), cover, 0)
    canvas = _normalised(seen)
    shapes, drawn, areas = _templates()
    common = drawn.mean(axis=0)  # all shapes have a middle: what tells them apart is the rest
    own, others = canvas - common, drawn - common
    likeness = (own * others).sum(axis=(1, 2)) / np.sqrt((others**2).sum(axis=(1, 2)))
    best = int(likeness.argmax())
    if np.minimum(canvas, drawn[best]).sum() < LEAST_OVERLAP * np.maximum(canvas, drawn[best]).sum():
        return None
    radius = (seen.sum() / areas[shapes[best]]) ** 0.5 / SIDE
    if not min(SIZES.values()) / OTHER_SIZE < radius < max(SIZES.values()) * OTHER_SIZE:
        return None
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    rows, columns = np.nonzero(part)
    x, y = (float(places.min() + places.max() + 1) / 2 / SIDE for places in (columns, rows))
    return Thing(shapes[best], colour, size, x, y)


def _normalised(cover: np.ndarray) -> np.ndarray:
    """A coverage (side, side) with its centroid moved amid a canvas, scaled to an area of CANVAS_AREA."""
    rows, columns = np.indices(cover.shape) + 0.5
    area = cover.sum()
    x, y = (columns * cover).sum() / area, (rows * cover).sum() / area
    scale = (area / CANVAS_AREA) ** 0.5
    affine = (scale, 0, x - scale * CANVAS / 2, 0, scale, y - scale * CANVAS / 2)
    image = Image.fromarray(cover.astype(np.float32))
    return np.asarray(image.transform((CANVAS, CANVAS), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))


@cache
def _templates() -> tuple[list[str], np.ndarray, dict[str, float]]:
    """Every shape, in every size and softness, and the area that each covers at a radius of 1.

    Returns shapes (n), normalised coverages (n, CANVAS, CANVAS) and areas by shape.
    """
    shapes, drawn, areas = [], [], {}
    red, black = COLOURS["red"][0], BACKGROUNDS["black"][0]
    for shape, size, blur in product(SHAPES, SIZES, BLURS):
        picture = render(Scene("black", (Thing(shape, "red", size, 0.5, 0.5),)), SIDE)
        pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32)
        cover = (pixels[..., 0] - black) / (red - black)
        shapes.append(shape)
        drawn.append(_normalised(np.where(_grown(cover > COVERED), cover, 0)))
        areas[shape] = float(cover.sum()) / (SIZES[size] * SIDE) ** 2
    return shapes, np.stack(drawn), areas


def _beside(values: np.ndarray) -> np.ndarray:
    """The four neighbours of every pixel, (4, side, side); beyond the frame there is 0."""
    padded = np.pad(values, 1)
    return np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the pixels beside it, which hold the soft edge."""
    return mask | _beside(mask).any(axis=0)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (…, 3) of 0 to 255 in CIELAB, where distances are near to those that people see."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    ratio = linear @ XYZ.T / XYZ.sum(axis=1)
    x, y, z = np.moveaxis(np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
