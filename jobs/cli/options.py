"""Arguments and options that several commands have, each worded once."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.open_storage import open_storage
from cluster.storage import S3Options, Storage

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="Checkpoint: a folder, a hub id such as showlab/show-o2-1.5B, or 'embedded', the built-in one."
    ),
]
VaeOption = Annotated[
    str | None,
    typer.Option("--vae", help="Wan 2.1 VAE: a file, folder or hub id.", show_default="beside the model, else the hub"),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Tokenizer: a folder or hub id.", show_default="beside the model, else the hub"),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="bfloat16, float32, or float8: bfloat16 with FFNs in float8.",
        show_default="bfloat16 on CUDA, else float32",
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu, …", show_default="CUDA if there is one")]
VariantOption = Annotated[
    str | None,
    typer.Option(help="Variant of the weights, as in pytorch_model.VARIANT.bin.", show_default="the one there is"),
]
SizeOption = Annotated[
    str | None, typer.Option(help="Pixels per side, or WIDTHxHEIGHT; multiples of 16.", show_default="the model's own")
]
ConfigArgument = Annotated[
    str, typer.Argument(help="A YAML file, or a built-in config such as demo.", metavar="CONFIG")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Settings on top, as in sampling.seed=1.", metavar="[KEY=VALUE]…")
]
RunArgument = Annotated[str, typer.Argument(help="A run's folder, local or s3://…", metavar="RUN")]
EndpointOption = Annotated[str | None, typer.Option(help="Of an S3 server that is not Amazon's.")]
RegionOption = Annotated[str | None, typer.Option(help="S3 region.")]
PathStyleOption = Annotated[bool, typer.Option("--path-style", help="Address buckets as http://host/bucket.")]


def open_run(run: str, endpoint_url: str | None, region: str | None, path_style: bool) -> Storage:
    """The storage that a run's folder is in."""
    return open_storage(run, S3Options(endpoint_url, region, path_style))
