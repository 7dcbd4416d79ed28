"""Pictures of a run, by headless Chromium: a sheet of its images with their prompts, and its report."""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageChops

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "hide-scrollbars",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "blink-settings=preferredColorScheme=1",  # light
)
EVERY, COLUMNS, SIDE, GAP = 5, 4, 192, 20  # of the sheet: each fifth prompt; SIDE and GAP in pixels of the page
REPORT_WIDTH, REPORT_ROW = 1200, 6  # pixels; images of the report's sample that fill a row
MARGIN = 24

SHEET = """<!doctype html><html lang="en"><head><meta charset="utf-8"><style>
body {{ margin: 0; padding: {margin}px; background: #f6f7f9; color: #16191f; }}
body {{ font: 22px/1.25 Arial, Helvetica, sans-serif; }}
main {{ display: grid; grid-template-columns: repeat({columns}, {side}px); gap: {gap}px; }}
figure {{ margin: 0; }}
img {{ display: block; width: {side}px; height: {side}px; image-rendering: pixelated; }}
img {{ border-radius: 7px; box-shadow: 0 0 0 1px #d9dee6; }}
figcaption {{ margin-top: 7px; }}
p {{ margin: {gap}px 0 0; color: #596372; }}
</style></head><body><main>{figures}</main><p>{words}</p></body></html>"""


def sheet(run: Path) -> Image.Image:
    """Each fifth image of the run, in the manifest's order, enlarged, with its prompt below."""
    rows = [*_images(run)]
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{escape(prompt)}</figcaption></figure>"
        for prompt, data in rows[::EVERY]
    )
    words = f"make demo: each fifth of its {len(rows)} prompts, and what came of it"
    width = 2 * MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * GAP
    page = SHEET.format(margin=MARGIN, columns=COLUMNS, side=SIDE, gap=GAP, figures=figures, words=words)
    return _cut(_screenshot(page, width, 1600, scale=2), 2 * MARGIN)


def _images(run: Path) -> Iterator[tuple[str, bytes]]:
    """Prompts with their encoded images. Shards are ranges of the manifest's rows, by number."""
    for file in sorted((run / "data").glob("*.parquet")):
        for row in pq.read_table(file, columns=["prompt", "image"]).to_pylist():
            yield row["prompt"], row["image"]["bytes"]


def report(run: Path) -> Image.Image:
    """The top of the run's report, down to the first row of its sample of images."""
    page = (run / "report.html").read_text(encoding="utf-8")
    hidden = f"<style>#sample figure:nth-child(n+{REPORT_ROW + 1}) {{ visibility: hidden; }}</style></head>"
    return _cut(_screenshot(page.replace("</head>", hidden, 1), REPORT_WIDTH, 1600), MARGIN)


def _screenshot(page: str, width: int, height: int, scale: int = 1) -> Image.Image:
    """The top of a page of HTML, with `scale` pixels for each of the page.

    Raises `subprocess.CalledProcessError` where Chromium fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        html, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        html.write_text(page, encoding="utf-8")
        values = {
            "user-data-dir": Path(folder, "profile"),
            "screenshot": shot,
            "window-size": f"{width},{height}",
            "force-device-scale-factor": scale,
        }
        switches = (*SWITCHES, *(f"{name}={value}" for name, value in values.items()))
        command = [str(CHROMIUM), *(f"--{switch}" for switch in switches), html.as_uri()]
        subprocess.run(command, capture_output=True, timeout=120, check=True)
        with Image.open(io.BytesIO(shot.read_bytes())) as image:
            return image.convert("RGB")


def _cut(image: Image.Image, margin: int) -> Image.Image:
    """Without the rows at the end that are of one colour between the margins, but for a margin's worth of them."""
    inner = image.crop((2 * margin, 0, image.width - 2 * margin, image.height))
    plain = Image.new("RGB", inner.size, inner.getpixel((0, inner.height - 1)))
    _, _, _, end = ImageChops.difference(inner, plain).getbbox()
    return image.crop((0, 0, image.width, min(end + margin, image.height)))
