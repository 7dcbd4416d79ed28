"""Every Python snippet of the README runs as it is written, one after the other, and shows pictures.

The snippets name the released model. It is not to be had here, so a folder of that name stands in for it: the embedded
model, as `flashu convert` would write it. Where there is no GPU, `.cuda()` does nothing.
"""

import re
from pathlib import Path

import pytest
import torch

from flashu import TextToImagePipeline

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.fixture
def released_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the snippets look for the model, and save to
    TextToImagePipeline.from_pretrained("embedded", device="cpu").save_pretrained("showlab/show-o2-1.5B")
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.nn.Module, "cuda", lambda module: module)


@pytest.mark.usefixtures("released_model")
def test_snippets_run_in_order_and_make_images():
    names = {}
    made = []
    for snippet in SNIPPETS:
        names.pop("images", None)
        exec(compile(snippet, "README.md", "exec"), names)
        made.append([image.size for image in names.get("images", [])])
    size = (64, 64)
    assert made == [[size] * 2, [size], [], [size] * 2, [size] * 2, [], []]
    assert [type(answer) for answer in (names["answer"], *names["answers"])] == [str, str, list]
    assert len(names["probabilities"]) == 2
    assert names["config"].total_steps == 32
    assert names["fast_config"].r_p == 0.30
    assert names["quality_config"].tau == 15
    assert names["model"].acceleration is None, "the last snippet reverts to the baseline"
