"""The figure of README, drawn by hand: how prompts become a dataset. As SVG."""

from __future__ import annotations

from svg import Drawing

TITLE, WORDS = 27, 20  # letters, of which a phone shows 0.4 times the size
LEFT, MIDDLE, RIGHT = 116, 450, 784  # of the three parts
TOP, BOTTOM, CAPTION = 78, 290, (324, 349)
SHARD = 22
LOST = "a lost worker's shard goes back"


def draw() -> str:
    """Prompts, the cluster that works on them, and the dataset that it leaves."""
    drawing = Drawing(
        900,
        372,
        "From prompts to a dataset",
        "A Parquet manifest of prompts is cut into shards, which wait in the queue of a driver on a Ray cluster. "
        "Workers, each with Show-o2 and FlashU on one GPU, pull shards and commit them to a dataset of images, "
        "metadata and a report, on disk or in S3. The shard of a worker that is lost goes back to the queue.",
    )
    captions = {
        LEFT: ("Prompts", "a Parquet file,", "cut into shards"),
        MIDDLE: ("Ray cluster", "workers pull shards and commit them;", LOST),
        RIGHT: ("Dataset", "images, metadata,", "report; disk or S3"),
    }
    for x, (title, *lines) in captions.items():
        drawing.text(x, 52, title, TITLE, anchor="middle", bold=True)
        for line, y in zip(lines, CAPTION, strict=True):
            drawing.text(x, y, line, WORDS, "warm" if line == LOST else "soft", "middle")
    _manifest(drawing)
    _cluster(drawing)
    _dataset(drawing)
    for x in (198, 666):
        drawing.arrow(f"M{x} 184H{x + 27}", "ink", (x + 37, 184), (1, 0), stroke_width=3.5)
    return drawing.svg()


def _shard(drawing: Drawing, x: float, y: float, fill: str, stroke: str | None = None, **how: object) -> None:
    drawing.rect(x, y, SHARD, SHARD, fill, stroke, rx=5, **how)


def _manifest(drawing: Drawing) -> None:
    """Rows of a table, in four shards."""
    left, width = LEFT - 74, 148
    drawing.rect(left, TOP, width, BOTTOM - TOP, "raised", "line", rx=12, stroke_width=1.5)
    for shard, lengths in enumerate(((70, 54, 82), (60, 84, 66), (80, 50, 74), (64, 78, 56))):
        y = TOP + 14 + 48 * shard
        drawing.rect(left + 14, y, 8, 38, "blue", rx=4)
        for row, length in enumerate(lengths):
            drawing.rect(left + 34, y + 2 + 14 * row, length + 14, 6, "faint", rx=3)


def _cluster(drawing: Drawing) -> None:
    """The driver with its queue above three workers, the last of which is lost."""
    left, right = MIDDLE - 210, MIDDLE + 210
    drawing.rect(left, TOP, right - left, BOTTOM - TOP, "raised", "line", rx=12, stroke_width=1.5)
    drawing.rect(left + 14, TOP + 14, right - left - 28, 46, "panel", "ink", rx=9, stroke_width=2)
    drawing.text(left + 30, TOP + 44, "driver", WORDS + 1, bold=True)
    last, queue, top, width = right - 30 - SHARD, TOP + 26, BOTTOM - 112, 122
    for place in range(8):
        _shard(drawing, last - place * (SHARD + 8), queue, "blue" if place else "warm")
    for worker in range(3):
        x = left + 14 + worker * (width + 13)
        held, middle = x + width - 14 - SHARD, x + width / 2
        if worker < 2:
            drawing.rect(x, top, width, 98, "panel", "ink", rx=9, stroke_width=2)
            _shard(drawing, held, top + 11, "blue")
            drawing.arrow(f"M{middle} {TOP + 62}V{top - 12}", "ink", (middle, top - 3), (0, 1), stroke_width=3)
        else:
            drawing.rect(x, top, width, 98, "none", "faint", rx=9, stroke_width=2, stroke_dasharray="6 5")
            _shard(drawing, held, top + 11, "none", "warm", stroke_width=2, stroke_dasharray="4 3")
            way, tip = f"M{held + SHARD / 2} {top + 6}V{queue + SHARD + 14}", (held + SHARD / 2, queue + SHARD + 5)
            drawing.arrow(way, "warm", tip, (0, -1), stroke_width=3, stroke_dasharray="6 4")
        drawing.text(x + 14, top + 28, "GPU", WORDS - 2, "soft")
        drawing.text(middle, top + 58, "Show-o2", WORDS + 1, "ink" if worker < 2 else "soft", "middle", bold=True)
        drawing.text(middle, top + 84, "+ FlashU", WORDS + 1, "blue" if worker < 2 else "soft", "middle", bold=True)


def _dataset(drawing: Drawing) -> None:
    """Pictures of the built-in model's world, rows of metadata, and a chart."""
    left, width, side, gap = RIGHT - 74, 148, 56, 8
    drawing.rect(left, TOP, width, BOTTOM - TOP, "raised", "line", rx=12, stroke_width=1.5)
    first = left + (width - 2 * side - gap) / 2
    for place in range(4):
        x, y = first + place % 2 * (side + gap), TOP + 14 + place // 2 * (side + gap)
        drawing.rect(x, y, side, side, "panel", "line", rx=7, stroke_width=1.5)
        a, b = x + side / 2, y + side / 2
        if place == 0:
            drawing.circle(a, b, 15, "warm")
        elif place == 1:
            drawing.rect(a - 14, b - 14, 28, 28, "blue")
        elif place == 2:
            drawing.path(f"M{a} {b - 16}L{a + 17} {b + 14}H{a - 17}Z", fill="teal")
        else:
            drawing.circle(a, b, 12, "none", "blue", stroke_width=7)
    y = TOP + 14 + 2 * (side + gap)
    for row in range(4):
        drawing.rect(first, y + 4 + 14 * row, (54, 40, 50, 36)[row], 6, "faint", rx=3)
    for bar, height in enumerate((22, 36, 48, 30)):
        drawing.rect(first + side + gap + 2 + 14 * bar, y + 52 - height, 10, height, "pale", rx=2)
