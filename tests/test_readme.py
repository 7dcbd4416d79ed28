"""Every Python snippet of the README runs as it is written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.split("\n", 1)[0])
def test_snippet_runs_and_makes_images(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the snippets save to
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert all(image.size == (128, 128) for image in names["images"])
