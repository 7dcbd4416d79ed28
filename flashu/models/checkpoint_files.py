"""What a checkpoint folder holds, and finding it, on disk or on the hub. No weights are read, and torch is not needed.

A folder is laid out as Show-o2's release or as `flashu convert` writes it:

    config.json   pytorch_model.bin | …-00001-of-0000N.bin + index | model.safetensors | sharded + index
    vae/          config.json  model.safetensors          (converted folders)
    tokenizer/    tokenizer.json  tokenizer_config.json   (converted folders)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from flashu.errors import CheckpointError, InputError
from flashu.models.geometry import (
    BUILT_IN_LLMS,
    LlmGeometry,
    Showo2Config,
    check_class,
    geometry_from_dict,
    read_json,
    read_llm_geometry,
)

EMBEDDED = "embedded"  # the name under which the model that ships with the package is asked for
EMBEDDED_FOLDER = Path(__file__).parent.parent / "embedded"

# In order of preference: an index names shards, so it comes before a single file of the same format.
WEIGHT_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.safetensors.index.json",
    "pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
RELEASED_VAE_REPOSITORY, RELEASED_VAE = "Wan-AI/Wan2.1-T2V-14B", "Wan2.1_VAE.pth"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def resolve_folder(path_or_hub_id: str | Path, patterns: Iterable[str]) -> Path:
    """A local folder as it is, or a hub repository's files that match `patterns`, downloaded or cached.

    `"embedded"` is the folder that ships with the package. Raises `CheckpointError` when it is none of these.
    """
    name = str(path_or_hub_id)
    if name == EMBEDDED:
        return EMBEDDED_FOLDER
    try:
        folder = Path(name).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path; no home of that name; a null character
        is_folder = exists = False
    if is_folder:
        return folder
    if exists:
        raise CheckpointError(f"{name} is a file; give the checkpoint's folder")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"no such checkpoint folder: {name}")
    return _download(name, list(patterns))


def _download(repo: str, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    superseded: list[str] | None = ["*.bin"]  # a repository with both formats is fetched, and cached, in one
    try:
        files = HfApi().list_repo_files(repo)
        if not any(name in files for name in WEIGHT_NAMES if "safetensors" in name):
            superseded = None
    except Exception:  # offline: the cache may still have it, and if not, the call below says why
        pass
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=superseded))
    except HFValidationError:
        raise CheckpointError(f"no such checkpoint folder: {repo}") from None
    except GatedRepoError:
        reason = "access to it must be asked for on its page; then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such repository (if it is private, log in with `hf auth login`)"
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the files are not in the local cache"
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answered {status}" + ("; log in again with `hf auth login`" if status in (401, 403) else "")
    except OSError as error:  # connections, proxies, full disks; the class name carries no URL and no token
        reason = f"the download failed ({type(error).__name__})"
    except Exception as error:  # httpx's transport errors are no OSErrors
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "huggingface_hub", "requests"):
            raise
        reason = f"the hub cannot be reached ({type(error).__name__})"
    raise CheckpointError(f"{repo!r} is neither a local folder nor a hub id that can be loaded: {reason}")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights. Raises `CheckpointError` when there are none, or some are missing."""
    for name in WEIGHT_NAMES:
        file = folder / name
        if not file.exists():
            continue
        if not name.endswith(".index.json"):
            return [file]
        shards = read_json(file).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(
                f"{file} has no weight_map from tensors to files; it is not the index of a sharded checkpoint"
            )
        names = sorted(set(shards.values()))
        outside = [shard for shard in names if Path(shard).name != shard or shard in ("", "..")]
        if outside:
            raise CheckpointError(f"{file} names files outside its own folder: {', '.join(outside[:3])}")
        missing = [shard for shard in names if not (folder / shard).exists()]
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}")
        return [folder / shard for shard in names]
    raise CheckpointError(f"{folder} holds no weights; looked for {', '.join(WEIGHT_NAMES)}")


def vae_files(folder: Path) -> list[Path]:
    """The files that hold a VAE's weights: the released one's, or a converted folder's. Raises `CheckpointError`."""
    released = folder / RELEASED_VAE
    return [released] if released.exists() else weight_files(folder)


def vae_beside(folder: Path | None) -> str | Path:
    """Where the VAE of a checkpoint is: in its folder, or in the Wan 2.1 repository."""
    folder = folder or Path(".")
    return next((path for path in (folder / "vae", folder / RELEASED_VAE) if path.exists()), RELEASED_VAE_REPOSITORY)


def find_tokenizer(folder: Path) -> Path | None:
    """A checkpoint folder's `tokenizer.json`, in it or in its `tokenizer/` subfolder."""
    candidates = (folder / TOKENIZER, folder / "tokenizer" / TOKENIZER)
    return next((file for file in candidates if file.exists()), None)


def tokenizer_beside(folder: Path | None, config: Showo2Config) -> str | Path:
    """Where the tokenizer of a checkpoint is: in its folder, or with the LLM that its config names."""
    name = config.llm_model_path
    if folder is not None and find_tokenizer(folder):
        return folder
    if not name:
        raise InputError("the model names no tokenizer; give one with tokenizer=")
    local = Path(folder or ".") / name
    return local if local.is_dir() else name


def read_config(config_file: Path) -> Showo2Config:
    """A Show-o2 `config.json`, its LLM's geometry looked up. Raises `CheckpointError`."""
    data = read_json(config_file)
    check_class(data, config_file)
    return Showo2Config.from_dict(data, _llm_geometry(data, config_file), str(config_file))


def _llm_geometry(data: dict, config_file: Path) -> LlmGeometry:
    if "llm_config" in data:
        return geometry_from_dict(LlmGeometry, data["llm_config"], f"{config_file}: llm_config")
    name = data.get("llm_model_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{config_file} names no LLM (llm_model_path); it is not a Show-o2 config")
    if name in BUILT_IN_LLMS:
        return BUILT_IN_LLMS[name]
    # Released folders built elsewhere may name a local copy of the LLM, relative to themselves or to here.
    local = config_file.parent / name
    try:
        llm_folder = local if len(name) < 256 and local.is_dir() else resolve_folder(name, ["config.json"])
    except CheckpointError as error:
        raise CheckpointError(f"{config_file} names an LLM (llm_model_path) that is not there: {error}") from None
    return read_llm_geometry(llm_folder / "config.json")
