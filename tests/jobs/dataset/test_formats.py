"""Output formats: written twice they are the same bytes, and the tools that people load them with open them."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.open_storage import open_storage
from flashu.errors import InputError
from jobs.dataset.formats import FORMATS
from jobs.dataset.images import ImageEncoder
from jobs.dataset.records import EncodedImage, file_name, record_schema

CARRIED = [
    pa.field("source", pa.string()),
    pa.field("score", pa.float64()),
    pa.field("tags", pa.list_(pa.string())),
    pa.field("box", pa.struct([("x", pa.int64()), ("y", pa.int64())])),
]
SCHEMA = record_schema([pa.field("quality_entropy", pa.float64())], CARRIED)
IDS = ["fox", "../../x", "🦊", "a.b/c"]


def picture(number, size=(32, 48)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def images(suffix="png", ids=IDS):
    made = []
    for number, prompt_id in enumerate(ids):
        record = dict.fromkeys(SCHEMA.names)
        record |= {
            "prompt_id": prompt_id,
            "prompt": f"prompt {number}: <b>é\n🦊</b>",
            "image_index": 0,
            "seed": 2**63 - 1 - number,
            "file_name": file_name(prompt_id, 0, suffix),
            "quality_entropy": 0.5,
            "source": None if number else "web",
            "score": number / 3,
            "tags": ["a", "b"][:number],
            "box": {"x": number, "y": 2},
        }
        encoder = ImageEncoder({"jpg": "jpeg"}.get(suffix, suffix))
        made.append(EncodedImage(encoder.encode(picture(number)), record))
    return made


@pytest.fixture
def written(tmp_path):
    """Shard 42 in this format below `tmp_path`: its files and their bytes."""
    storage = open_storage(str(tmp_path))

    def write(format_, made):
        FORMATS[format_].write(storage, 42, made, SCHEMA)
        return {key: storage.get(key) for key in storage.list("data/")}

    return write


@pytest.mark.parametrize("format_", FORMATS)
def test_a_shard_written_twice_is_the_same_bytes(written, format_):
    first = written(format_, images())
    assert first
    assert written(format_, images()) == first


@pytest.mark.parametrize("format_", FORMATS)
def test_nothing_stays_of_an_attempt_that_made_other_images(written, format_):
    alone = written(format_, images(ids=IDS[1:2]))
    assert written(format_, images()) != alone
    assert written(format_, images(ids=IDS[1:2])) == alone
    assert written(format_, []) == {}


@pytest.mark.parametrize("format_", FORMATS)
def test_a_shard_without_images_has_no_files(written, format_):
    assert written(format_, []) == {}


def test_parquet_loads_as_a_dataset_of_images_with_every_column(written, tmp_path):
    import datasets

    made = images()
    assert list(written("parquet", made)) == ["data/shard-00042.parquet"]
    dataset = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "data/*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(dataset.features["image"], datasets.Image)
    assert dataset.column_names == ["image", *SCHEMA.names]
    for number, (row, image) in enumerate(zip(dataset, made, strict=True)):
        assert np.array_equal(row.pop("image"), picture(number))
        assert row == image.record


def test_parquet_can_be_read_a_few_images_at_a_time(written, tmp_path):
    written("parquet", images(ids=[str(number) for number in range(40)]))
    assert pq.ParquetFile(tmp_path / "data/shard-00042.parquet").num_row_groups == 3


def test_webdataset_opens_with_its_own_package(written, tmp_path):
    import webdataset

    made = images("jpg")
    assert list(written("webdataset", made)) == ["data/shard-00042.tar"]
    samples = webdataset.WebDataset(str(tmp_path / "data/shard-00042.tar"), shardshuffle=False, empty_check=False)
    for sample, image in zip(samples.decode("pil"), made, strict=True):
        assert sample["json"] == image.record
        assert sample["txt"] == image.record["prompt"]
        assert sample["jpg"].size == (32, 48)
        assert f"{sample['__key__']}.jpg" == image.record["file_name"]


def test_webdataset_opens_with_datasets(written, tmp_path):
    import datasets

    made = images("webp")
    written("webdataset", made)
    dataset = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "data/*.tar"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row["json"]["prompt_id"] for row in dataset] == IDS
    assert [row["txt"] for row in dataset] == [image.record["prompt"] for image in made]
    assert all(row["webp"].size == (32, 48) for row in dataset)


def test_a_tar_holds_names_that_stay_in_their_folder(written):
    (data,) = written("webdataset", images()).values()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    assert all("/" not in member.name and member.isfile() and member.mode == 0o644 for member in members)
    assert all(member.name.count(".") == 1 for member in members)
    assert len({member.name for member in members}) == 3 * len(IDS)


def test_a_record_in_a_tar_is_json_whatever_its_numbers_are(written):
    made = images(ids=IDS[:1])
    made[0].record.update({"score": float("nan"), "box": {"x": [1.5, float("-inf")], "y": 2}})
    (data,) = written("webdataset", made).values()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        text = tar.extractfile("fox-0.json").read()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse)["box"] == {"x": [1.5, None], "y": 2}


def test_files_land_in_a_folder_for_their_shard(written):
    made = images()
    assert written("files", made) == {f"data/00042/{image.record['file_name']}": image.data for image in made}


# ------------------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize(("form", "suffix"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_the_same_pixels_are_the_same_bytes(form, suffix):
    encoder = ImageEncoder(form)
    noted = picture(0)
    noted.info = {"prompt": "a fox", "seed": 1}
    data = encoder.encode(noted)
    assert encoder.suffix == suffix
    assert data == encoder.encode(picture(0))
    opened = Image.open(io.BytesIO(data))
    assert (opened.format, opened.size) == (form.upper(), (32, 48))


def test_png_and_the_best_webp_lose_nothing():
    for encoder in (ImageEncoder("png"), ImageEncoder("webp", 100)):
        assert np.array_equal(Image.open(io.BytesIO(encoder.encode(picture(0)))), picture(0))


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_less_quality_takes_less_room(form):
    sizes = [len(ImageEncoder(form, quality).encode(picture(0))) for quality in (10, 60, 95)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("gif",), "output.image_format is 'gif'; choose one of: png, jpeg, webp"),
        (("jpg",), "output.image_format is 'jpg'; choose one of: png, jpeg, webp"),
        (("jpeg", 0), "output.quality is 0; it goes from 1 to 100"),
        (("jpeg", 101), "output.quality is 101; it goes from 1 to 100"),
    ],
)
def test_what_cannot_be_encoded_is_refused(settings, told):
    with pytest.raises(InputError) as error:
        ImageEncoder(*settings)
    assert str(error.value) == told
