"""GenEval as a manifest, from a file like its evaluation_metadata.jsonl."""

import json

import pytest

from manifests.errors import ManifestError
from manifests.importers import build_geneval
from manifests.plan import Manifest
from tests.command import assert_refused, flashu

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a tie right of a dog",
    },
    {"tag": "color_attr", "include": [{"class": "café 🦊", "count": 1}], "prompt": "a photo of a bench", "seed": "x"},
]


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="evaluation_metadata.jsonl"):
        texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        (tmp_path / name).write_text("".join(text + "\n" for text in texts))
        return str(tmp_path / name)

    return write


def rows_of(path):
    return Manifest.open(str(path), shard_size=5000).read(0).to_pylist()


def test_each_line_becomes_a_row_named_by_its_number_that_holds_the_line(write, tmp_path):
    report = build_geneval(write(*LINES), str(tmp_path / "m.parquet"))
    rows = rows_of(tmp_path / "m.parquet")
    assert [row["prompt_id"] for row in rows] == ["00000", "00001", "00002", "00003"]
    assert [row["prompt"] for row in rows] == [line["prompt"] for line in LINES]  # one of them twice
    assert [json.loads(row["geneval"]) for row in rows] == LINES
    assert all(row["geneval"].isascii() for row in rows)
    assert all(row.keys() == {"prompt_id", "prompt", "num_images", "geneval"} for row in rows)
    assert {row["num_images"] for row in rows} == {4}
    assert (report.rows, report.ids_made) == (4, 0)


def test_an_empty_line_is_passed_over_and_counted(write, tmp_path):
    build_geneval(write(LINES[0], "", *LINES[1:], "  "), str(tmp_path / "m.parquet"))
    assert [row["prompt_id"] for row in rows_of(tmp_path / "m.parquet")] == ["00000", "00002", "00003", "00004"]


def test_the_command_says_what_it_wrote_and_takes_the_number_of_images(write, tmp_path):
    outcome = flashu("manifest", "geneval", write(*LINES), "-o", tmp_path / "m.parquet", "--num-images", 2)
    assert outcome.code == 0, outcome
    assert "m.parquet: 4 rows in 1 file; columns prompt_id, prompt, num_images, geneval" in outcome.out
    assert "The official benchmark has 553 prompts." in outcome.out
    assert {row["num_images"] for row in rows_of(tmp_path / "m.parquet")} == {2}
    assert flashu("manifest", "check", tmp_path / "m.parquet").code == 0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a photo of a bench", ":2: not valid JSON"),
        ("[1]", ":2: must be an object, not list"),
        ({"tag": "colors", "include": []}, ":2: no prompt; there are tag, include"),
        ({"tag": "colors", "prompt": "x"}, ":2: no include; there are tag, prompt"),
        ({"include": [], "prompt": "x"}, ":2: no tag; there are include, prompt"),
        ({"tag": 1, "include": [], "prompt": "x"}, ":2: tag must be text, not int"),
        ({"tag": "colors", "include": ["cat"], "prompt": "x"}, ":2: include must be a list of objects, each with"),
        ({"tag": "colors", "include": [{"class": "cat"}], "prompt": "x"}, ":2: include must be a list of objects"),
        ({"tag": "colors", "include": [], "exclude": {}, "prompt": "x"}, ":2: exclude must be a list of objects"),
        ({"tag": "colors", "include": [], "prompt": " "}, ":2: prompt is empty"),
        ({"tag": "colors", "include": [], "prompt": 5}, ":2: prompt must be string, not '5'"),
        ('{"tag": "colors", "include": [], "prompt": "\\ud800"}', ":2: prompt must be string"),
    ],
)
def test_a_line_that_the_evaluator_could_not_use_is_named_and_nothing_is_written(write, tmp_path, line, told):
    outcome = flashu("manifest", "geneval", write(LINES[0], line), "-o", tmp_path / "m.parquet")
    assert_refused(outcome, "evaluation_metadata.jsonl", told)
    assert not (tmp_path / "m.parquet").exists()


def test_files_that_are_no_benchmark_are_refused(write, tmp_path):
    def refused(source, **options):
        with pytest.raises(ManifestError) as error:
            build_geneval(str(source), str(tmp_path / "m.parquet"), **options)
        return str(error.value)

    file = write(*LINES)
    assert "between 1 and 10,000, not 0" in refused(file, num_images=0)
    assert "between 1 and 10,000, not 10001" in refused(file, num_images=10001)
    assert "no prompts in there" in refused(write(name="empty.jsonl"))
    assert "holds empty.jsonl, evaluation_metadata.jsonl; give one file" in refused(tmp_path)
    assert "nowhere.jsonl does not exist" in refused(tmp_path / "nowhere.jsonl")
