"""What a run is told: the sections of a config file, as OmegaConf structured configs, and reading one.

Settings are checked for their names and types here, for their meaning where they are used (`jobs.prepare`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, TypeVar

from flashu.config import preset_for
from flashu.errors import InputError

BUILT_IN = Path(__file__).parent / "configs"
AUTO = "auto"

# OmegaConf reads these annotations at run time, where Python 3.10 knows `X | None` but not every OmegaConf does.
# ruff: noqa: UP045


@dataclass
class ModelSection:
    path: str = "embedded"  # folder, hub id, s3:// folder, or "embedded", the built-in model
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
    scores: Optional[str] = None  # of `flashu calibrate`; null measures them once, into the run's folder


@dataclass
class SamplingSection:
    num_inference_steps: Optional[int] = None  # 50, or what FlashU is set to
    guidance_scale: Optional[float] = None  # the model's own: 7.5 for the released ones
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


Config = TypeVar("Config", bound=RunConfig)


def read_config(config: str | None, overrides: Sequence[str] = (), kind: type[Config] = RunConfig) -> Config:
    """A config file, or the name of a built-in one, with `section.key=value` overrides on top.

    `kind` may have more settings than a run. Raises `InputError` naming the file, the key and the nearest right one.
    """
    from omegaconf import OmegaConf

    for override in overrides:
        if "=" not in override:
            raise InputError(f"{override!r} is no override; write section.key=value, as in sampling.seed=1")
    merged = OmegaConf.structured(kind)
    if config is not None:
        file = _find(config)
        merged = _merge(merged, lambda: OmegaConf.load(file), str(file))
    for override in overrides:
        key = override.partition("=")[0]  # the value is not repeated in errors: it may be a secret in a wrong place
        merged = _merge(merged, lambda override=override: OmegaConf.from_dotlist([override]), key)
    return OmegaConf.to_object(merged)


def check_no_credentials(config: RunConfig) -> None:
    """Raises `InputError` for a URL that holds a password or key, without repeating it. For where settings get known:
    a run's `run.json`, a cluster's dashboard."""
    for name, value in _flat(config.to_dict()):
        if not isinstance(value, str) or "://" not in value or name == "sampling.negative_prompt":
            continue
        scheme, _, rest = value.partition("://")
        if "@" in rest or (scheme == "s3" and ":" in rest.partition("/")[0]):  # a secret key may hold a slash
            raise InputError(
                f"{name} holds credentials. Remove them there, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment, or name a profile in AWS_PROFILE"
            )


def _flat(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings under their names as one gives them, `section.key` or `key`."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", of_key) for key, of_key in value.items())
        else:
            yield name, value


def _find(config: str) -> Path:
    built_in = {file.stem: file for file in sorted(BUILT_IN.glob("*.yaml"))}
    if Path(config).is_file():
        return Path(config)
    if config in built_in:
        return built_in[config]
    raise InputError(f"there is no config {config}; give a YAML file, or one of: {', '.join(built_in)}")


def _merge(config: Any, load: Any, source: str) -> Any:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded = load()
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read: {_first_line(error)}") from None
    sections = {entry.name: _names(entry.default_factory) for entry in fields(RunConfig)}
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{source} must be a mapping of the sections {', '.join(sections)}")
    for name in loaded:
        if name in sections and not isinstance(loaded[name], DictConfig):
            main = next((key for key in ("preset", "path") if key in sections[name]), None)
            hint = f"; did you mean {name}.{main}?" if main else ""
            raise InputError(f"{source}: {name} must be a mapping of {', '.join(sections[name])}{hint}")
    for section, name in (("flashu", "preset"), ("model", "compile")):
        if loaded.get(section, {}).get(name) is False:
            loaded[section][name] = "off"  # which YAML takes for a truth value
    try:
        merged = OmegaConf.merge(config, loaded)
        OmegaConf.to_object(merged)  # resolves ${…}
        return merged
    except ConfigKeyError as error:
        known = OmegaConf.to_container(config)
        raise InputError(f"{source}: {_unknown(error.full_key or str(error.key), known)}") from None
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key and error.full_key != source else ""
        raise InputError(f"{source}: {where}{_first_line(error)}") from None


def _unknown(key: str, settings: dict[str, Any]) -> str:
    if re.search("secret|token(?!i)|password|access_key|credential", key, re.IGNORECASE):  # but not a tokeniser
        return f"there is no setting {key}; credentials come from the environment, never from a config"
    known = [*dict.fromkeys([*(name for name, _ in _flat(settings)), *settings])]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    # A key in the wrong section is nearer by its last part.
    near = [name for name in known if name.split(".")[-1] == key.split(".")[-1]] or near
    hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}"
    return f"there is no setting {key}{hint}"


def _names(of: Any) -> list[str]:
    return [entry.name for entry in fields(of)]


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {error.problem}"
    return " ".join(str(error).splitlines()[:1]) or type(error).__name__
