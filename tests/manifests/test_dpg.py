"""DPG-Bench as a manifest, from the folder of prompts and from the JSON."""

import json

import pytest

from manifests.errors import ManifestError
from manifests.importers import build_dpg
from manifests.plan import Manifest

PROMPTS = {"whoops3": "A fox, reading.", "countbench27": "Seven bottles.", "partiprompts0": "An owl 🦉"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name, prompt in PROMPTS.items():
        (tmp_path / f"prompts/{name}.txt").write_text(prompt + "\n")
    return tmp_path / "prompts"


def rows_of(path):
    return Manifest.open(str(path), shard_size=5000).read(0).to_pylist()


def test_folder_and_json_give_the_same_rows(tmp_path, folder):
    items = [{"prompt": prompt, "prompt_file_name": name} for name, prompt in PROMPTS.items()]
    items[0]["prompt_file_name"] += ".txt"
    (tmp_path / "meta.json").write_text(json.dumps(items))
    build_dpg(str(tmp_path / "meta.json"), str(tmp_path / "a.parquet"))
    report = build_dpg(str(folder), str(tmp_path / "b.parquet"))
    expected = [{"prompt_id": name, "prompt": prompt, "num_images": 4} for name, prompt in PROMPTS.items()]
    assert rows_of(tmp_path / "a.parquet") == expected
    assert rows_of(tmp_path / "b.parquet") == sorted(expected, key=lambda row: row["prompt_id"])
    assert (report.rows, report.ids_made) == (3, 0)


def test_the_number_of_images_is_a_setting(tmp_path, folder):
    build_dpg(str(folder), str(tmp_path / "a.parquet"), num_images=1)
    assert {row["num_images"] for row in rows_of(tmp_path / "a.parquet")} == {1}


def test_bad_benchmarks_are_refused(tmp_path, folder):
    def refused(source, **options):
        with pytest.raises(ManifestError) as error:
            build_dpg(str(source), str(tmp_path / "m"), **options)
        return str(error.value)

    assert "at least 1, not 0" in refused(folder, num_images=0)
    (folder / "empty.txt").touch()
    assert "empty.txt: the prompt is empty" in refused(folder)
    (folder / "empty.txt").write_bytes(b"\xff")
    assert "empty.txt: not valid UTF-8" in refused(folder)
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "meta.json").write_text('[{"prompt": "x"}]')
    assert "no column prompt_file_name" in refused(tmp_path / "meta.json")
