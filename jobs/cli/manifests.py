"""The commands about prompts: `flashu manifest build`, `dpg`, `geneval`, `check`, `show`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manifests.errors import ManifestError, printable, quoted

if TYPE_CHECKING:
    from collections.abc import Callable

    from manifests.build import BuildReport
    from manifests.plan import Check, Manifest

app = typer.Typer(no_args_is_help=True, help="Prompts in Parquet: build a manifest, check it, look into it.")

DestinationOption = Annotated[
    str, typer.Option("--output", "-o", metavar="DST", help="A .parquet file, or a folder; local or s3://.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
EndpointOption = Annotated[
    str | None, typer.Option(help="Another S3 server, as http://host:port.", show_default="AWS_ENDPOINT_URL, or AWS")
]
RegionOption = Annotated[str | None, typer.Option(help="The S3 region.", show_default="AWS_REGION, or the bucket's")]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="OURS=THEIRS", help="Rename a column, as prompt=caption. May be repeated."),
]
NumImagesOption = Annotated[int, typer.Option(help="Images of each prompt.")]
PathArgument = Annotated[str, typer.Argument(metavar="PATH", help="A Parquet file, folder or glob; local or s3://.")]
ShardSizeOption = Annotated[int, typer.Option(help="Rows in a shard.")]


@app.command()
def build(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC…", help="Files, folders or globs; local or s3://.", show_default=False)
    ],
    output: DestinationOption,
    column: ColumnOption = None,
    duplicates: Annotated[
        str, typer.Option(help="Prompt ids that occur twice. report: an error; drop: the first of each is kept.")
    ] = "report",
    rows_per_file: Annotated[int, typer.Option(help="In a folder: rows in each file.")] = 1_000_000,
    force: ForceOption = False,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Build a manifest from .txt (a prompt a line), .csv, .tsv, .jsonl, .json or .parquet; text also as .gz.

    The columns prompt_id, prompt, negative_prompt, seed, num_images and guidance_scale mean something to a run; all
    others are carried to its output. Rows without a prompt_id get one made of their text. Reads the sources twice, in
    memory that does not grow with them (but for .json, which must fit).
    """
    from manifests.build import build as build_manifest

    with _counting("rows, in two passes") as on_rows:
        report = build_manifest(
            sources,
            output,
            columns=_columns(column),
            duplicates=duplicates,
            rows_per_file=rows_per_file,
            force=force,
            endpoint_url=endpoint_url,
            region=region,
            on_rows=on_rows,
        )
    _print_report(output, report)


@app.command()
def dpg(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="DPG-Bench's folder of .txt prompts, or dpg_bench_meta_data.json.")
    ],
    output: DestinationOption,
    num_images: NumImagesOption = 4,
    force: ForceOption = False,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Build a manifest of DPG-Bench's prompts; their file names become the ids."""
    from manifests.importers import DPG_PROMPTS, build_dpg

    report = build_dpg(source, output, num_images=num_images, force=force, endpoint_url=endpoint_url, region=region)
    _print_report(output, report, DPG_PROMPTS)


@app.command()
def geneval(
    source: Annotated[str, typer.Argument(metavar="SRC", help="GenEval's evaluation_metadata.jsonl; local or s3://.")],
    output: DestinationOption,
    num_images: NumImagesOption = 4,
    force: ForceOption = False,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Build a manifest of GenEval's prompts; line numbers become the ids, and each line goes with its images."""
    from manifests.importers import GENEVAL_PROMPTS, build_geneval

    report = build_geneval(source, output, num_images=num_images, force=force, endpoint_url=endpoint_url, region=region)
    _print_report(output, report, GENEVAL_PROMPTS)


@app.command()
def check(
    path: PathArgument,
    shard_size: ShardSizeOption = 64,
    column: ColumnOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Read every row; say what is in the manifest, and what is wrong with it. Exits with 1 if anything is."""
    from manifests.plan import check as check_rows

    manifest = _open(path, column, shard_size=shard_size, endpoint_url=endpoint_url, region=region)
    with _counting("rows", manifest.num_rows) as on_rows:
        found = check_rows(manifest, on_rows)
    _print_check(manifest, found)
    if found.problem_count:
        raise typer.Exit(1)


@app.command()
def show(
    path: PathArgument,
    rows: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 10,
    column: ColumnOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
) -> None:
    """Print the first rows as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    manifest = _open(path, column, shard_size=rows, limit=rows, endpoint_url=endpoint_url, region=region)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in manifest.schema.names:
        table.add_column(Text(printable(name)))
    for _, batch in manifest.batches(size=rows):
        for row in batch.to_pylist():
            table.add_row(*(Text(printable(value)) for value in row.values()))  # a prompt's [brackets] are no markup
    Console().print(table)


def _open(path: str, column: list[str] | None, **options: Any) -> Manifest:
    """A manifest to be looked at, whatever is wrong with its rows."""
    from manifests.plan import Manifest

    return Manifest.open(path, columns=_columns(column), allow_nulls=True, **options)


def _columns(options: list[str] | None) -> dict[str, str]:
    """`--column` options as {our name: their name}."""
    columns: dict[str, str] = {}
    for option in options or []:
        ours, equals, theirs = option.partition("=")
        if not (ours and equals and theirs):
            raise ManifestError(f"--column {quoted(option)}: must be OURS=THEIRS, as in prompt=caption")
        if ours in columns:
            raise ManifestError(f"--column {quoted(option)}: {ours} was given before")
        if theirs in columns.values():
            raise ManifestError(f"--column {quoted(option)}: {theirs} was given before")
        columns[ours] = theirs
    return columns


def _print_report(output: str, report: BuildReport, official: int | None = None) -> None:
    """`official` is how many prompts the benchmark has that this should be."""
    files = "1 file" if report.files == 1 else f"{report.files:,} files"
    typer.echo(f"{output}: {report.rows:,} rows in {files}; columns {', '.join(report.columns)}")
    if report.ids_made:
        typer.echo(f"{report.ids_made:,} prompt ids made")
    if report.dropped:
        typer.echo(f"{report.dropped:,} duplicates dropped")
    if official not in (None, report.rows):
        typer.echo(f"The official benchmark has {official:,} prompts.")


def _print_check(manifest: Manifest, found: Check) -> None:
    from manifests.plan import LENGTHS

    counts = {"rows": manifest.num_rows, "files": len(manifest.files), "row groups": manifest.num_row_groups}
    counts[f"shards of {manifest.shard_size:,}"] = manifest.num_shards
    if found.images is not None:
        counts["images"] = found.images
    typer.echo(manifest.path)
    for name, count in counts.items():
        typer.echo(f"  {name:<24}{count:>15,}")
    typer.echo("\ncolumns")
    for column in manifest.schema:
        carried = "  carried" if column.name in manifest.carried else ""
        typer.echo(f"  {printable(column.name):<24}{printable(column.type):>15}{carried}")
    typer.echo(f"\nprompt length in characters (the longest has {found.longest:,})")
    most = max(*found.lengths, 1)
    for start, end, count in zip(LENGTHS, (*LENGTHS[1:], None), found.lengths, strict=True):
        if count or start <= found.longest:
            label = f"{start:,}-{end - 1:,}" if end else f"{start:,} and more"
            typer.echo(f"  {label:<24}{count:>15,}  {'█' * round(40 * count / most)}")
    typer.echo(f"\n{found.problem_count:,} problems" if found.problem_count else "\nno problems")
    for where, what in found.problems:
        typer.echo(f"  {printable(where, 300)}: {what}")
    if found.problem_count > len(found.problems):
        typer.echo(f"  and {found.problem_count - len(found.problems):,} more")


@contextmanager
def _counting(unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A count of rows on a terminal; nothing in a log."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", unit_scale=True, disable=None, leave=False) as bar:
        yield bar.update
