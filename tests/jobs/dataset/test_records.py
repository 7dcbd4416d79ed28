"""Seeds and file names: the same for ever, and safe whatever an id holds."""

import re
import string

import pyarrow as pa
import pytest

from jobs.dataset.records import RECORD, file_name, image_seed, metadata_schema, record_schema
from manifests.schema import TYPES, is_reserved

HOSTILE = [
    "../../x",
    "..",
    ".",
    "...",
    "",
    "/",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:\\windows",
    "a\nb",
    "a\r\nb",
    "a\0b",
    "\0",
    "a b",
    " a",
    "a.b",
    "a.tar",
    ".hidden",
    "-rf",
    "--",
    "~",
    "~root",
    "$(touch x)",
    "%2e%2e%2f",
    "🦊",
    "🐺",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "ａ",
    "\u202egnp.x",
    "\ud800",
    "<script>",
    "x" * 5000,
    "x" * 4999 + "y",
    "x" * 101,
    "a/b~1",
]


# ---------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize(
    ("run_seed", "prompt_id", "index", "seed"),
    [
        (0, "a", 0, 3434604995308849598),
        (0, "a", 1, 1532760995434174994),
        (1, "a", 0, 1345863221368687012),
        (0, "🦊\n\"'", 0, 5810105938480463912),
        (2**63, "x" * 5000, 9999, 736876713667435170),
    ],
)
def test_the_seed_of_an_image_never_changes(run_seed, prompt_id, index, seed):
    """A change here would make every run that goes on mix two sets of images. Values of coreutils' b2sum."""
    assert image_seed(run_seed, prompt_id, index, None) == seed


def test_seeds_differ_by_run_prompt_and_image_and_fit_a_column():
    seeds = {
        image_seed(run_seed, f"id-{number}", index, None)
        for run_seed in (0, 1)
        for number in range(500)
        for index in range(4)
    }
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # What separates the parts cannot be moved between them.
    assert image_seed(1, "1", 1, None) != image_seed(11, "", 1, None) != image_seed(1, "", 11, None)


def test_a_rows_own_seed_is_counted_up_and_nothing_else_matters():
    assert [image_seed(7, "a", index, 40) for index in range(3)] == [40, 41, 42]
    assert image_seed(8, "b", 2, 40) == 42
    assert image_seed(0, "a", 1, 2**63 - 1) == 0


# ----------------------------------------------------------------------------------------------------- file names


@pytest.mark.parametrize("prompt_id", HOSTILE, ids=lambda value: ascii(value)[:20])
def test_an_id_that_could_be_more_than_a_name_becomes_a_harmless_one(prompt_id):
    name = file_name(prompt_id, 3, "png")
    assert re.fullmatch(r"[A-Za-z0-9~_-]+\.png", name)
    assert name.endswith("-3.png")
    assert not name.startswith(("-", "~"))
    assert len(name) <= 80


def test_no_two_images_share_a_name():
    plain = [*string.ascii_letters, *string.digits, "a-0", "a-0-0", "a_b", "id", "id-1", "x" * 100]
    ids = HOSTILE + plain
    names = {file_name(prompt_id, index, "png") for prompt_id in ids for index in range(12)}
    assert len(names) == 12 * len(set(ids))
    # An id that looks like a replaced one is replaced itself.
    assert file_name(file_name("a/b", 0, "png").removesuffix("-0.png"), 0, "png") != file_name("a/b", 0, "png")


def test_a_plain_id_is_its_own_name():
    assert file_name("COCO_val2014-000000391895", 12, "webp") == "COCO_val2014-000000391895-12.webp"
    assert file_name("x" * 100, 0, "jpg") == "x" * 100 + "-0.jpg"


def test_a_replaced_name_still_says_what_it_was():
    assert file_name("cats/tabby 1.txt", 0, "png").startswith("cats-tabby-1-txt~")


# -------------------------------------------------------------------------------------------------------- columns


def test_a_carried_column_cannot_take_the_name_of_one_of_ours():
    names = set(metadata_schema(record_schema([pa.field("quality_entropy", pa.float64())], [])).names)
    assert {name for name in names - TYPES.keys() if not is_reserved(name)} == set()
    assert names >= set(RECORD.names)
