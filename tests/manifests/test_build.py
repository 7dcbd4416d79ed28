"""Building manifests from every kind of source: what is in them, what is refused, and what it costs in memory."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.build import build
from manifests.errors import ManifestError
from manifests.plan import Manifest


@pytest.fixture
def source(tmp_path):
    """Writes a source; returns its path."""

    def write(name, content):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".gz"):
            content = gzip.compress(content.encode())
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(file)

    return write


def rows_of(path):
    manifest = Manifest.open(str(path), shard_size=10_000)
    return [row for shard in range(manifest.num_shards) for row in manifest.read(shard).to_pylist()]


@pytest.fixture
def built(tmp_path):
    """Builds a manifest and returns its rows."""

    def run(*sources, **options):
        build(sources, str(tmp_path / "built"), force=True, **options)
        return rows_of(tmp_path / "built")

    return run


def test_text_is_a_prompt_a_line(source, built):
    path = source(
        "a.txt", "\ufeffa red circle\n\n  \r\n  two blue squares \r\nwith \u2028 inside\x0b\nno newline at the end"
    )
    assert [row["prompt"] for row in built(path)] == [
        "a red circle",
        "two blue squares",
        "with \u2028 inside",
        "no newline at the end",
    ]


def test_all_formats_of_the_same_prompts_give_the_same_ids(source, built, write):
    prompts = ["a red circle", 'with "quotes", and commas']
    paths = [
        source("a.txt", "\n".join(prompts)),
        source("a.txt.gz", "\n".join(prompts)),
        source("a.csv", 'prompt\na red circle\n"with ""quotes"", and commas"\n'),
        source("a.tsv", 'prompt\tseed\na red circle\t\n"with ""quotes"", and commas"\t\n'),
        source("a.jsonl", "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts) + "\n\n"),
        source("a.ndjson.gz", "\n".join(json.dumps(prompt) for prompt in prompts)),
        source("a.json", json.dumps(prompts)),
        source("b.json", json.dumps([{"prompt": prompt, "negative_prompt": None} for prompt in prompts])),
        write("a.parquet", {"prompt": prompts}),
        write("b.parquet", {"prompt": pa.array(prompts).dictionary_encode()}),
    ]
    expected = built(paths[0])
    assert all(re.fullmatch("[0-9a-f]{20}", row["prompt_id"]) for row in expected)
    for path in paths[1:]:
        assert [(row["prompt_id"], row["prompt"]) for row in built(path)] == [tuple(row.values()) for row in expected]


def test_an_id_depends_on_all_that_makes_the_image_and_on_nothing_else(source, built):
    lines = [
        {"prompt": "a"},
        {"prompt": "a", "seed": 1},
        {"prompt": "a", "seed": 2},
        {"prompt": "a", "negative_prompt": "b"},
        {"prompt": "a", "guidance_scale": 5, "note": "carried"},
    ]
    rows = built(source("a.jsonl", "\n".join(map(json.dumps, lines))))
    assert len({row["prompt_id"] for row in rows}) == 5
    assert rows[1]["prompt_id"] == built(source("b.csv", "seed,prompt,place\n1,a,elsewhere\n"))[0]["prompt_id"]


def test_columns_are_renamed_converted_and_carried(source, built):
    path = source("a.csv", "key,caption,seed,num_images,guidance_scale,width\n7,a fox,12,,7.5,640\n,a cat, 7.0 ,3,,\n")
    first, second = built(path, columns={"prompt_id": "key", "prompt": "caption", "source_width": "width"})
    assert first == {
        "prompt_id": "7",
        "prompt": "a fox",
        "seed": 12,
        "num_images": None,
        "guidance_scale": 7.5,
        "source_width": "640",
    }
    assert (second["seed"], second["num_images"], second["guidance_scale"]) == (7, 3, None)
    assert len(second["prompt_id"]) == 20


def test_carried_columns_keep_their_types_and_widen_over_files(source, built, write):
    paths = [
        source("a.jsonl", '{"prompt": "a", "score": 1, "tags": ["x"], "meta": {"k": 1}}\n{"prompt": "b"}'),
        source("b.jsonl", '{"prompt": "c", "score": 1.5, "meta": {"l": "m"}, "nothing": null}'),
        write("c.parquet", {"prompt": ["d"], "when": pa.array([0], pa.timestamp("s")), "score": pa.array([2.5])}),
    ]
    rows = built(*paths)
    assert [row["score"] for row in rows] == [1.0, None, 1.5, 2.5]
    assert [row["tags"] for row in rows] == [["x"], None, None, None]
    assert [row["meta"] for row in rows] == [{"k": 1, "l": None}, None, {"k": None, "l": "m"}, None]
    assert rows[3]["when"].year == 1970


def test_hostile_ids_and_prompts_survive_unchanged(source, built, write, hostile):
    table = {"prompt_id": hostile, "prompt": hostile[::-1], "note": hostile}
    expected = pa.table(table).to_pylist()
    lines = "\n".join(map(json.dumps, expected))
    assert built(source("a.jsonl", lines)) == expected
    assert built(write("a.parquet", table)) == expected
    assert built(source("a.json", json.dumps(expected))) == expected
    quoted = "\n".join(",".join('"' + row[name].replace('"', '""') + '"' for name in table) for row in expected)
    assert built(source("a.csv", "prompt_id,prompt,note\n" + quoted)) == expected


def test_folders_and_globs_of_sources(source, built, tmp_path):
    source("in/b.txt", "b")
    source("in/a.jsonl", '"a"')
    source("in/sub/c.csv.gz", "prompt\nc\n")
    source("in/.hidden.txt", "hidden")
    source("in/picture.png", "not a prompt")
    assert [row["prompt"] for row in built(str(tmp_path / "in"))] == ["a", "b", "c"]
    assert [row["prompt"] for row in built(str(tmp_path / "in/*.txt"), str(tmp_path / "in/a*"))] == ["b", "a"]


def test_duplicates_are_reported_with_their_lines_and_nothing_is_written(source, tmp_path):
    paths = [source("a.txt", "a fox\n\na cat\na fox"), source("b.txt", "a dog\na cat\n")]
    with pytest.raises(ManifestError) as error:
        build(paths, str(tmp_path / "m"))
    text = str(error.value).replace(str(tmp_path), "")
    assert text.startswith("2 rows repeat the prompt_id of an earlier row")
    assert "'a fox' at /a.txt:1 and /a.txt:4; 'a cat' at /a.txt:3 and /b.txt:2; --duplicates drop" in text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_dropping_keeps_the_first_of_each(source, tmp_path):
    path = source("a.jsonl", "\n".join(json.dumps({"prompt_id": i % 700, "prompt": f"{i}"}) for i in range(10_000)))
    report = build([path], str(tmp_path / "m"), duplicates="drop", rows_per_file=300)
    assert (report.rows, report.files, report.dropped, report.ids_made) == (700, 3, 9300, 0)
    assert [row["prompt"] for row in rows_of(tmp_path / "m")] == [str(row) for row in range(700)]


def test_row_groups_are_small_and_files_of_the_size_asked_for(source, tmp_path):
    path = source("a.txt", "\n".join(map(str, range(25_000))))
    build([path], str(tmp_path / "m"), rows_per_file=10_000)
    groups = {}
    for file in sorted((tmp_path / "m").iterdir()):
        metadata = pq.read_metadata(file)
        groups[file.name] = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert groups == {
        "part-00000.parquet": [4096, 4096, 1808],
        "part-00001.parquet": [4096, 4096, 1808],
        "part-00002.parquet": [4096, 904],
    }
    assert [row["prompt"] for row in rows_of(tmp_path / "m")] == [str(row) for row in range(25_000)]


def test_the_same_sources_build_the_same_bytes(source, tmp_path):
    path = source("a.txt", "\n".join(map(str, range(5000))))
    for name in ("a.parquet", "new/folder/a.parquet"):
        build([path], str(tmp_path / name))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "new/folder/a.parquet").read_bytes()


def test_nothing_is_overwritten_unless_forced(source, tmp_path):
    path = source("a.txt", "a fox")
    for name in ("m", "m.parquet"):
        target = str(tmp_path / name)
        build([path], target)
        with pytest.raises(ManifestError, match="--force"):
            build([path], target)
        build([source("b.txt", "a cat")], target, force=True)
        assert [row["prompt"] for row in rows_of(target)] == ["a cat"]
    (tmp_path / "m/holiday.jpg").touch()
    with pytest.raises(ManifestError, match=r"m holds holiday.jpg, which is no part"):
        build([path], str(tmp_path / "m"), force=True)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_manifest_can_be_rebuilt_onto_itself(source, tmp_path):
    target = str(tmp_path / "m")
    build([source("a.jsonl", '{"prompt_id": "a", "prompt": "x"}\n{"prompt_id": "b", "prompt": "y"}')], target)
    before = rows_of(target)
    build([target], target, force=True)
    assert rows_of(target) == before


def test_a_destination_that_cannot_be_written_is_told(source, tmp_path):
    path = source("a.txt", "a fox")
    for target in (f"{path}/m", f"{path}/m.parquet"):
        with pytest.raises(ManifestError, match="cannot be written: Not a directory"):
            build([path], target)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".TXT", ".pq", ".json.gz"])
def test_a_destination_that_looks_like_a_file_of_another_kind_is_no_folder(source, tmp_path, suffix):
    path, target = source("a.txt", "a fox"), tmp_path / f"m{suffix}"
    with pytest.raises(ManifestError, match=r"a manifest is not written as \.\w+; name a \.parquet file, or a folder"):
        build([path], str(target))
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt:2: not valid UTF-8 at byte 0"),
        ("a.txt", b"\n \n", "no prompts in there"),
        ("a.csv", "caption,seed\nx,1\n", "a.csv:2: no column prompt; there are seed, caption"),
        ("a.csv", "prompt,prompt\nx,1\n", "the column prompt is there twice"),
        ("a.csv", "prompt,seed\nx,1\n\ny,1,2\n", "a.csv:4: 3 cells, but the header has 2"),
        ("a.csv", 'prompt,seed\n"two\nlines",1\n"open,2\n', "a.csv:4: not valid CSV"),
        ("a.csv", 'prompt,seed\n"two\nlines",x1\n', "a.csv:2: seed must be int64, not 'x1'"),
        ("a.csv", "prompt,seed\nx,-5\n", "a.csv:2: seed must be between 0 and 2^63 - 1"),
        ("a.csv", "prompt\nx\n  \n", "a.csv:3: prompt is empty"),
        ("a.csv", "prompt,quality_x\nx,1\n", "named quality_x; rename yours with --column new=quality_x"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y"\n', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "a.jsonl:2: no prompt; there are text"),
        ("a.jsonl", '{"prompt": ["x"]}\n', "a.jsonl:1: prompt must be string, not"),
        ("a.jsonl", '{"prompt": "x", "seed": true}', "a.jsonl:1: seed must be int64, not 'True'"),
        ("a.jsonl", '{"prompt": "x", "seed": 1e400}', "seed must be"),
        ("a.jsonl", '{"prompt": "x", "seed": 99999999999999999999}', "seed must be between"),
        ("a.jsonl", '{"prompt": "x", "num_images": 0}', "a.jsonl:1: num_images must be between 1 and 10,000"),
        ("a.jsonl", '{"prompt": "x", "guidance_scale": NaN}', "guidance_scale must be a finite number"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "a.jsonl:1: prompt must be string"),
        ("a.jsonl", '{"prompt": "x", "n": 1}\n\n{"prompt": "y", "n": "z"}', "a.jsonl:3: the column n does not fit"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not valid JSON"),
        ("a.json", '{"prompt": "x"}', "must hold a list of objects or of prompts, not dict"),
        ("a.json", '["x", 5]', "a.json, item 1: must be an object or a prompt, not int"),
        ("a.json", "[", "a.json: not valid JSON"),
        ("a.parquet", b"PAR1 nothing PAR1", "a.parquet cannot be read"),
        ("a.docx", "x", "a.docx: prompts are read from .txt, .csv"),
        ("a.txt.gz", "x", None),
    ],
)
def test_bad_input_is_told_with_its_file_and_line(source, tmp_path, name, content, problem):
    path = source(name, content)
    if problem is None:  # a compressed file cut short
        path, problem = source("cut.txt.zst", Path(path).read_bytes()[:-3]), "cut.txt.zst cannot be read"
    with pytest.raises(ManifestError) as error:
        build([path], str(tmp_path / "m"))
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m").exists()


def test_a_mapping_that_names_no_column_is_refused(source, tmp_path):
    for path in (source("a.csv", "prompt,x\na,b\n"), source("a.jsonl", '{"prompt": "x"}')):
        with pytest.raises(ManifestError, match=r"no column sead, named in the column mapping"):
            build([path], str(tmp_path / "m"), columns={"seed": "sead"})


def test_sources_that_change_between_the_passes_are_refused(source, tmp_path):
    path = source("a.txt", "a\nb\nc\n")
    seen = []

    def change(rows):
        seen.append(rows)
        if len(seen) == 1:
            source("a.txt", "a\nb\nd\n")

    with pytest.raises(ManifestError, match="changed while they were read"):
        build([path], str(tmp_path / "m"), on_rows=change)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


BUILD = """
import re, sys
from pathlib import Path
from manifests.build import build
report = build([sys.argv[1]], sys.argv[2], duplicates="drop")
peak = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())
print(report.rows, report.dropped, int(peak[1]) // 1000)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_rows(source, tmp_path):
    style = " in the style of a very long proof" * 12

    def measure(rows):
        text = "".join(f"a photograph of number {row % (rows - 5)}{style}\n" for row in range(rows))
        command = [sys.executable, "-c", BUILD, source(f"{rows}.txt", text), str(tmp_path / f"{rows}.parquet")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    rows, dropped, small = measure(20_000)
    assert (rows, dropped) == (19_995, 5)
    rows, dropped, large = measure(200_000)
    assert (rows, dropped) == (199_995, 5)
    # The sources have 9 and 90 MB. Of all rows, only 16 bytes for each id stay in memory, and some 60 while compared.
    assert large < small + 50
