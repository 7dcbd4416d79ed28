"""Scenes to pictures."""

from __future__ import annotations

from PIL import Image, ImageDraw

from .scenes import BACKGROUNDS, COLOURS, Scene, outline

OVERSAMPLING = 4  # for smooth edges
HOLE = 0.5  # of a ring, as a share of its radius


def render(scene: Scene, side: int = 64) -> Image.Image:
    """An RGB picture of `side` × `side` pixels."""
    scale = side * OVERSAMPLING
    picture = Image.new("RGB", (scale, scale), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(picture)
    for thing in scene.things:
        colour = COLOURS[thing.colour]
        if thing.shape not in ("circle", "ring"):
            draw.polygon(outline(thing, scale), fill=colour)
            continue
        centre = (thing.x * scale, thing.y * scale)
        draw.circle(centre, thing.radius * scale, fill=colour)
        if thing.shape == "ring":
            draw.circle(centre, HOLE * thing.radius * scale, fill=BACKGROUNDS[scene.background])
    return picture.reduce(OVERSAMPLING)
