"""Checkpoint folders (see `checkpoint_files`): reading their weights without running code, and writing them.

Weights are memory-mapped and assigned to a model built on the `meta` device, so loading holds one copy of them.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flashu.devices import DTYPES, FLOAT8, resolve_device, resolve_dtype
from flashu.errors import CheckpointError, InputError
from flashu.models import weight_names
from flashu.models.checkpoint_files import read_config, resolve_folder, weight_files
from flashu.models.float8 import require_float8, to_float8

if TYPE_CHECKING:
    from flashu.models.showo2 import Showo2Qwen2_5

EMBEDDING, HEAD = "showo.model.embed_tokens.weight", "showo.lm_head.weight"
REPOSITORY_FILES = ["*.json", "merges.txt", "*.safetensors", "*model*.bin", "tokenizer/*", "vae/*"]
SAFETENSORS, RELEASE = "safetensors", "release"
LAYOUTS = {  # how a model is written: names of files, of the index of shards, and what a shard holds at most
    SAFETENSORS: ("model{suffix}.safetensors", "model.safetensors.index.json", "5GB"),
    RELEASE: ("pytorch_model{suffix}.bin", "diffusion_pytorch_model.bin.index.json", "10GB"),
}
STORED = "stored"  # as a dtype: each tensor as the file has it


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
    variant: str | None,
) -> Showo2Qwen2_5:
    """See `Showo2Qwen2_5.from_pretrained`."""
    device = resolve_device(device)
    in_float8, as_stored = dtype == FLOAT8, dtype == STORED
    dtype = None if dtype is None or as_stored else resolve_dtype(dtype, device)
    folder = resolve_folder(path_or_hub_id, REPOSITORY_FILES, weights=True, variant=variant)
    config_file = folder / "config.json"
    if not config_file.exists():
        raise CheckpointError(f"{folder} has no config.json; it is not a Show-o2 checkpoint folder")
    config = read_config(config_file)
    if in_float8:
        require_float8(device, config)
    tensors = read_tensors(weight_files(folder, variant))
    optional, own_head = [], False
    if config.llm.tie_word_embeddings:  # one tensor under two names, of which a file may hold either, or both
        if _head_differs(tensors):
            warnings.warn(
                f"{folder} has an output head that differs from its embedding, although its LLM's config ties them: it "
                "was trained on untied, and is loaded with the head that it has",
                stacklevel=3,
            )
            config, own_head = replace(config, llm=replace(config.llm, tie_word_embeddings=False)), True
        else:
            optional.append(HEAD)
            if HEAD in tensors:
                tensors.setdefault(EMBEDDING, tensors.pop(HEAD))
    with torch.device("meta"):
        model = cls(config)
    if dtype is None and not as_stored and EMBEDDING in tensors:
        dtype = _stored_dtype(tensors[EMBEDDING], folder)
    assign_weights(model, tensors, folder, dtype, "cpu" if in_float8 else device, optional)
    model.showo.tie_weights()
    if in_float8:
        to_float8(model, device)
        model.to(device)
    model.source, model.has_own_head = folder, own_head
    return model.eval()


def _head_differs(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has an output head that is not its embedding."""
    if EMBEDDING not in tensors or HEAD not in tensors:
        return False
    embedding, head = tensors[EMBEDDING], tensors[HEAD]
    return embedding.data_ptr() != head.data_ptr() and not torch.equal(embedding, head.to(embedding.dtype))


def _stored_dtype(embedding: Tensor, folder: Path) -> torch.dtype:
    """The format to run a checkpoint in that does not ask for one: its embedding's, as files may mix formats."""
    if embedding.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{folder} is stored as {str(embedding.dtype).removeprefix('torch.')}; "
            f"load it with dtype set to one of: {', '.join(DTYPES)}"
        )
    return embedding.dtype


def save_showo2(model: Showo2Qwen2_5, folder: Path, dtype: torch.dtype | str | None, layout: str) -> None:
    """See `Showo2Qwen2_5.save_pretrained`."""
    from flashu.patch import unpatched

    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; there are: {', '.join(LAYOUTS)}")
    dtype = None if dtype is None else resolve_dtype(dtype, torch.device("cpu"))
    if model.number_format == FLOAT8:
        raise InputError("a model in float8 has rounded weights and is not saved; load it with dtype bfloat16")
    with unpatched(model):
        tensors = dict(model.state_dict())
        config = model.config.to_release_dict() if layout == RELEASE else model.config.to_dict()
        if layout == RELEASE:  # a head beside its embedding comes into one shard, where a pickle keeps the two one
            tensors = {name: tensors[name] for name in (EMBEDDING, HEAD)} | tensors
        elif model.config.llm.tie_word_embeddings:
            del tensors[HEAD]
        save_weights(tensors, folder, config, dtype, layout)


def save_weights(
    tensors: dict[str, Tensor], folder: Path, config: dict, dtype: torch.dtype | None = None, layout: str = SAFETENSORS
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
