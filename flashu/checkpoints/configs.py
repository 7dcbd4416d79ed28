"""A checkpoint's `config.json` to the shapes of its networks, with the configs of the parts that it names.

The config of an LLM or a SigLIP that is not known by name is read by transformers, which imports torch if it can.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from flashu.arguments import is_finite
from flashu.checkpoints.files import CONFIG, read_json
from flashu.checkpoints.hub import resolve_folder
from flashu.errors import CheckpointError
from flashu.models.geometry import (
    BUILT_IN_LLMS,
    SIGLIP,
    LlmGeometry,
    Showo2Config,
    VisionGeometry,
    check_class,
    check_sizes,
    check_told_sizes,
    geometry_from_dict,
)

_SIGLIP_ACTIVATION = "gelu_pytorch_tanh"


def read_config(config_file: Path) -> Showo2Config:
    """A Show-o2 `config.json`, its LLM's geometry looked up. Raises `CheckpointError`."""
    data = read_json(config_file)
    check_class(data, config_file)
    return Showo2Config.from_dict(
        data, _llm_geometry(data, config_file), _vision_geometry(data, config_file), str(config_file)
    )


def _llm_geometry(data: dict[str, Any], config_file: Path) -> LlmGeometry:
    if "llm_config" in data:
        return geometry_from_dict(LlmGeometry, data["llm_config"], f"{config_file}: llm_config")
    name = data.get("llm_model_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{config_file} names no LLM (llm_model_path); it is not a Show-o2 config")
    return BUILT_IN_LLMS.get(name) or read_llm_geometry(_config_of(name, "an LLM (llm_model_path)", config_file))


def _vision_geometry(data: dict[str, Any], config_file: Path) -> VisionGeometry:
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


def read_llm_geometry(config_file: Path) -> LlmGeometry:
    """The geometry in a Qwen2.5 folder's `config.json`. What the file leaves out is as in transformers.

    Raises `CheckpointError` for another architecture, and sizes that cannot be.
    """
    data = read_json(config_file)
    if data.get("model_type", "qwen2") != "qwen2":
        raise CheckpointError(f"{config_file} is a {data['model_type']!r} model; Show-o2's LLM is a qwen2 (Qwen2.5)")
    rope = data.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{config_file}: rope_parameters is a JSON {type(rope).__name__}, not an object")
    check_told_sizes(LlmGeometry, data, str(config_file))
    names = [each.name for each in fields(LlmGeometry)]
    told = {name: data[name] for name in names if data.get(name) is not None}
    config = _read_with("Qwen2Config", told | {"rope_parameters": rope or None}, config_file)
    own = {name: getattr(config, name) for name in names if name != "rope_theta"}
    if "vocab_size" in data and data["vocab_size"] is None:  # then Show-o2's config is to say it
        own["vocab_size"] = None
    return LlmGeometry(**own, rope_theta=_rope_theta(config, config_file))


def read_vision_geometry(config_file: Path) -> VisionGeometry:
    """The geometry in a SigLIP folder's `config.json`, as Show-o2 keeps it: without the last layer.

    What the file leaves out is as in transformers.

    Raises `CheckpointError` for another architecture, and sizes that cannot be.
    """
    data = read_json(config_file)
    if data.get("model_type", "siglip") not in ("siglip", "siglip_vision_model"):
        raise CheckpointError(f"{config_file} is a {data['model_type']!r} model; Show-o2's vision is a SigLIP's")
    nested = data.get("vision_config", {} if data.get("model_type") == "siglip" else data)
    if not isinstance(nested, dict):
        raise CheckpointError(f"{config_file}: vision_config is a JSON {type(nested).__name__}, not an object")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    told = {key: nested[key] for key in (*sizes, "hidden_act", "layer_norm_eps") if key in nested}
    check_sizes({key: told[key] for key in sizes if key in told}, str(config_file))
    config = _read_with("SiglipVisionConfig", told, config_file)
    if config.hidden_act != _SIGLIP_ACTIVATION:
        raise CheckpointError(
            f"{config_file}: hidden_act is {config.hidden_act!r}; only {_SIGLIP_ACTIVATION} is supported"
        )
    layers, grid = config.num_hidden_layers - 1, config.image_size // config.patch_size
    if layers < 1 or grid < 1:
        raise CheckpointError(f"{config_file}: its layers but the last, and its image's patches, must be at least one")
    return VisionGeometry(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=config.num_attention_heads,
        grid=grid,
        layer_norm_eps=config.layer_norm_eps,
    )


def _read_with(config_class: str, data: dict[str, Any], config_file: Path) -> Any:
    """A config of transformers' class of that name, from a file's `data`. Raises `CheckpointError`."""
    import transformers  # takes seconds, and a released model's sizes are known without it

    made_by = getattr(transformers, config_class)
    try:
        return made_by(**data)
    except Exception as error:  # whatever it raises over values that it does not take
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{config_file} cannot be read as a {config_class}: {reason}") from None


def _rope_theta(config: Any, config_file: Path) -> float:
    """A Qwen2Config's, which versions of transformers keep in two places."""
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(config, "rope_theta", None))
    if not is_finite(theta) or theta <= 0:
        raise CheckpointError(f"{config_file}: rope_theta is {theta!r}; it must be a positive number")
    return theta
