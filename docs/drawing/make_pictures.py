"""Make the pictures of README and docs anew: from what the code does, from dated results, and from a run of the demo.

    python docs/drawing/make_pictures.py [NAME ...]       # all of them, or those

They are written into docs/pictures/, with made.json, which says of each when it was made, from what, and by which
versions. The pictures of the run are taken by Chromium, and take half a minute; the others need nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import charts
import how_it_goes
import plan_chart
import screenshots
import torch
from PIL import Image

import flashu

PICTURES = Path(__file__).parents[1] / "pictures"
LARGEST = 300_000  # bytes
RUN = ("run", "demo")  # what flashu is told


DRAWN: dict[str, tuple[Callable[[], str], Sequence[str]]] = {  # SVG, and the files that it is made from
    "how-it-goes": (how_it_goes.draw, ["docs/drawing/how_it_goes.py"]),
    "plan": (plan_chart.plan, ["flashu/acceleration/plan.py", "flashu/flops.py"]),
    "quality": (charts.quality, [f"benchmarks/results/{name}" for name in charts.QUALITY]),
    "speed": (charts.speed, [f"benchmarks/results/{charts.SPEED}"]),
}
TAKEN: dict[str, Callable[[Path], Image.Image]] = {"demo": screenshots.sheet, "report": screenshots.report}  # of a run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*DRAWN, *TAKEN)))
    names = parser.parse_args().names or [*DRAWN, *TAKEN]
    unknown = [name for name in names if name not in {**DRAWN, **TAKEN}]
    if unknown:
        parser.error(f"there is no picture {', '.join(unknown)}; there are {', '.join((*DRAWN, *TAKEN))}")
    taken = [name for name in names if name in TAKEN]
    if not screenshots.CHROMIUM and taken:
        sys.exit(f"make_pictures: no Chromium for {' and '.join(taken)}: apt-get install chromium, or Google Chrome")
    for name in names:
        if name in DRAWN:
            draw, files = DRAWN[name]
            write(f"{name}.svg", draw().encode(), files)
    if taken:
        with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
            run = Path(folder, "demo")
            subprocess.run([sys.executable, "-m", "jobs", *RUN, f"output.path={run}"], check=True)
            for name in taken:
                write(f"{name}.png", png(TAKEN[name](run)), source(run))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def source(run: Path) -> dict[str, Any]:
    """What a run was, by its own run.json."""
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    chosen = {name: info[name] for name in ("created", "model", "manifest")}
    return {"command": " ".join(("flashu", *RUN)), **chosen}


def write(file: str, data: bytes, made_from: object) -> None:
    """A picture, and its entry in made.json."""
    if len(data) > LARGEST:
        sys.exit(f"make_pictures: {file} would have {len(data):,} bytes, and {LARGEST:,} is the most")
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / file).write_bytes(data)
    record = PICTURES / "made.json"
    entries = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    entries[file] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": f"python docs/drawing/make_pictures.py {Path(file).stem}",
        "from": made_from,
        "flashu": flashu.__version__,
        "torch": torch.__version__,
    }
    record.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n", encoding="utf-8")
    print(f"docs/pictures/{file}: {len(data):,} bytes")


if __name__ == "__main__":
    main()
