"""Weights in files: read without running code, given to a model, and written. Which files: see `files`.

They are memory-mapped and assigned to a model built on the `meta` device, so loading holds one copy of them.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flashu.checkpoints import weight_names
from flashu.errors import CheckpointError

SAFETENSORS, RELEASE = "safetensors", "release"
LAYOUTS = {  # how a model is written: names of files, of the index of shards, and what a shard holds at most
    SAFETENSORS: ("model{suffix}.safetensors", "model.safetensors.index.json", "5GB"),
    RELEASE: ("pytorch_model{suffix}.bin", "diffusion_pytorch_model.bin.index.json", "10GB"),
}


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


def save_weights(
    tensors: dict[str, Tensor],
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype | None = None,
    layout: str = SAFETENSORS,
) -> None:
    """Write `config.json` and weights into `folder`, converted to `dtype` (None: as they are) shard by shard."""
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    pattern, index, shard_size = LAYOUTS[layout]
    split = split_torch_state_dict_into_shards(
        _sizes(tensors, dtype), filename_pattern=pattern, max_shard_size=shard_size
    )
    for file_name, names in split.filename_to_tensors.items():
        _write_shard({name: tensors[name] for name in names}, folder / file_name, dtype)
        (folder / file_name).chmod(config_file.stat().st_mode)  # safetensors are made readable by their owner alone
    for name in os.listdir(folder):  # what an earlier model left would be read in this one's place
        if weight_names.is_plain(name) and name not in split.filename_to_tensors:
            (folder / name).unlink()
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / index).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sizes(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors of the sizes that these will have in a file; none of one that is there already under another name."""
    sizes, seen = {}, set()
    for name, tensor in tensors.items():
        shape = (0,) if tensor.data_ptr() in seen else tensor.shape
        sizes[name] = torch.empty(shape, dtype=dtype or tensor.dtype, device="meta")
        seen.add(tensor.data_ptr())
    return sizes


def _write_shard(tensors: dict[str, Tensor], file: Path, dtype: torch.dtype | None) -> None:
    made: dict[int, Tensor] = {}  # of tensors that are one under two names
    for name, tensor in tensors.items():
        if (key := tensor.data_ptr()) not in made:
            made[key] = tensor.to("cpu", dtype).contiguous()
            # What is a view of more (see `Joined`) is copied, as files are written from whole blocks of memory.
            if made[key].untyped_storage().nbytes() != made[key].nbytes:
                made[key] = made[key].clone()
            tensors[name] = made[key]
        else:  # which safetensors cannot hold twice
            tensors[name] = made[key].clone() if file.suffix == ".safetensors" else made[key]
    if file.suffix == ".safetensors":
        save_file(tensors, file, {"format": "pt"})
        return
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # of PyTorch's own writer, which tells no more
        raise CheckpointError(f"{file} cannot be written (is the disk full?): {str(error).splitlines()[0]}") from None
