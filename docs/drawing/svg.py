"""A drawing as SVG text, by itself: on a panel of its own, in colours that follow the reader's light or dark theme.

The same calls make the same bytes. Nothing is asked for from outside, and letters are the reader's own sans serif.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

COLOURS = {  # name: on light, on dark
    "panel": ("#ffffff", "#161a20"),
    "raised": ("#f4f6f9", "#1f242c"),
    "line": ("#d9dee6", "#39414d"),
    "ink": ("#16191f", "#eceff3"),
    "soft": ("#596372", "#a7b0be"),
    "faint": ("#b4bcc8", "#5c6675"),
    "blue": ("#2f66d6", "#7aa5ff"),
    "pale": ("#a9c3f5", "#3f5f9e"),
    "teal": ("#128a80", "#45c2b5"),
    "warm": ("#c4700a", "#eaa94a"),
}
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"

NARROW = " ,.:;'()ijlrtf1"
LARGE, WORDS, SMALL = 26, 19, 17  # letters of a chart, in pictures 900 wide


def text_width(words: str, size: float) -> float:
    """About what words take of the picture's width, in a font of wide letters."""
    return size * sum(0.35 if letter in NARROW else 0.62 for letter in words)


class Drawing:
    """Shapes in the order in which they are drawn. Lengths are in units of the picture, `width` by `height`."""

    def __init__(self, width: float, height: float, title: str, description: str):
        """title, description: what is to be seen, for those who do not see it."""
        self.size = f"{_short(width)} {_short(height)}"
        self.title, self.description = title, description
        self.shapes: list[str] = []
        self.used: set[str] = set()
        self.rect(0.5, 0.5, width - 1, height - 1, "panel", "line", rx=14)

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str | None = None, **how: object
    ) -> None:
        self.shape("rect", fill, stroke, x=x, y=y, width=width, height=height, **how)

    def circle(self, x: float, y: float, radius: float, fill: str, stroke: str | None = None, **how: object) -> None:
        self.shape("circle", fill, stroke, cx=x, cy=y, r=radius, **how)

    def path(self, d: str, stroke: str | None = None, fill: str = "none", **how: object) -> None:
        self.shape("path", fill, stroke, d=d, **how)

    def arrow(self, d: str, stroke: str, tip: tuple[float, float], towards: tuple[int, int], **how: object) -> None:
        """A path with a head whose point is at `tip`. towards: where it points, as (1, 0) for right."""
        (x, y), (dx, dy), long, wide = tip, towards, 11, 6.5
        self.path(d, stroke, **how)
        corners = [(x - long * dx + side * wide * dy, y - long * dy + side * wide * dx) for side in (1, -1)]
        self.path("M" + " L".join(f"{_short(a)} {_short(b)}" for a, b in [(x, y), *corners]) + "Z", fill=stroke)

    def text(
        self, x: float, y: float, words: str, size: float, fill: str = "ink", anchor: str = "start", bold: bool = False
    ) -> None:
        """anchor: what of the words is at x: their start, middle or end. y is their baseline."""
        how = ({"text_anchor": anchor} if anchor != "start" else {}) | ({"font_weight": 600} if bold else {})
        self.shape("text", fill, None, words, x=x, y=y, font_size=size, **how)

    def cell(self, x: float, y: float, side: float, fill: str, stroke: str | None = None, dot: bool = False) -> None:
        """A small square, as in a strip or a legend."""
        self.rect(x + 0.75, y + 0.75, side - 1.5, side - 1.5, fill, stroke, rx=4, stroke_width=1.5)
        if dot:
            self.circle(x + side / 2, y + side / 2, 3.5, "panel")

    def heading(self, title: str, lead: str) -> None:
        self.text(32, 50, title, LARGE, bold=True)
        self.text(32, 80, lead, SMALL, "soft")

    def legend(self, x: float, y: float, entries: Iterable[tuple[object, ...]]) -> None:
        """A row of cells with words. entries: the words, then what `cell` is told: fill, line, dot."""
        for words, *how in entries:
            self.cell(x, y - 14, 16, *how)
            self.text(x + 23, y, words, SMALL, "soft")
            x += 23 + text_width(str(words), SMALL) + 22

    def shape(self, tag: str, fill: str, stroke: str | None = None, words: str = "", **how: object) -> None:
        """Any element. `font_size=20` becomes the attribute `font-size`."""
        colours = [f"f-{fill}"] + ([f"s-{stroke}"] if stroke else [])
        self.used.update(colours)
        values = {"class": " ".join(colours)} | {name.replace("_", "-"): _short(value) for name, value in how.items()}
        attributes = " ".join(f'{name}="{escape(str(value))}"' for name, value in values.items())
        self.shapes.append(f"<{tag} {attributes}" + (f">{escape(words)}</{tag}>" if words else "/>"))

    def svg(self) -> str:
        rules = []
        for use, what in (("f", "fill"), ("s", "stroke")):
            rules += [f".{use}-{name}{{{what}:var(--{name})}}" for name in COLOURS if f"{use}-{name}" in self.used]
        light, dark = ("".join(f"--{name}:{both[theme]};" for name, both in COLOURS.items()) for theme in (0, 1))
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.size}" role="img" font-family="{FONT}">',
                f"<title>{escape(self.title)}</title>",
                f"<desc>{escape(self.description)}</desc>",
                "<style>",
                f":root{{{light}}}",
                f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}",
                ".f-none{fill:none}",
                *rules,
                "</style>",
                *self.shapes,
                "</svg>\n",
            )
        )


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
