"""What a checkpoint folder holds. No weights are read, and torch is not needed.

A folder is laid out as Show-o2's release or as `flashu convert` writes it:

    config.json   pytorch_model.bin | model.safetensors | shards, with an index or without: see `weight_names`
    vae/          config.json  model.safetensors          (converted folders)
    tokenizer/    tokenizer.json  tokenizer_config.json   (converted folders)

A tokenizer may stand in the folder itself, and in another layout of transformers: see `TOKENIZER_LAYOUTS`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashu.checkpoints import weight_names
from flashu.errors import CheckpointError, InputError
from flashu.models.geometry import Showo2Config

EMBEDDED = "embedded"  # the name under which the model that ships with the package is asked for
EMBEDDED_FOLDER = Path(__file__).parent.parent / "embedded"

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


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` when it is not one."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{file} cannot be read as JSON: {reason}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a JSON {type(data).__name__}, not an object")
    return data


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
