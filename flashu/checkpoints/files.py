"""What a checkpoint folder holds, and finding it, on disk or on the hub. No weights are read, and torch is not needed.

(The config of an LLM or a SigLIP that is not known by name is read by transformers, which imports torch if it can.)

A folder is laid out as Show-o2's release or as `flashu convert` writes it:

    config.json   pytorch_model.bin | model.safetensors | shards, with an index or without: see `weight_names`
    vae/          config.json  model.safetensors          (converted folders)
    tokenizer/    tokenizer.json  tokenizer_config.json   (converted folders)

A tokenizer may stand in the folder itself, and in another layout of transformers: see `TOKENIZER_LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from flashu.checkpoints import weight_names
from flashu.errors import CheckpointError, InputError
from flashu.models.geometry import (
    BUILT_IN_LLMS,
    SIGLIP,
    LlmGeometry,
    Showo2Config,
    VisionGeometry,
    check_class,
    geometry_from_dict,
    read_json,
    read_llm_geometry,
    read_vision_geometry,
)

EMBEDDED = "embedded"  # the name under which the model that ships with the package is asked for
EMBEDDED_FOLDER = Path(__file__).parent.parent / "embedded"

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
RELEASED_VAE_REPOSITORY, RELEASED_VAE = "Wan-AI/Wan2.1-T2V-14B", "Wan2.1_VAE.pth"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
# The files that make a tokenizer; the layout that stands first is taken. Without a `tokenizer.json` it is a vocabulary
# and its merges, as transformers' slow tokenizers save themselves, and files beside them say what was added.
TOKENIZER_LAYOUTS = (
    (TOKENIZER,),
    (f"tokenizer/{TOKENIZER}",),
    ("vocab.json", "merges.txt"),
    ("tokenizer/vocab.json", "tokenizer/merges.txt"),
)
_ADDED = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
TOKENIZER_FILES = (
    *(name for names in TOKENIZER_LAYOUTS for name in names),
    *_ADDED,
    *(f"tokenizer/{name}" for name in _ADDED),
)


def resolve_folder(
    path_or_hub_id: str | Path, patterns: Iterable[str], *, weights: bool = False, variant: str | None = None
) -> Path:
    """A local folder as it is, or a hub repository's files that match `patterns`, downloaded or cached.

    weights: whether the patterns are of a model's weights too: of several formats and variants, only those that
        `weight_files` would choose for `variant` are downloaded, and a repository without them is an error.
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
    needless, cached = _needless_weights(name, variant) if weights else ([], None)
    return cached or _download(name, list(patterns), needless)


def _needless_weights(repo: str, variant: str | None) -> tuple[list[str], Path | None]:
    """The weights of a repository that its best copy makes needless; or, where the hub cannot be asked, the folder in
    the cache that holds a copy. Raises `CheckpointError` where the repository has no such weights."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = [name for name in HfApi().list_repo_files(repo) if "/" not in name]
    except Exception:  # offline, or not to be had: the download then says why, unless the cache has all that is needed
        with suppress(Exception):
            folder = Path(snapshot_download(repo, allow_patterns=[CONFIG], local_files_only=True))
            if weight_files(folder, variant):
                return [], folder
        return [], None
    chosen = weight_names.find_weights(files, repo, variant)
    return [name for name in files if weight_names.is_weights(name) and not chosen.holds(name)], None


def _download(repo: str, patterns: list[str], needless: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=needless))
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


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that hold a folder's weights, of a variant or as `weight_names.find_weights` finds them.

    Raises `CheckpointError` when there are none, or some are missing.
    """
    weights = weight_names.find_weights(_names(folder), folder, variant)
    if weights.index is None:
        return [folder / name for name in weights.files]
    file = folder / weights.index
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
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} shards that {weights.index} names: {', '.join(missing[:3])}"
        )
    return [folder / shard for shard in names]


def _names(folder: Path) -> list[str]:
    """What a folder holds; its own folders with a slash."""
    try:
        return [f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None


def vae_files(folder: Path) -> list[Path]:
    """The files that hold a VAE's weights: the released one's, or a converted folder's. Raises `CheckpointError`."""
    released = folder / RELEASED_VAE
    return [released] if released.exists() else weight_files(folder)


def vae_beside(folder: Path | None) -> str | Path:
    """Where the VAE of a checkpoint is: in its folder, or in the Wan 2.1 repository."""
    folder = folder or Path(".")
    return next((path for path in (folder / "vae", folder / RELEASED_VAE) if path.exists()), RELEASED_VAE_REPOSITORY)


def find_tokenizer(folder: Path) -> Path | None:
    """A checkpoint folder's `tokenizer.json`, in it or in its `tokenizer/` subfolder, or a `vocab.json` with merges."""
    for names in TOKENIZER_LAYOUTS:
        if all((folder / name).exists() for name in names):
            return folder / names[0]
    return None


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
    return Showo2Config.from_dict(
        data, _llm_geometry(data, config_file), _vision_geometry(data, config_file), str(config_file)
    )


def _llm_geometry(data: dict, config_file: Path) -> LlmGeometry:
    if "llm_config" in data:
        return geometry_from_dict(LlmGeometry, data["llm_config"], f"{config_file}: llm_config")
    name = data.get("llm_model_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{config_file} names no LLM (llm_model_path); it is not a Show-o2 config")
    return BUILT_IN_LLMS.get(name) or read_llm_geometry(_config_of(name, "an LLM (llm_model_path)", config_file))


def _vision_geometry(data: dict, config_file: Path) -> VisionGeometry:
    if "vision_config" in data:
        return geometry_from_dict(VisionGeometry, data["vision_config"], f"{config_file}: vision_config")
    name = data.get("clip_pretrained_model_path") or SIGLIP
    if not isinstance(name, str):
        raise CheckpointError(f"{config_file}: clip_pretrained_model_path is {name!r}; it must name a SigLIP")
    if name == SIGLIP:
        return VisionGeometry()
    return read_vision_geometry(_config_of(name, "a SigLIP (clip_pretrained_model_path)", config_file))


def _config_of(name: str, what: str, config_file: Path) -> Path:
    """The `config.json` of a part that another one names, by a hub id, or a folder relative to itself or to here."""
    local = config_file.parent / name
    try:
        return (local if len(name) < 256 and local.is_dir() else resolve_folder(name, [CONFIG])) / CONFIG
    except CheckpointError as error:
        raise CheckpointError(
            f"{config_file} names {what} that is not there: {error}; name its folder, or a hub id"
        ) from None
