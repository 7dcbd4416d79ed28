"""What a run is told: the sections of a config file, as OmegaConf structured configs, and reading one.

What each setting means is said in `configs/default.yaml`, from which `docs/reference/settings.md` is made.

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
    path: str = "embedded"
    variant: Optional[str] = None
    vae: Optional[str] = None
    tokenizer: Optional[str] = None
    dtype: Optional[str] = None
    compile: str = AUTO
    cache_dir: Optional[str] = None


@dataclass
class FlashUSection:
    preset: str = AUTO
    r_p: Optional[float] = None
    head_prune_ratio: Optional[float] = None
    r_LS: Optional[float] = None  # noqa: N815 - the paper's name
    T_LS: Optional[int] = None
    T_cache: Optional[int] = None
    tau: Optional[int] = None
    schedule: Any = None
    solver_order: Optional[int] = None
    num_inference_steps: Optional[int] = None
    scores: Optional[str] = None
    calibration: Optional[str] = None


@dataclass
class SamplingSection:
    num_inference_steps: Optional[int] = None
    guidance_scale: Optional[float] = None
    time_shift: Optional[float] = 3.0
    size: Any = None
    num_images: int = 1
    seed: int = 0
    negative_prompt: str = ""
    batch_size: Any = AUTO


@dataclass
class ManifestSection:
    path: str = ""
    shard_size: int = 64
    limit: Optional[int] = None
    columns: dict[str, str] = field(default_factory=dict)
    check_ids: bool = True


@dataclass
class OutputSection:
    path: str = ""
    format: str = "parquet"
    image_format: str = "png"
    quality: int = 95
    retry_failures: bool = False


@dataclass
class StorageSection:
    endpoint_url: Optional[str] = None
    region: Optional[str] = None
    path_style: bool = False
    retry_for_s: float = 600.0

    @property
    def s3(self) -> S3Options:
        """Raises `StorageError` for an endpoint_url that is none."""
        return S3Options(self.endpoint_url, self.region, self.path_style)


@dataclass
class ClusterSection:
    address: Optional[str] = None
    workers: Any = AUTO
    gpus_per_worker: Optional[float] = None
    cpus_per_worker: float = 1.0
    max_attempts: int = 3
    lease_timeout_s: float = 600.0
    start_timeout_s: float = 1800.0
    hedge: bool = True


@dataclass
class QualitySection:
    enabled: bool = True
    clip: Optional[str] = None
    vqa: bool = False


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
