"""The pictures of README and docs are what `make pictures` makes now, and show what was planned and measured."""

import json
import re
import sys
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import charts
import make_pictures
import plan_chart
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import screenshots
import svg
from PIL import Image

from flashu.acceleration.head_cache import Head
from flashu.acceleration.plan import Llm, make_plan
from flashu.config import flashu_preset

ROOT = Path(__file__).parents[2]
PICTURES = make_pictures.PICTURES
MADE = json.loads((PICTURES / "made.json").read_text())
SVG = "{http://www.w3.org/2000/svg}"


def drawn(name):
    return ElementTree.parse(PICTURES / f"{name}.svg").getroot()


def words(name):
    return [text.text for text in drawn(name).iter(f"{SVG}text")]


def rects(name, **values):
    """Those with these attributes, from left to right."""
    found = [rect for rect in drawn(name).iter(f"{SVG}rect") if values.items() <= rect.attrib.items()]
    return sorted(found, key=lambda rect: float(rect.get("x")))


def fills(found):
    return [re.search(r"f-(\w+)", each.get("class")).group(1) for each in found]


def test_every_picture_is_there_small_and_dated():
    files = {*(f"{name}.svg" for name in make_pictures.DRAWN), *(f"{name}.png" for name in make_pictures.TAKEN)}
    assert {file.name for file in PICTURES.iterdir()} == files | {"made.json"}
    assert set(MADE) == files
    for file, entry in MADE.items():
        assert (PICTURES / file).stat().st_size < 300_000
        assert date.fromisoformat(entry["date"]).year > 2025
        assert entry["command"] == f"python docs/drawing/make_pictures.py {Path(file).stem}"
        assert {"flashu", "torch"} < set(entry)
    newest = max(entry["date"] for entry in MADE.values())
    assert f"made.json): {newest}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", make_pictures.DRAWN)
def test_a_drawing_is_as_its_script_writes_it_and_stands_alone(name):
    draw, sources = make_pictures.DRAWN[name]
    text = (PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    assert text == draw(), f"run python docs/drawing/make_pictures.py {name}"
    assert MADE[f"{name}.svg"]["from"] == sources
    assert all((ROOT / source).is_file() for source in sources)

    root = drawn(name)
    assert root.find(f"{SVG}title").text
    assert root.find(f"{SVG}desc").text
    assert "@media (prefers-color-scheme:dark)" in root.find(f"{SVG}style").text
    panel = root.find(f"{SVG}rect")
    width, height = map(float, root.get("viewBox").split()[2:])
    assert fills([panel]) == ["panel"], "its own ground, whatever the page's"
    assert (float(panel.get("width")), float(panel.get("height"))) == (width - 1, height - 1)
    without_namespace = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"http|href|url\(|@import|<script|<image|<foreignObject| on\w+=", without_namespace)


@pytest.mark.parametrize("name", make_pictures.DRAWN)
def test_words_end_within_the_picture(name):
    root = drawn(name)
    width, height = map(float, root.get("viewBox").split()[2:])
    for text in root.iter(f"{SVG}text"):
        long = svg.text_width(text.text, float(text.get("font-size")))
        start = float(text.get("x")) - long * {"middle": 0.5, "end": 1}.get(text.get("text-anchor"), 0)
        assert 0 < start < start + long < width, text.text
        assert 0 < float(text.get("y")) < height, text.text


def test_the_plan_has_a_cell_for_what_each_step_runs():
    steps = make_plan(flashu_preset("paper-1.5b"), 35, 7.5).steps
    llm, head = rects("plan", width="16.5", y="148.75"), rects("plan", width="16.5", y="228.75")
    expected = {Llm.NONE: "none", Llm.FULL: "blue", Llm.PRUNED: "pale"}
    assert fills(llm) == ["warm" if step.measure else expected[step.llm] for step in steps]
    assert fills(head) == ["none" if step.head is Head.REUSE else "teal" for step in steps]
    dots = sorted(float(dot.get("cx")) for dot in drawn("plan").iter(f"{SVG}circle") if dot.get("cy") == "237")
    stores = [step.number for step in steps if step.head is Head.STORE]
    assert [round((dot - 145) / 22) + 1 for dot in dots] == stores == [5, 10, 15, 20]
    assert [text for text in words("plan") if text in ("7.5", "10")] == ["7.5", "10", "10"], "one of them is a step"


def test_the_plans_bars_are_the_counted_operations():
    """As `benchmarks/flops.py --all --json` counted them, in a file of its own."""
    counts = charts.read("2026-11-25-flops.json")["counts"]
    counted = {each["flashu"]: each for each in counts if each["preset"] == "show-o2-1.5b"}
    cost = plan_chart.counted(plan_chart.planned())
    assert [flop / 1e12 for flop in cost.steps] == pytest.approx(counted["paper-1.5b"]["tflop_per_step"])

    bars = {float(bar.get("x")): float(bar.get("height")) / 25 for bar in rects("plan", width="18")}
    heights = [bars.get(136.0 + 22 * step, 0.0) for step in range(len(cost.steps))]
    assert heights == pytest.approx(counted["paper-1.5b"]["tflop_per_step"], abs=0.001)
    told = f"{counted['paper-1.5b']['tflop_per_image']:.1f} TFLOP, decoding too; unaccelerated, in 49 whole steps, "
    assert words("plan")[-1] == f"An image takes {told}{counted[None]['tflop_per_image']:.1f}."


def test_the_curve_of_quality_is_the_measured_one():
    points = charts.quality_points()
    assert len([*drawn("quality").iter(f"{SVG}circle")]) == len(points)
    told = {name: [round(value, 1) for value in (it.score, it.error, it.gflop)] for name, it in points.items()}
    assert told["stock-50"] == [79.9, 0.0, 14.1]
    assert told["stock-12"] == [77.4, 1.3, 3.5], "50 steps' score, less what 12 lost of it on half of the prompts"
    assert told["few-steps"] == [79.8, 0.3, 4.1]
    assert told["embedded"] == [79.4, 1.2, 5.9]
    assert told["paper"] == [66.5, 2.2, 7.0]


def test_the_bars_of_speed_are_the_measured_ones():
    texts = words("speed")
    for bar in charts.speed_bars():
        at = texts.index(bar.name)
        assert texts[at : at + 4] == [
            bar.name,
            f"{bar.images_per_s[8]:.2f}",
            f"{bar.ratio:.2f}x",
            f"{bar.images_per_s[1]:.2f}",
        ]
    lengths = [float(bar.get("width")) for bar in rects("speed", height="30")]
    speeds = [bar.images_per_s[8] for bar in charts.speed_bars()]
    assert lengths == pytest.approx([480 * each / speeds[-1] for each in speeds], abs=0.01)
    assert [f"{each:.2f}" for each in speeds] == ["0.45", "0.83", "1.58", "3.97", "5.47"]


def test_screenshots_are_of_the_demo():
    for name, width in (("demo", 1752), ("report", 1200)):
        source = MADE[f"{name}.png"]["from"]
        assert source["command"] == "flashu run demo"
        assert source["manifest"]["num_rows"] == pq.read_metadata(ROOT / "manifests" / "demo.parquet").num_rows
        with Image.open(PICTURES / f"{name}.png") as image:
            assert image.width == width
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 1000, "pictures, not only text"


def test_the_sheet_shows_each_fifth_prompt_as_text(tmp_path, monkeypatch):
    """Of a run in two shards, the first with a prompt that would be markup."""
    (tmp_path / "data").mkdir()
    prompts = ["<script>alert(1)</script> & a fox", *(f"fox {number}" for number in range(30))]
    for shard, some in enumerate((prompts[:2], prompts[2:])):
        rows = [{"prompt": prompt, "image": {"bytes": b"png", "path": "x.png"}} for prompt in some]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"shard-{shard:05}.parquet")
    shown = []

    def screenshot(page, width, height, scale):
        shown.append(page)
        image = Image.new("RGB", (scale * width, scale * height), "white")
        image.paste("black", (100, 100, 800, 900))
        return image

    monkeypatch.setattr(screenshots, "_screenshot", screenshot)
    assert screenshots.sheet(tmp_path).height == 948, "cut below what is to be seen, but for a margin"
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", shown[0])
    assert captions == ["&lt;script&gt;alert(1)&lt;/script&gt; &amp; a fox", *(f"fox {n}" for n in range(4, 30, 5))]
    assert "each fifth of its 31 prompts" in shown[0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["speed", "report"], "no Chromium for report: apt-get install chromium"), (["sped"], "there is no picture sped")],
)
def test_what_cannot_be_made_is_told_before_anything_is_written(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(screenshots, "CHROMIUM", None)
    monkeypatch.setattr(make_pictures, "PICTURES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_pictures.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        make_pictures.main()
    assert told in f"{stopped.value}\n{capsys.readouterr().err}"
    assert not [*tmp_path.iterdir()]


def test_a_picture_is_written_with_what_it_is_made_from(tmp_path, monkeypatch):
    monkeypatch.setattr(make_pictures, "PICTURES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_pictures.py", "speed"])
    make_pictures.main()
    assert (tmp_path / "speed.svg").read_bytes() == (PICTURES / "speed.svg").read_bytes()
    entry = json.loads((tmp_path / "made.json").read_text())["speed.svg"]
    assert entry["from"] == ["benchmarks/results/2026-11-27-gpu-nvidia-h200.json"]
