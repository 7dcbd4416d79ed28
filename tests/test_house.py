"""The house: which file may import which. Read from the imports as they are written, those inside functions too."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From the ground up. A room is a module or a package. What is in it imports from its own room and from lower floors,
# never from its own floor's other rooms, nor from a floor above.
FLOORS = [
    ("flashu.errors", "flashu.embedded", "manifests.s3_errors", "manifests.urls"),
    ("flashu.arguments", "manifests", "cluster"),
    ("flashu.config", "flashu.devices", "flashu.fingerprint"),
    ("flashu.models",),
    ("flashu.checkpoints", "flashu.acceleration", "flashu.pictures", "flashu.pending"),
    ("flashu.tokenizer", "flashu.sampler"),
    ("flashu.question_rows", "flashu.generation"),
    ("flashu.probe", "flashu.conversation"),
    ("flashu.calibration", "flashu.answering", "flashu.pretrained"),
    ("flashu.patch", "flashu.pipeline", "flashu.flops", "flashu.analysis"),
    ("jobs.dataset", "jobs.metrics"),
    ("jobs.settings", "jobs.statistics"),
    ("jobs.worker", "jobs.report"),
    ("jobs.driver",),
    ("jobs.filtering", "jobs.scoring"),
    ("jobs.cli",),
    ("jobs.__main__",),
]
DOORS = ("flashu", "flashu.models")  # which offer names to who stands outside; nothing inside imports from them
NEVER = {
    "flashu": ("ray", "boto3", "pyarrow", "omegaconf"),
    "manifests": ("ray", "torch", "boto3", "flashu", "cluster", "jobs"),
    "cluster": ("torch", "transformers", "pyarrow", "flashu", "jobs"),
}
OURS = ("flashu", "manifests", "cluster", "jobs")


def modules(root: Path) -> dict[str, Path]:
    """The files of the four packages, by the names that they are imported by."""
    found = {}
    for package in OURS:
        for file in sorted((root / package).glob("**/*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """What a file imports of ours, wherever in it, as modules."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute here"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in known or node.module in known:
                    yield name if name in known else node.module


def floor_of(module: str) -> tuple[int, str] | None:
    """The floor and the room that a module is in. None where there is none for it."""
    if module in DOORS:
        return len(FLOORS), module
    rooms = [(floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms]
    of_module = [(floor, room) for floor, room in rooms if f"{module}.".startswith(f"{room}.")]
    return max(of_module, key=lambda found: len(found[1]), default=None)


def upward_imports(root: Path) -> list[str]:
    """The imports that do not run down, in words."""
    found, known = [], modules(root)
    for module, file in known.items():
        outside = not module.startswith("flashu")
        for imported in sorted(set(imports(file, known)) - set(DOORS if outside else ())):
            here, there = floor_of(module), floor_of(imported)
            if here is None or there is None:
                found.append(f"{module} imports {imported}, and one of them is in no room")
            elif here[1] != there[1] and there[0] >= here[0]:
                where = "which is above it" if there[0] > here[0] else "a room beside its own"
                found.append(f"{module} imports {imported}, {where}")
    return found


def strangers(root: Path) -> list[str]:
    """The imports of packages that a folder is to do without, in words."""
    found = []
    for package, without in NEVER.items():
        for file in sorted((root / package).glob("**/*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                found += [f"{file.relative_to(root)} imports {name}" for name in names if name.split(".")[0] in without]
    return found


def circles(root: Path) -> list[str]:
    """The modules that come back to themselves by their imports, each with a way around."""
    known = modules(root)
    graph = {module: set(imports(file, known)) - {module} for module, file in known.items()}
    found = []
    for module in graph:
        ways, seen = [[module]], set()
        while ways:
            way = ways.pop(0)
            for following in sorted(graph[way[-1]]):
                if following == module:
                    found.append(" → ".join([*way, module]))
                    ways.clear()
                    break
                if following not in seen:
                    seen.add(following)
                    ways.append([*way, following])
    return found


def test_imports_run_down():
    assert upward_imports(ROOT) == []


def test_every_module_has_a_room_and_every_room_is_there():
    known = modules(ROOT)
    outside = {module for module in known if floor_of(module) is None}
    assert outside == {"jobs"}, "whose __init__ says what the package is"
    assert [room for rooms in FLOORS for room in rooms if room not in known] == []


def test_packages_do_without_what_is_not_theirs():
    assert strangers(ROOT) == []


def test_no_file_comes_back_to_itself():
    assert circles(ROOT) == []


def test_an_import_upwards_is_told_by_both_names(tmp_path):
    """Of a house with one floor's file that knows a floor above, by an import inside a function."""
    for name, text in (("jobs/dataset/keys.py", ""), ("jobs/driver/run.py", "import jobs.dataset.keys\n")):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert upward_imports(tmp_path) == circles(tmp_path) == []

    (tmp_path / "jobs/dataset/keys.py").write_text("def read():\n    from jobs.driver import run\n    run\n")
    assert upward_imports(tmp_path) == ["jobs.dataset.keys imports jobs.driver.run, which is above it"]
    assert "jobs.dataset.keys → jobs.driver.run → jobs.dataset.keys" in circles(tmp_path)
