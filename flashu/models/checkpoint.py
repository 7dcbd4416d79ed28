"""Checkpoint folders: finding them (disk or hub), reading their weights without running code, writing them.

A folder is laid out as Show-o2's release or as `flashu convert` writes it:

    config.json   pytorch_model.bin | …-00001-of-0000N.bin + index | model.safetensors | sharded + index
    vae/          config.json  model.safetensors          (converted folders)
    tokenizer/    tokenizer.json  tokenizer_config.json   (converted folders)

Weights are memory-mapped and assigned to a model built on the `meta` device, so loading holds one copy of them.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flashu.devices import DTYPES, FLOAT8, resolve_device, resolve_dtype
from flashu.errors import CheckpointError, InputError
from flashu.models.float8 import require_float8, to_float8
from flashu.models.geometry import (
    BUILT_IN_LLMS,
    LlmGeometry,
    Showo2Config,
    check_class,
    geometry_from_dict,
    read_json,
    read_llm_geometry,
)

if TYPE_CHECKING:
    from flashu.models.showo2 import Showo2Qwen2_5

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
EMBEDDING, HEAD = "showo.model.embed_tokens.weight", "showo.lm_head.weight"
MAX_SHARD_SIZE = "5GB"


# ---------------------------------------------------------------------------------------------- finding a folder


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
    except (OSError, RuntimeError):  # too long for a path; the home of a user that does not exist
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


# ------------------------------------------------------------------------------------------------ reading weights


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of some weight files, on the CPU and memory-mapped: what is not touched is not read."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file))
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file (was it copied whole?): {error}") from None


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        try:
            data = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            data = torch.load(file, map_location="cpu", weights_only=True)  # the format of torch < 1.6
    except pickle.UnpicklingError as error:
        if not _asks_for_code(error):
            raise CheckpointError(f"{file} is damaged or not a PyTorch file (was it copied whole?)") from None
        raise CheckpointError(
            f"{file} holds more than tensors: loading it could run code, so it is refused. "
            "Ask its publisher for a .safetensors file"
        ) from None
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} is damaged or not a PyTorch file (was it copied whole?): {reason}") from None
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise CheckpointError(f"{file} does not hold a flat dictionary of tensors")
    return data


def _asks_for_code(error: pickle.UnpicklingError) -> bool:
    """Whether a pickle was read, and asked for a function or class that no tensor needs."""
    return any(sign in str(error) for sign in ("GLOBAL", "reduce"))


def assign_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    optional: Iterable[str] = (),
) -> None:
    """Give a model built on `meta` its weights, converted one by one to `dtype` (None: as stored) and `device`.

    `optional` names may be missing. Raises one `CheckpointError` naming every kind of misfit.
    """
    wanted = model.state_dict()
    optional = set(optional)
    found = {key: value for key, value in tensors.items() if not key.endswith((".inv_freq", "position_ids"))}
    missing = [key for key in wanted if key not in found and key not in optional]
    unexpected = [key for key in found if key not in wanted]
    misshapen = [
        f"{key} is {list(found[key].shape)}, should be {list(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    not_floating = [
        f"{key} is {found[key].dtype}" for key in wanted if key in found and not found[key].is_floating_point()
    ]
    problems = [
        f"{len(keys)} {kind} ({'; '.join(keys[:4])}{'; …' if len(keys) > 4 else ''})"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
            ("not floating", not_floating),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{where} does not fit {type(model).__name__} as its config describes it: " + ", ".join(problems)
        )
    model.load_state_dict(
        {key: found[key].to(device=device, dtype=dtype) for key in wanted if key in found}, strict=False, assign=True
    )


# ------------------------------------------------------------------------------------------------ Show-o2 folders


def load_showo2(
    cls: type[Showo2Qwen2_5],
    path_or_hub_id: str | Path,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
) -> Showo2Qwen2_5:
    """See `Showo2Qwen2_5.from_pretrained`."""
    device = resolve_device(device)
    in_float8 = dtype == FLOAT8
    dtype = None if dtype is None else resolve_dtype(dtype, device)
    folder = resolve_folder(path_or_hub_id, ["*.json", "*.safetensors", "pytorch_model*.bin", "tokenizer/*", "vae/*"])
    config_file = folder / "config.json"
    if not config_file.exists():
        raise CheckpointError(f"{folder} has no config.json; it is not a Show-o2 checkpoint folder")
    config = read_config(config_file)
    if in_float8:
        require_float8(device, config)
    with torch.device("meta"):
        model = cls(config)
    tensors = read_tensors(weight_files(folder))
    optional = []
    if config.llm.tie_word_embeddings:  # one tensor under two names, of which a file may hold either, or both
        optional.append(HEAD)
        if HEAD in tensors:
            tensors.setdefault(EMBEDDING, tensors.pop(HEAD))
    if dtype is None and EMBEDDING in tensors:
        dtype = _stored_dtype(tensors[EMBEDDING], folder)
    assign_weights(model, tensors, folder, dtype, "cpu" if in_float8 else device, optional)
    model.showo.tie_weights()
    if in_float8:
        to_float8(model, device)
        model.to(device)
    model.source = folder
    return model.eval()


def _stored_dtype(embedding: Tensor, folder: Path) -> torch.dtype:
    """The format to run a checkpoint in that does not ask for one: its embedding's, as files may mix formats."""
    if embedding.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{folder} is stored as {str(embedding.dtype).removeprefix('torch.')}; "
            f"load it with dtype set to one of: {', '.join(DTYPES)}"
        )
    return embedding.dtype


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


def save_showo2(model: Showo2Qwen2_5, folder: Path) -> None:
    """See `Showo2Qwen2_5.save_pretrained`."""
    from flashu.patch import unpatched

    if model.number_format == FLOAT8:
        raise InputError("a model in float8 has rounded weights and is not saved; load it with dtype bfloat16")
    with unpatched(model):
        tensors = dict(model.state_dict())
        if model.config.llm.tie_word_embeddings:
            del tensors[HEAD]
        save_weights(tensors, folder, model.config.to_dict())


def save_weights(tensors: dict[str, Tensor], folder: Path, config: dict) -> None:
    """Write `config.json` and safetensors weights into `folder`."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # What is a view of more (see `Joined`) is copied, as files are written from whole blocks of memory.
    whole = {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.to("cpu", copy=True)
        for name, tensor in tensors.items()
    }
    save_torch_state_dict(whole, folder, max_shard_size=MAX_SHARD_SIZE)
    for file in folder.glob("*.safetensors"):  # which are made readable by their owner alone
        file.chmod((folder / "config.json").stat().st_mode)
