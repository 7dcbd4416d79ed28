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

from flashu.devices import resolve_device, resolve_dtype
from flashu.errors import CheckpointError
from flashu.models.geometry import (
    BUILT_IN_LLMS,
    PRESETS,
    LlmGeometry,
    Showo2Config,
    _from_dict,
    read_json,
    read_llm_geometry,
)

if TYPE_CHECKING:
    from flashu.models.showo2 import Showo2Qwen2_5

EMBEDDED = "embedded"  # the name under which the model that ships with the package is asked for

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
MAX_SHARD_SIZE = "5GB"


# ---------------------------------------------------------------------------------------------- finding a folder


def resolve_folder(path_or_hub_id: str | Path, patterns: Iterable[str]) -> Path:
    """A local folder as it is, or a hub repository's files that match `patterns`, downloaded or cached.

    Raises `CheckpointError` when it is neither.
    """
    name = str(path_or_hub_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{name} is a file; give the checkpoint's folder")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"no such checkpoint folder: {name}")
    return _download(name, list(patterns))


def _download(repo: str, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        files = HfApi().list_repo_files(repo)
    except Exception:  # offline: the cache may still have it, and if not, the call below says why
        files = []
    # A repository with both formats is fetched in one.
    superseded = ["*.bin"] if any(name in files for name in WEIGHT_NAMES if "safetensors" in name) else None
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=superseded))
    except RepositoryNotFoundError:
        reason = "the hub has no such repository (if it is private, log in with `hf auth login`)"
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the files are not in the local cache"
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
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{file} has no weight_map; it is not the index of a sharded checkpoint")
        names = sorted(set(shards.values()))
        outside = [shard for shard in names if Path(shard).name != shard]
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
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file} holds more than tensors: loading it could run code, so it is refused. "
            "Ask its publisher for a .safetensors file"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file} is damaged or not a PyTorch file (was it copied whole?): {reason}") from None
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(f"{file} does not hold a flat dictionary of tensors")
    return data


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
    problems = [
        f"{len(keys)} {kind} ({'; '.join(keys[:4])}{'; …' if len(keys) > 4 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
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
    dtype = None if dtype is None else resolve_dtype(dtype, device)
    if str(path_or_hub_id) == EMBEDDED:
        from flashu.models.random_weights import random_model

        model = random_model(cls, PRESETS[EMBEDDED], 0, dtype or torch.float32, device)
        model.source = EMBEDDED
        return model

    folder = resolve_folder(path_or_hub_id, ["*.json", "*.safetensors", "pytorch_model*.bin", "tokenizer/*", "vae/*"])
    config_file = folder / "config.json"
    if not config_file.exists():
        raise CheckpointError(f"{folder} has no config.json; it is not a Show-o2 checkpoint folder")
    config = read_config(config_file)
    with torch.device("meta"):
        model = cls(config)
    # A tied lm_head is the embedding under a second name, which safetensors files leave out.
    optional = ["showo.lm_head.weight"] if config.llm.tie_word_embeddings else []
    assign_weights(model, read_tensors(weight_files(folder)), folder, dtype, device, optional)
    model.showo.tie_weights()
    model.source = folder
    return model.eval()


def read_config(config_file: Path) -> Showo2Config:
    """A Show-o2 `config.json`, its LLM's geometry looked up. Raises `CheckpointError`."""
    data = read_json(config_file)
    return Showo2Config.from_dict(data, _llm_geometry(data, config_file), str(config_file))


def _llm_geometry(data: dict, config_file: Path) -> LlmGeometry:
    if "llm_config" in data:
        return _from_dict(LlmGeometry, data["llm_config"], str(config_file))
    name = data.get("llm_model_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{config_file} names no LLM (llm_model_path); it is not a Show-o2 config")
    if name in BUILT_IN_LLMS:
        return BUILT_IN_LLMS[name]
    # Released folders built elsewhere may name a local copy of the LLM, relative to themselves or to here.
    local = config_file.parent / name
    llm_folder = local if local.is_dir() else resolve_folder(name, ["config.json"])
    return read_llm_geometry(llm_folder / "config.json")


def save_showo2(model: Showo2Qwen2_5, folder: Path) -> None:
    """See `Showo2Qwen2_5.save_pretrained`."""
    save_weights(model, folder, model.config.to_dict())


def save_weights(model: nn.Module, folder: Path, config: dict) -> None:
    """Write a model's `config.json` and safetensors weights into `folder`."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=MAX_SHARD_SIZE)
