"""The pages on plan, exactness and design: what they show of code, of files and of figures is so."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from flashu.acceleration.plan import make_plan
from flashu.flops import count_image
from flashu.models.presets import preset
from tests import bounds
from tests.command import flashu
from tests.test_house import FLOORS

ROOT = Path(__file__).parents[2]
PAGES = {name: ROOT / f"docs/how-it-works/{name}.md" for name in ("plan", "exactness", "design")}
RESULTS, TECHNIQUES = ROOT / "benchmarks/results", ROOT / "flashu/acceleration"
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
CUT = "…"


def text_of(name):
    return PAGES[name].read_text(encoding="utf-8")


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", text_of(name), flags=re.DOTALL)


def result(name):
    return json.loads((RESULTS / name).read_text())


@pytest.fixture(scope="module")
def printed():
    """The lines of `flashu plan`."""
    outcome = flashu("plan")
    assert outcome.code == 0, outcome
    return outcome.out.splitlines()


def test_the_printed_plan_is_what_the_command_prints(printed):
    """Nothing is left out but where a line says so, and before and after what is shown."""
    (shown,) = blocks("plan", "text")
    end = 0
    for part in shown.split(f"{CUT}\n"):
        lines = part.splitlines()
        start = printed.index(lines[0], end)
        end = start + len(lines)
        assert printed[start:end] == lines


def test_figures_about_steps_are_those_of_the_count(printed):
    """All with three digits after the point: of a step of the plan, or of a part of a whole step."""
    config, vae = preset("show-o2-1.5b")
    stock = count_image(config, vae, make_plan(None, 50, 7.5), config.native_grid, 62)  # counted by the command already
    steps = [line.split()[-1] for line in printed if line.split()[:1] and line.split()[0].isdecimal()]
    parts = [f"{stock.parts[part] / 49e12:.3f}" for part in ("LLM", "head", "image path")]
    known = {*steps, *parts, f"{stock.parts['VAE decode'] / 1e12:.3f}"}
    assert set(re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", text_of("plan"))) <= known
    assert f"{sum(map(float, steps[24:])):.1f} of 117.6 TFLOP" in text_of("plan")


def test_the_snippets_run_and_make_a_picture_by_their_own_plan(capsys):
    names = {}
    for snippet in blocks("plan", "python"):
        exec(compile(snippet, "plan.md", "exec"), names)
    table, said = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert [int(line.split()[0]) for line in table.splitlines()[1:20]] == list(range(1, 20))
    assert said == names["config"].describe()
    assert names["image"].size == (64, 64)


def test_the_drawing_has_the_floors_and_rooms_of_the_house():
    (drawing,) = blocks("design", "text")
    drawn, package = {}, ""
    for line in drawing.splitlines():
        names = re.split(r" {3,}", line.strip())[0].split()
        if not line.startswith(" "):
            (package,) = (name.removesuffix("/") for name in names)
            drawn[package] = []
        else:
            drawn[package].append([f"{package}.{name.removesuffix('/')}" for name in names])
        for name in names:
            where = ROOT / name if not line.startswith(" ") else ROOT / package / name
            assert where.is_dir() if name.endswith("/") else where.with_suffix(".py").is_file(), name

    house = {package: [] for package in drawn}
    for floor in reversed(FLOORS):
        rooms = [room for room in floor if "." in room]
        for package, some in itertools.groupby(sorted(rooms), key=lambda room: room.split(".")[0]):
            house[package].append(list(some))
    assert {package: [sorted(floor) for floor in floors] for package, floors in drawn.items()} == house
    assert set(house) == {room.split(".")[0] for floor in FLOORS for room in floor}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    """Source files, results, and tests, whose bare name must be of one file only."""
    text = text_of(page)
    links = re.findall(r"\]\((\.\./\.\./[^)#]+)", text)
    assert [link for link in links if not (PAGES[page].parent / link).exists()] == []
    named = set(
        re.findall(r"[\w./-]+\.py\b|[\w./-]*\d{4}-\d\d-\d\d-[\w.-]+\.json\b", re.sub(r"\[.*?\]\(.*?\)", "", text))
    )
    assert len(named) > 5
    for name in named:
        here = [folder / name for folder in (ROOT, RESULTS, TECHNIQUES) if (folder / name).is_file()]
        here += [file for file in TESTS if file.name == name]
        assert len(here) == 1, f"{name} is {len(here)} files"


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_are_there(page):
    defined = {
        name for file in TESTS for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), flags=re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", text_of(page)))
    assert named - defined == set()
    assert named or page == "design"


def test_bounds_are_those_of_the_tests():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text_of("exactness").splitlines()]
    table = {row[0].strip("`"): row[1:] for row in rows if len(row) == 4 and row[0].startswith("`")}
    assert float(table["SUM"][0]) == pytest.approx(bounds.SUM, rel=0.1)
    for name, of in (("EVALUATION", bounds.OF_EVALUATION), ("TRAJECTORY", bounds.OF_TRAJECTORY)):
        stated = [float(cell) for cell in table[name][:2]]
        assert stated == pytest.approx([of[torch.float32], of[torch.bfloat16]], rel=0.05)
    decoding = re.search(r"decoding in bfloat16 has (\S+)", table["EVALUATION"][2])
    assert float(decoding[1]) == pytest.approx(bounds.OF_DECODING[torch.bfloat16], rel=0.05)


def test_figures_of_results_are_those_of_their_files():
    exact, design = (re.sub(r"\s+", " ", text_of(name)) for name in ("exactness", "design"))
    low, high = (result(f"2026-11-27-gpu-{name}nvidia-h200.json")["picture_difference"] for name in ("", "float32-"))
    compiled, uncompiled = low["ours-flashu"], low["ours-flashu-uncompiled"]
    assert f"differ by {low['ours']:.1f} of 255" in exact
    assert f"FlashU by {compiled:.0f} compiled and {uncompiled:.1f} not" in exact
    assert f"are {high['ours']:.3f} of 255 levels apart in the mean, {high['ours-flashu']:.3f} with FlashU" in exact

    changes = [
        setting["oracle_change"]
        for name in ("2026-11-24-quality.json", "2026-11-25-inexact.json")
        for setting in result(name)["settings"]
    ]
    known = {f"{change['points']:.1f} ± {change['standard_error']:.1f}" for change in changes}
    stated = set(re.findall(r"-?\d+\.\d ± \d\.\d", design))
    assert len(stated) > 5
    assert stated <= known
