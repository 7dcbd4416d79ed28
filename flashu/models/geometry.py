"""The shapes of every network: what a checkpoint's `config.json` says.

Numbers and (de)serialisation only; no tensors, no files. The models that are known by name are in `presets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flashu.arguments import is_finite, is_whole
from flashu.config import GUIDANCE_SCALE
from flashu.errors import CheckpointError, InputError

PATCH_SIZE = 2  # latent pixels per side of an image token
VAE_STRIDE = 8  # image pixels per side of a latent pixel
PIXELS_PER_TOKEN = PATCH_SIZE * VAE_STRIDE

SIGLIP = "google/siglip-so400m-patch14-384"  # whose sizes `VisionGeometry` has unless told otherwise
DIFFUSERS_VERSION = "0.31.0"  # that the release is made for
DEFAULT_VOCAB_SIZE = 151669  # Qwen2.5's 151665 tokens and the four that Show-o2 adds


@dataclass(frozen=True)
class LlmGeometry:
    """A Qwen2.5 decoder, under the key names of its own `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = False
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    vocab_size: int | None = None  # of the LLM alone; a Show-o2 model may say another

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionGeometry:
    """A SigLIP encoder as Show-o2 keeps it: `num_hidden_layers` counts the layers that are *run*."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 26
    num_attention_heads: int = 16
    grid: int = 27  # side of the token grid that the learned position embedding was trained on
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class HeadGeometry:
    """The diffusion head's attention blocks."""

    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 64


@dataclass(frozen=True)
class VaeGeometry:
    """The Wan 2.1 VAE. `latent_mean` and `latent_std` normalise its latents, one number a channel."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latent_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": "WanImageVAE", **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> VaeGeometry:
        return geometry_from_dict(cls, data, where)


@dataclass(frozen=True)
class Showo2Config:
    """The whole unified model."""

    llm: LlmGeometry
    llm_vocab_size: int = DEFAULT_VOCAB_SIZE
    llm_model_path: str = ""
    clip_pretrained_model_path: str = SIGLIP
    image_latent_dim: int = 16
    image_latent_height: int = 27  # the native token grid; other sizes can be asked for
    image_latent_width: int = 27
    num_diffusion_layers: int = 10
    max_prompt_tokens: int | None = None  # None where rows are as long as the released models'
    guidance_scale: float = GUIDANCE_SCALE  # what suits the checkpoint, where nothing else is asked for
    vision: VisionGeometry = field(default_factory=VisionGeometry)
    head: HeadGeometry = field(default_factory=HeadGeometry)

    @property
    def native_grid(self) -> tuple[int, int]:
        """(height, width) of the token grid that the checkpoint was made for."""
        return self.image_latent_height, self.image_latent_width

    def max_text_tokens(self, image_tokens: int) -> int:
        """How many prompt tokens fit beside `image_tokens` in the rows that the model was trained on.

        The released row lengths (1024, 1280 and 4352 positions for 729, 1024 and 4096 image tokens) are the image
        tokens plus 256, rounded up to 128; time token, bos, boi, eoi and eos take five of them.
        """
        if self.max_prompt_tokens is not None:
            return self.max_prompt_tokens
        row_length = -(-(image_tokens + 256) // 128) * 128
        return row_length - image_tokens - 5

    def to_dict(self) -> dict[str, Any]:
        """The keys of Show-o2's own `config.json`, and what it leaves to hub ids, or does not say."""
        return self._released_keys() | self._own_keys()

    def to_release_dict(self) -> dict[str, Any]:
        """As `to_dict`, of our own keys only those that say more than the released ones."""
        known = BUILT_IN_LLMS.get(self.llm_model_path)
        if known and self.llm.vocab_size is None:  # as files from before say nothing of it
            known = replace(known, vocab_size=None)
        told = {
            "llm_config": known and asdict(known),
            "vision_config": asdict(VisionGeometry()) if self.clip_pretrained_model_path == SIGLIP else None,
            "head_config": asdict(HeadGeometry()),
            "max_prompt_tokens": None,
            "guidance_scale": GUIDANCE_SCALE,
        }
        more = {key: value for key, value in self._own_keys().items() if value != told[key]}
        return {"_diffusers_version": DIFFUSERS_VERSION} | self._released_keys() | more

    def unlike_released(self) -> list[str]:
        """Why the released code could not build this model; nothing where it could."""
        reasons = []
        if self.head != HeadGeometry():
            reasons.append(f"it builds heads of hidden size {HeadGeometry().hidden_size}, not {self.head.hidden_size}")
        if self.clip_pretrained_model_path == SIGLIP and self.vision != VisionGeometry():
            reasons.append(f"it takes its semantic layers' sizes from {SIGLIP}, which has others")
        if not self.llm_model_path:
            reasons.append("it goes by llm_model_path, and the model names no LLM")
        return reasons

    def _released_keys(self) -> dict[str, Any]:
        """Its class, and the arguments of its constructor."""
        return {
            "_class_name": "Showo2Qwen2_5",
            "llm_vocab_size": self.llm_vocab_size,
            "llm_model_path": self.llm_model_path,
            "load_from_showo": True,
            "image_latent_dim": self.image_latent_dim,
            "image_latent_height": self.image_latent_height,
            "image_latent_width": self.image_latent_width,
            "video_latent_height": self.vision.grid,
            "video_latent_width": self.vision.grid,
            "patch_size": PATCH_SIZE,
            "hidden_size": self.llm.hidden_size,
            "clip_latent_dim": self.vision.hidden_size,
            "clip_pretrained_model_path": self.clip_pretrained_model_path,
            "num_diffusion_layers": self.num_diffusion_layers,
            "add_time_embeds": True,
            "add_qk_norm": True,
        }

    def _own_keys(self) -> dict[str, Any]:
        return {
            "max_prompt_tokens": self.max_prompt_tokens,
            "guidance_scale": self.guidance_scale,
            "llm_config": asdict(self.llm),
            "vision_config": asdict(self.vision),
            "head_config": asdict(self.head),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], llm: LlmGeometry, vision: VisionGeometry, where: str) -> Showo2Config:
        """Read Show-o2's `config.json`.

        `llm` and `vision` are the geometries that `llm_model_path` and `clip_pretrained_model_path` name, looked up
        already. `where` names the file in errors.
        Raises `CheckpointError` when the file describes something that this network cannot be.
        """
        if not data.get("add_time_embeds", True):
            raise CheckpointError(f"{where}: add_time_embeds is false; only models with a time token are supported")
        if data.get("patch_size", PATCH_SIZE) != PATCH_SIZE:
            raise CheckpointError(f"{where}: patch_size is {data['patch_size']}; only {PATCH_SIZE} is supported")
        if data.get("hidden_size", llm.hidden_size) != llm.hidden_size:
            raise CheckpointError(
                f"{where}: hidden_size is {data['hidden_size']}, but its LLM "
                f"({data.get('llm_model_path')!r}) has hidden size {llm.hidden_size}"
            )
        siglip = data.get("clip_pretrained_model_path") or SIGLIP
        if data.get("clip_latent_dim", vision.hidden_size) != vision.hidden_size:
            raise CheckpointError(
                f"{where}: clip_latent_dim is {data['clip_latent_dim']}, "
                f"but its SigLIP ({siglip!r}) has hidden size {vision.hidden_size}"
            )
        known = {"image_latent_dim", "image_latent_height", "image_latent_width", "num_diffusion_layers"}
        if data.get("max_prompt_tokens") is not None:
            known.add("max_prompt_tokens")
        if data.get("llm_vocab_size") is not None:
            known.add("llm_vocab_size")
        elif llm.vocab_size is None:
            raise CheckpointError(
                f"{where}: llm_vocab_size is not set, and its LLM ({data.get('llm_model_path')!r}) has no "
                "vocab_size; set llm_vocab_size to the rows of the embedding"
            )
        check_sizes({key: data[key] for key in known & data.keys()}, where)
        if data.get("guidance_scale") is not None:
            known.add("guidance_scale")
            scale = data["guidance_scale"]
            if not is_finite(scale) or scale < 0:
                raise CheckpointError(f"{where}: guidance_scale is {scale!r}; it must be a finite number, 0 or more")
        return cls(
            llm=llm,
            llm_model_path=data.get("llm_model_path") or "",
            clip_pretrained_model_path=siglip,
            vision=vision,
            head=geometry_from_dict(HeadGeometry, data.get("head_config", {}), f"{where}: head_config"),
            **{"llm_vocab_size": llm.vocab_size} | {key: data[key] for key in known & data.keys()},
        )


def check_class(data: dict[str, Any], where: str | Path) -> None:
    """Raises `CheckpointError` when a config says that it is of another kind of model."""
    if data.get("_class_name", "Showo2Qwen2_5") != "Showo2Qwen2_5":
        raise CheckpointError(f"{where} describes a {data['_class_name']!r}, not a Show-o2 (Showo2Qwen2_5) model")


def geometry_from_dict(cls: type, data: dict[str, Any], where: str) -> Any:
    """A geometry from the keys it knows; other keys of a Hugging Face config are none of its business."""
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is a JSON {type(data).__name__}, not an object")
    check_told_sizes(cls, data, where)
    known = {f.name for f in fields(cls)}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key in known}
    try:
        return cls(**values)
    except TypeError as error:
        raise CheckpointError(f"{where}: incomplete {cls.__name__}: {error}") from None


def check_told_sizes(cls: type, data: dict[str, Any], where: str) -> None:
    """`check_sizes` of those that `data` tells of a geometry's whole numbers; null may be what may be None."""
    types = {f.name: f.type for f in fields(cls) if f.type.startswith("int")}
    sizes = {key: value for key, value in data.items() if key in types}
    check_sizes({key: size for key, size in sizes.items() if size is not None or types[key] == "int"}, where)


def check_sizes(sizes: dict[str, Any], where: str) -> None:
    """Raises `CheckpointError` naming the first size that is no positive whole number."""
    for key, value in sizes.items():
        if not is_whole(value) or value < 1:
            raise CheckpointError(f"{where}: {key} is {value!r}; it must be a positive whole number")


QWEN2_5_1_5B = LlmGeometry(1536, 8960, 28, 12, 2, tie_word_embeddings=True, vocab_size=151936)
QWEN2_5_7B = LlmGeometry(3584, 18944, 28, 28, 4, vocab_size=152064)

BUILT_IN_LLMS = {
    "Qwen/Qwen2.5-1.5B-Instruct": QWEN2_5_1_5B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN2_5_7B,
}

HQ_SIZES = (512, 1024)


def unsuited_size(name: object, native_grid: tuple[int, int]) -> str | None:
    """What to say of a checkpoint whose own size is not one that it was made for, going by its hub id or folder.

    The released HQ model was trained at two sizes, and its config may say neither.
    """
    side = min(native_grid) * PIXELS_PER_TOKEN
    called = re.findall(r"show-?o2[^/]*", str(name), re.IGNORECASE)
    if side >= HQ_SIZES[0] or not called or "hq" not in called[-1].lower():
        return None
    sizes = " and ".join(f"{size}x{size}" for size in HQ_SIZES)
    return (
        f"{name} is made for {sizes} pixels, but its config says {side} a side; no size was given, so pictures are "
        f"{side} a side. Give {HQ_SIZES[0]} or {HQ_SIZES[1]}"
    )


def token_grid(size: int | tuple[int, int] | None, native_grid: tuple[int, int]) -> tuple[int, int]:
    """Pixels to a token grid (height, width).

    `size` is pixels per side, or (height, width) in pixels, or None for the native size.
    Raises `InputError` unless each side is a positive multiple of 16.
    """
    if size is None:
        return native_grid
    sides = tuple(size) if isinstance(size, Iterable) else (size, size)
    if len(sides) != 2 or not all(map(is_whole, sides)):
        raise InputError(f"size is {size!r}; give pixels per side, or (height, width)")
    height, width = sides
    for side in (height, width):
        if side <= 0 or side % PIXELS_PER_TOKEN:
            lower = max(side // PIXELS_PER_TOKEN, 1) * PIXELS_PER_TOKEN
            raise InputError(
                f"image size {height}x{width}: each side must be a multiple of {PIXELS_PER_TOKEN} pixels; "
                f"next to {side} are {lower} and {lower + PIXELS_PER_TOKEN}"
            )
    return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
