"""What a run is told: the sections of a config file, as OmegaConf structured configs, and reading one.

Settings are checked for their names and types here and in `config_text`, for what they mean in `checks`, for what they
name in `inputs`. OmegaConf and YAML are imported when a config is read: `flashu --help` reads none.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional, TypeVar

from cluster.storage import S3Options
from flashu.config import preset_for
from flashu.errors import InputError
from jobs.settings.config_text import check_overrides, merge, read_file, read_override
from manifests import PARQUET
from manifests.urls import holds_credentials

BUILT_IN = Path(__file__).parent / "configs"
AUTO = "auto"
BASELINE, FLASHU = "baseline", "flashu"  # the arms of a comparison

# OmegaConf reads these annotations at run time, where Python 3.10 knows `X | None` but not every OmegaConf does.
# ruff: noqa: UP045


@dataclass
class ModelSection:
    path: str = "embedded"  # folder, hub id, s3:// folder, or "embedded", the built-in model
    variant: Optional[str] = None  # of the weights, as in pytorch_model.bf16.bin; one that is there alone is found
    vae: Optional[str] = None  # beside the model, else the hub
    tokenizer: Optional[str] = None  # beside the model, else the hub
    dtype: Optional[str] = None  # bfloat16 on CUDA, else float32; float8: see default.yaml
    compile: str = AUTO  # on CUDA; or off; or max, which tries more kernels, and takes minutes
    cache_dir: Optional[str] = None  # where a node keeps s3:// checkpoints; ~/.cache/flashu


@dataclass
class FlashUSection:
    preset: str = AUTO  # the one for the model; or paper-1.5b, few-steps, …; "off" for stock Show-o2
    r_p: Optional[float] = None  # here and below: null is the preset's value
    head_prune_ratio: Optional[float] = None
    r_LS: Optional[float] = None  # noqa: N815 - the paper's name
    T_LS: Optional[int] = None  # -1 for off
    T_cache: Optional[int] = None  # -1 for off
    tau: Optional[int] = None
    schedule: Any = None  # [[steps, guidance scale], …]; [] for sampling.guidance_scale throughout
    solver_order: Optional[int] = None  # 1: Euler; 2: Adams-Bashforth
    num_inference_steps: Optional[int] = None  # goes before sampling.num_inference_steps, where FlashU is on
    scores: Optional[str] = None  # of `flashu calibrate`; null measures them once, into the run's folder
    calibration: Optional[str] = None  # how they are measured: trajectories, which is null, or release


@dataclass
class SamplingSection:
    num_inference_steps: Optional[int] = None  # 50, or what FlashU is set to
    guidance_scale: Optional[float] = None  # the model's own, 7.5 for the released ones, or what FlashU's schedule says
    time_shift: Optional[float] = 3.0
    size: Any = None  # pixels per side, or WIDTHxHEIGHT; null is the model's own
    num_images: int = 1  # per prompt
    seed: int = 0
    negative_prompt: str = ""
    batch_size: Any = AUTO  # images at once


@dataclass
class ManifestSection:
    path: str = ""  # Parquet file, folder or glob of them, local or s3://; or "demo", the built-in one
    shard_size: int = 64  # prompts that are generated and committed together
    limit: Optional[int] = None  # the first so many prompts only
    columns: dict[str, str] = field(default_factory=dict)  # our name: theirs
    check_ids: bool = True  # look for duplicate ids first, unless `flashu manifest build` did


@dataclass
class OutputSection:
    path: str = ""  # the run's folder, local or s3://
    format: str = "parquet"  # or webdataset, files
    image_format: str = "png"  # or jpeg, webp
    quality: int = 95  # of jpeg and webp; 100 makes webp lossless
    retry_failures: bool = False  # try again the prompts that an earlier start gave up on


@dataclass
class StorageSection:
    endpoint_url: Optional[str] = None  # of an S3 server that is not Amazon's
    region: Optional[str] = None
    path_style: bool = False  # http://host/bucket/key
    retry_for_s: float = 600.0  # how long workers hold on to their images while storage fails

    @property
    def s3(self) -> S3Options:
        """Raises `StorageError` for an endpoint_url that is none."""
        return S3Options(self.endpoint_url, self.region, self.path_style)


@dataclass
class ClusterSection:
    address: Optional[str] = None  # of a Ray cluster; null joins the one around this process, else starts one here
    workers: Any = AUTO  # one per GPU; without GPUs, one per cpus_per_worker
    gpus_per_worker: Optional[float] = None  # 1 where the cluster has GPUs, else 0
    cpus_per_worker: float = 1.0
    max_attempts: int = 3  # failures of a shard before its prompts are run one at a time
    lease_timeout_s: float = 600.0  # without a batch begun or a file written
    start_timeout_s: float = 1800.0  # for fetching, loading and compiling the model
    hedge: bool = True  # idle workers double the last stragglers


@dataclass
class QualitySection:
    enabled: bool = True
    clip: Optional[str] = None  # CLIP checkpoint, for CLIP scores
    vqa: bool = False  # ask the model itself whether the image shows its prompt, for VQA scores


@dataclass
class RunConfig:
    model: ModelSection = field(default_factory=ModelSection)
    flashu: FlashUSection = field(default_factory=FlashUSection)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    manifest: ManifestSection = field(default_factory=ManifestSection)
    output: OutputSection = field(default_factory=OutputSection)
    storage: StorageSection = field(default_factory=StorageSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    quality: QualitySection = field(default_factory=QualitySection)

    def __post_init__(self) -> None:
        if self.flashu.preset == AUTO:
            self.flashu.preset = preset_for(self.model.path)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return asdict(self)


Config = TypeVar("Config")


def read_config(config: str | None, overrides: Sequence[str] = (), kind: type[Config] = RunConfig) -> Config:
    """A config file, or the name of a built-in one, with `section.key=value` overrides on top.

    `kind` may have more settings than a run. Raises `InputError` naming the file, the key and the nearest right one.
    """
    from omegaconf import OmegaConf

    check_overrides(overrides, kind)
    given = [read_file(_find(config), kind)] if config is not None else []
    given += [read_override(override, kind) for override in overrides]
    settings = OmegaConf.structured(kind)
    for each in given:
        merge(settings, each, kind)
    return OmegaConf.to_object(settings)


def check_no_credentials(config: RunConfig) -> None:
    """Raises `InputError` for a URL that holds a password or key, without repeating it. For where settings get known:
    a run's `run.json`, a cluster's dashboard."""
    for name, value in flat(config.to_dict()):
        if isinstance(value, str) and name != "sampling.negative_prompt" and holds_credentials(value):
            raise InputError(
                f"{name} holds credentials. Remove them there, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment, or name a profile in AWS_PROFILE"
            )


def flat(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings under their names as one gives them, `section.key` or `key`."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", of_key) for key, of_key in value.items())
        else:
            yield name, value


def built_in_configs() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    return {file.stem: file for file in sorted(BUILT_IN.glob("*.yaml"), key=lambda file: file.stem)}


def _find(config: str) -> Path:
    if config.endswith(PARQUET):
        raise InputError(f"{config} is no config; name one, and the manifest in it: default manifest.path={config}")
    built_in = built_in_configs()
    if Path(config).is_file():
        return Path(config)
    if config in built_in:
        return built_in[config]
    if "=" in config:
        raise InputError(f"the config comes before the settings, as in: default {shlex.quote(config)}")
    raise InputError(f"there is no config {config}; give a YAML file, or one of: {', '.join(built_in)}")


def parse_size(name: str, size: str | int | None) -> int | tuple[int, int] | None:
    """Pixels per side ("432"), or "WIDTHxHEIGHT" as (height, width). Raises `InputError` beginning with `name`."""
    if size is None:
        return None
    sides = str(size).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"{name} {size}: give pixels per side (432), or WIDTHxHEIGHT (512x384)")
    if len(sides) == 1:
        return int(sides[0])
    width, height = map(int, sides)
    return height, width
