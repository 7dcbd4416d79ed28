"""What CONTRIBUTING.md and the files of CI say is so: paths, names, commits, commands, versions."""

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import flashu

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())
WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

COMMIT = r"`([0-9a-f]{7,40})`"
ELSEWHERE = (".venv/", "s3://", "scores/")  # made by `make`, or in a run's folder
TO_BE_NAMED = re.compile(r"[^/]*(NAME|DATE)[^/]*$")  # what one adds


def named_paths():
    """What the page names of this repository, in text, links and commands."""
    quoted = re.findall(r"`([\w.*\[\]-]*/[\w./*\[\]-]*|\w+\.(?:py|toml|txt|md|yaml|yml))`", TEXT)
    linked = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    commands = re.findall(r"\b(?:tests|benchmarks)/\S+", "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)))
    found = {path for path in (*quoted, *linked, *commands) if not path.startswith(ELSEWHERE)}
    return sorted(TO_BE_NAMED.sub("", path) for path in found)


def test_every_path_that_the_page_names_is_there():
    paths = named_paths()
    assert {".ci/run", "CHANGELOG.md", "benchmarks/results/", "constraints.txt", "tests/jobs/metrics"} <= set(paths)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_function_class_and_constant_that_the_page_names_is_in_the_code():
    names = set(re.findall(r"`@?(_?[A-Za-z]+_\w+|[A-Z]\w+)`", TEXT))
    folders = ("flashu", "cluster", "jobs", "manifests", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py") if file.name != Path(__file__).name]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert {"FORMATS", "OneFilePayload", "images_by_prompt", "_front_matter"} <= names
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


@pytest.fixture
def git():
    """Runs git in this repository's whole history."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")

    def run(*arguments):
        # CI's containers run as another user than the one who made the clone, which git refuses unless told.
        command = ["git", "-c", f"safe.directory={ROOT}", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    top = run(
        "rev-parse", "--show-toplevel"
    ).stdout.strip()  # of an archive that lies in another repository, that one's
    if not top or Path(top).resolve() != ROOT.resolve():
        pytest.skip("not a clone of the repository")
    if run("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        pytest.skip("a shallow clone has no history")
    return run


def test_every_commit_that_the_page_names_is_in_the_history_under_its_subject(git):
    named = dict(re.findall(rf'{COMMIT} "([^"]+)"', TEXT))
    assert len(named) > 5
    assert set(re.findall(COMMIT, TEXT)) == named.keys(), "each is named once with its subject"
    assert {commit: git("log", "-1", "--format=%s", commit, "--").stdout.strip() for commit in named} == named
    strangers = [commit for commit in named if git("merge-base", "--is-ancestor", commit, "HEAD").returncode]
    assert strangers == []


def test_what_page_and_workflow_have_made_are_targets():
    called = re.findall(r"(?:^|`|run: )make ([\w-]+)", PAGE + WORKFLOW, re.MULTILINE)
    assert {"test", "lint", "test-cpus"} <= set(called)
    assert [target for target in called if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)] == []


def test_a_commit_is_linted_by_the_commands_of_make_lint():
    venv = re.search(r"^VENV := (.+)$", MAKEFILE, re.MULTILINE)[1]
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", MAKEFILE, re.MULTILINE)[1]
    commands = [line.strip().replace("$(BIN)", f"{venv}/bin") for line in recipe.splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    assert {(hook["language"], hook["pass_filenames"]) for hook in repository["hooks"]} == {("system", False)}
    assert len(commands) == 3


def test_ci_runs_every_python_that_is_supported_and_each_has_one_pin_of_every_package():
    jobs = yaml.safe_load(WORKFLOW)["jobs"]
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    supported = SpecifierSet(re.search(r'^requires-python = "(.+)"', project, re.MULTILINE)[1])
    minors = [f"3.{minor}" for minor in range(8, 40)]
    oldest = next(version for version in minors if version in supported)
    assert pythons == minors[minors.index(oldest) : minors.index(pythons[-1]) + 1], "from the oldest on, without a gap"

    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").open(encoding="utf-8")]
    pins = defaultdict(list)
    for requirement in map(Requirement, filter(None, lines)):
        pins[requirement.name].append(requirement)
    for name, of_package in pins.items():
        taken = [[pin for pin in of_package if applies(pin, version)] for version in pythons]
        assert all(len(each) == 1 for each in taken) or len(of_package) == 1, f"{name}: one pin on each Python of CI"
        assert [pin for pin in of_package if not any(pin in each for each in taken)] == [], "taken by no Python of CI"


def applies(pin, version):
    return pin.marker is None or pin.marker.evaluate({"python_version": version, "python_full_version": f"{version}.0"})


def test_the_changelog_knows_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"\b{re.escape(flashu.__version__)}\b", changelog)
    assert changelog.index("## Unreleased") == changelog.index("## "), "what comes next stands first"
