"""The S3 server that tests of manifests read from and write to, and prompts that break careless code."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.s3_server import bucket, fault_proxy, s3_environment, s3_server  # noqa: F401 - fixtures

HOSTILE = [
    "../../etc/passwd",
    "a/b",
    "emoji 🦊👩‍👩‍👧",
    "two\nlines\r\nand a tab\t",
    "x" * 5000,
    "<script>alert('x')</script>",
    "'; DROP TABLE prompts; --",
    "right-to-left \u202e and \u2028 separators \x1b[31m",
    "[bold]markup[/bold]",
    " spaces around ",
]


@pytest.fixture
def hostile():
    """Texts for ids and prompts, all different."""
    return HOSTILE


@pytest.fixture
def write(tmp_path):
    """Writes columns as a Parquet file under the test's folder; returns its path."""

    def write(name, columns, **options):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file, **options)
        return str(file)

    return write


def numbered(count, start=0, **more):
    """Columns of `count` plain rows."""
    rows = range(start, start + count)
    return {"prompt_id": [f"id-{row}" for row in rows], "prompt": [f"prompt {row}" for row in rows], **more}
