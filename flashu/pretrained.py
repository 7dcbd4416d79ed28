"""The released names: `Showo2Qwen2_5` and `WanImageVAE` are the networks with the files that they are loaded from and
saved to, and with the released call from prompts to images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flashu.acceleration.applied import unpatched
from flashu.checkpoints import weights
from flashu.checkpoints.configs import read_config
from flashu.checkpoints.files import (
    EMBEDDED,
    EMBEDDED_FOLDER,
    RELEASED_VAE,
    read_json,
    vae_beside,
    vae_files,
    weight_files,
)
from flashu.checkpoints.hub import resolve_folder
from flashu.devices import DTYPES, FLOAT8, resolve_device, resolve_dtype
from flashu.errors import CheckpointError, InputError
from flashu.generation import ImageGenerator
from flashu.models.float8 import require_float8, to_float8
from flashu.models.geometry import Showo2Config, VaeGeometry
from flashu.models.showo2 import Showo2
from flashu.models.wan_vae import WanVae, fold
from flashu.tokenizer import PromptTokenizer

EMBEDDING, HEAD = "showo.model.embed_tokens.weight", "showo.lm_head.weight"
REPOSITORY_FILES = ["*.json", "merges.txt", "*.safetensors", "*model*.bin", "tokenizer/*", "vae/*"]
STORED = "stored"  # as a dtype: each tensor as the file has it


class Showo2Qwen2_5(Showo2):  # noqa: N801 - the released class's name
    """Show-o2 on its Qwen2.5, with the files that it is loaded from and saved to, and the released call to pictures."""

    def __init__(self, config: Showo2Config):
        super().__init__(config)
        self.has_own_head = False  # whether it has an output head apart, where the LLM's config ties it
        self._companions: tuple[Any, tuple[WanVae, PromptTokenizer]] | None = None  # of the last `t2i_generate`

    def extra_repr(self) -> str:
        return f"FlashU: {self.acceleration.config.describe()}" if self.acceleration else ""

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
    ) -> Showo2Qwen2_5:
        """Load a checkpoint folder, a hub id, or the model that ships with this package (`"embedded"`).

        Reads `.bin` or `.safetensors`, single or sharded, as the release, diffusers or transformers lay them out,
        memory-mapped, so that loading needs no more memory than the model itself. `variant` is that of
        `pytorch_model.VARIANT.bin`; one that is there alone is found. An output head that differs from its embedding is
        kept, with a warning, even where the LLM's config ties them (the release does so silently).
        `dtype=None` keeps the stored format, the embedding's for all; "stored" keeps each tensor's own, to be saved
        again; "float8" runs the FFNs of LLM and head in float8, made from bfloat16, and all else in bfloat16.
        Raises `CheckpointError` (missing, damaged, unsafe, or another model) or `InputError` (device, dtype).
        """
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
        tensors = weights.read_tensors(weight_files(folder, variant))
        optional, own_head = [], False
        if config.llm.tie_word_embeddings and _head_differs(tensors):
            warnings.warn(
                f"{folder} has an output head that differs from its embedding, although its LLM's config ties them: it "
                "was trained on untied, and is loaded with the head that it has",
                stacklevel=2,
            )
            config, own_head = replace(config, llm=replace(config.llm, tie_word_embeddings=False)), True
        elif config.llm.tie_word_embeddings:  # one tensor under two names, of which a file may hold either, or both
            optional.append(HEAD)
            if HEAD in tensors:
                tensors.setdefault(EMBEDDING, tensors.pop(HEAD))
        with torch.device("meta"):
            model = cls(config)
        if dtype is None and not as_stored and EMBEDDING in tensors:
            dtype = _stored_dtype(tensors[EMBEDDING], folder)
        weights.assign_weights(model, tensors, folder, dtype, "cpu" if in_float8 else device, optional)
        model.showo.tie_weights()
        if in_float8:
            to_float8(model, device)
            model.to(device)
        model.source, model.has_own_head = folder, own_head
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | str | None = None, layout: str = weights.SAFETENSORS
    ) -> None:
        """Write `config.json` and weights that `from_pretrained` reads, shard by shard.

        dtype: what they are converted to as they are written; None leaves them as they are.
        layout: "safetensors", in shards of 5 GB; or "release", as the released code's own `save_pretrained` writes and
            its `from_pretrained` reads: `pytorch_model.bin`, in shards of 10 GB with the index that it looks for, the
            head of a tied LLM stored too, and a `config.json` of its constructor's arguments.
        Raises `InputError` for a model in float8, and an unknown dtype or layout.
        """
        if layout not in weights.LAYOUTS:
            raise InputError(f"layout is {layout!r}; there are: {', '.join(weights.LAYOUTS)}")
        dtype = None if dtype is None else resolve_dtype(dtype, torch.device("cpu"))
        if self.number_format == FLOAT8:
            raise InputError("a model in float8 has rounded weights and is not saved; load it with dtype bfloat16")
        with unpatched(self):
            tensors = dict(self.state_dict())
            config = self.config.to_release_dict() if layout == weights.RELEASE else self.config.to_dict()
            if layout == weights.RELEASE:  # head beside embedding: a pickle keeps what is one in a shard one
                tensors = {name: tensors[name] for name in (EMBEDDING, HEAD)} | tensors
            elif self.config.llm.tie_word_embeddings:
                del tensors[HEAD]
            weights.save_weights(tensors, Path(folder), config, dtype, layout)

    def t2i_generate(
        self, prompts: str | Sequence[str], *, vae: Any = None, tokenizer: Any = None, **options: Any
    ) -> list[Image.Image]:
        """Text to images in one call, as by a `TextToImagePipeline` around this model.

        `vae` and `tokenizer` are objects or paths; without them they are found beside the model's checkpoint, or on
        the hub. `options` are those of `TextToImagePipeline.__call__`. Returns a list of PIL images.
        """
        key = (vae, tokenizer, self.device, self.dtype)
        if self._companions is None or self._companions[0] != key:
            self._companions = key, companions(self, vae, tokenizer)
        return ImageGenerator(self, *self._companions[1])(prompts, **options)


class WanImageVAE(WanVae):
    """The Wan 2.1 VAE for single images, with the files that it is loaded from and saved to."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
    ) -> WanImageVAE:
        """Load the released `Wan2.1_VAE.pth` (a file, or the folder or hub repository that holds it), a folder
        written by `save_pretrained`, or the `"embedded"` one.

        `dtype=None` keeps the stored one. Raises `CheckpointError` and `InputError` as `Showo2Qwen2_5` does.
        """
        device = resolve_device(device)
        dtype = None if dtype is None else resolve_dtype(dtype, device)
        path = Path(path_or_hub_id).expanduser()
        if str(path_or_hub_id) == EMBEDDED:
            path = EMBEDDED_FOLDER / "vae"
        elif not path.is_file():
            # Not "*.safetensors": the released repository also holds a video model of many gigabytes.
            patterns = [RELEASED_VAE, "config.json", "model.safetensors*", "model-*.safetensors"]
            path = resolve_folder(path_or_hub_id, patterns)
        files = [path] if path.is_file() else vae_files(path)
        tensors = fold(weights.read_tensors(files))
        config_file = files[0].parent / "config.json"
        if path.is_dir() and config_file.exists() and files[0].name != RELEASED_VAE:
            config = read_json(config_file)
            if config.get("_class_name", cls.__name__) != cls.__name__:
                raise CheckpointError(
                    f"{config_file} describes a {config['_class_name']!r}, not a {cls.__name__}; "
                    f"give the released {RELEASED_VAE}, or a folder that flashu convert wrote"
                )
            geometry = VaeGeometry.from_dict(config, str(config_file))
        else:
            geometry = _infer_geometry(tensors, path)
        with torch.device("meta"):
            vae = cls(geometry)
        weights.assign_weights(vae, tensors, path, dtype, device)
        vae.source = files[0]
        return vae.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
        """Write the folded weights as safetensors, converted to `dtype` unless None, and `config.json`."""
        dtype = None if dtype is None else resolve_dtype(dtype, torch.device("cpu"))
        weights.save_weights(dict(self.state_dict()), Path(folder), self.geometry.to_dict(), dtype)


def companions(
    model: Showo2, vae: WanVae | str | Path | None = None, tokenizer: PromptTokenizer | str | Path | None = None
) -> tuple[WanVae, PromptTokenizer]:
    """The VAE and tokenizer that go with a model: as given, or where they are, or beside it, or where the release has
    them. Raises `CheckpointError`, `InputError`."""
    if not tokenizer:
        tokenizer = PromptTokenizer.beside(model.source, model.config)
    elif not isinstance(tokenizer, PromptTokenizer):
        tokenizer = PromptTokenizer.from_pretrained(tokenizer)
    if not isinstance(vae, WanVae):
        vae = WanImageVAE.from_pretrained(vae or vae_beside(model.source), dtype=model.dtype, device=model.device)
    return vae, tokenizer


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


def _infer_geometry(tensors: Mapping[str, Tensor], where: Path) -> VaeGeometry:
    """The release has no config: its width is read off its first layer, the rest is as released."""
    first = tensors.get("encoder.conv1.weight")
    if first is None or first.ndim != 4:
        raise CheckpointError(f"{where} is not a Wan 2.1 VAE: it has no encoder.conv1.weight")
    return VaeGeometry(dim=first.shape[0])
