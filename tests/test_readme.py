"""Every Python snippet of the README runs as it is written, one after the other, and shows pictures."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_snippets_run_in_order_and_make_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the snippets save to
    names = {}
    pictures = 0
    for snippet in SNIPPETS:
        names.pop("images", None)
        exec(compile(snippet, "README.md", "exec"), names)
        images = names.get("images", [])
        assert all(image.size == (128, 128) for image in images)
        pictures += len(images)
    assert pictures == 2 + 1 + 1 + 2 + 1
    assert names["fast_config"].r_p == 0.30
    assert names["quality_config"].tau == 15
    assert names["model"].acceleration is None, "the last snippet reverts to the baseline"
