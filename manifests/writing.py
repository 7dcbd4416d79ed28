"""Writing a manifest's Parquet files so that a reader never takes half of them for the whole.

On disk, everything is written under a temporary name and renamed. In S3, each file is one upload, which appears whole
or not at all; a folder's files appear one by one, but each says how many there are, and `Manifest.open` refuses a
folder with fewer. What is in the files is not known here.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from manifests.errors import ManifestError
from manifests.files import look_at, open_filesystem, plain_errors
from manifests.footers import MARK, Mark
from manifests.s3_errors import NO_BUCKET
from manifests.schema import REQUIRED

OTHER_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".pq", ".gz")  # of files, where a folder would be made
ROWS_PER_GROUP = 4096  # small, since a worker that reads a shard decodes whole row groups


@dataclass(frozen=True)
class Destination:
    """A `.parquet` file, or a folder of them."""

    url: str
    filesystem: fs.FileSystem
    path: str
    is_file: bool

    @classmethod
    def of(cls, url: str, sources: Sequence[str], *, force: bool, **place: str | None) -> Destination:
        """Raises where something is that must not be overwritten, or is a source; or where nothing can be written."""
        filesystem, path = open_filesystem(url, **place)
        with plain_errors(url, "written"):
            found = look_at(filesystem, path).type
            suffix = Path(path).suffix.lower()
            if suffix in OTHER_SUFFIXES and found != fs.FileType.Directory:
                raise ManifestError(f"{url}: a manifest is not written as {suffix}; name a .parquet file, or a folder")
            target = cls(url, filesystem, path, is_file=path.endswith(".parquet") and found != fs.FileType.Directory)
            if found == fs.FileType.File:
                if not force:
                    raise ManifestError(f"{url} exists already; --force replaces it")
                if not target.is_file:
                    raise ManifestError(f"{url} is a file; name a folder, or a file that ends in .parquet")
            elif found == fs.FileType.Directory and (files := target.old_files()):
                strange = [file for file in files if not file.endswith(".parquet")]
                if strange:
                    raise ManifestError(
                        f"{url} holds {strange[0]}, which is no part of a manifest; name another folder"
                    )
                if not force:
                    raise ManifestError(f"{url} holds files already; --force replaces them")
            if not target.is_local:
                bucket = path.partition("/")[0]
                if filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
                    raise ManifestError(f"{url} cannot be written: {NO_BUCKET.told()}")
        for source in () if target.is_local else sources:
            # In S3 the old files go before the new ones are written, so no source may be among them.
            fixed, ours = re.split(r"[*?\[]", source)[0].rstrip("/") + "/", url.rstrip("/") + "/"
            if fixed.startswith(ours) or ours.startswith(fixed):
                raise ManifestError(f"{source} and the destination {url} overlap; name another destination")
        return target

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def old_files(self) -> list[str]:
        """What a folder holds, relative to it."""
        listed = self.filesystem.get_file_info(fs.FileSelector(self.path, recursive=True, allow_not_found=True))
        return sorted(item.path[len(self.path) + 1 :] for item in listed if item.type == fs.FileType.File)

    def write(self, tables: Iterable[pa.Table], schema: pa.Schema, *, rows: int, rows_per_file: int, build: str) -> int:
        """Write `rows` rows, `rows_per_file` in each file; the number of files. `build` marks them as one set."""
        rows_per_file = rows if self.is_file else rows_per_file
        count = -(-rows // rows_per_file)
        groups = _groups(tables, rows_per_file)
        with self._staging() as staging:
            for part in range(count):
                name = Path(self.path).name if self.is_file else f"part-{part:05d}.parquet"
                left = min(rows_per_file, rows - part * rows_per_file)
                mark = Mark(build=build, part=part, files=count, rows=left)
                with pq.ParquetWriter(
                    staging / name,
                    schema.with_metadata({MARK: json.dumps(mark)}),
                    compression="zstd",
                    write_statistics=["prompt_id"],  # the least and greatest prompt would only make footers long
                    use_dictionary=[column for column in schema.names if column not in REQUIRED],
                ) as writer:
                    while left:
                        group = next(groups)
                        writer.write_table(group, ROWS_PER_GROUP)
                        left -= len(group)
                if part == count - 1:
                    next(groups, None)  # the last chance for `tables` to raise
                if not self.is_local:
                    key = self.path if self.is_file else f"{self.path}/{name}"
                    fs.copy_files(str(staging / name), key, fs.LocalFileSystem(), self.filesystem)
                    (staging / name).unlink()
            if self.is_local:
                self._rename(staging)
        return count

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """A folder for files that do not count yet: beside a local destination, so that renaming is one step."""
        with plain_errors(self.url, "written"):
            if self.is_local:
                parent, name = os.path.split(self.path)
                staging = Path(parent) / f".{name[:100]}.{secrets.token_hex(4)}.part"
                staging.mkdir(parents=True)
            else:
                staging = Path(tempfile.mkdtemp(prefix="flashu-manifest-"))
                if not self.is_file:
                    for file in self.old_files():
                        self.filesystem.delete_file(f"{self.path}/{file}")
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _rename(self, staging: Path) -> None:
        if self.is_file:
            os.replace(staging / Path(self.path).name, self.path)
            return
        if os.path.isdir(self.path):
            os.rename(self.path, staging.with_suffix(".old"))
        os.rename(staging, self.path)
        shutil.rmtree(staging.with_suffix(".old"), ignore_errors=True)


def _groups(tables: Iterable[pa.Table], rows_per_file: int) -> Iterator[pa.Table]:
    """The same rows as row groups of equal size; the last of each file is what is left."""
    waiting: list[pa.Table] = []
    held = in_file = 0
    for table in tables:
        waiting.append(table)
        held += len(table)
        while held >= (size := min(ROWS_PER_GROUP, rows_per_file - in_file)):
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, size)
            waiting, held = [joined.slice(size)], held - size
            in_file = (in_file + size) % rows_per_file
    if held:
        yield pa.concat_tables(waiting)
