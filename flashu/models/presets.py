"""The models whose sizes are known by name. The geometry of the embedded one stands here and nowhere else."""

from __future__ import annotations

from dataclasses import replace

from flashu.config import EMBEDDED_GUIDANCE
from flashu.errors import InputError
from flashu.models.geometry import (
    QWEN2_5_1_5B,
    QWEN2_5_7B,
    HeadGeometry,
    LlmGeometry,
    Showo2Config,
    VaeGeometry,
    VisionGeometry,
)

_SHOWO2_1_5B = Showo2Config(llm=QWEN2_5_1_5B, llm_model_path="Qwen/Qwen2.5-1.5B-Instruct")

PRESETS = {
    "show-o2-1.5b": _SHOWO2_1_5B,
    "show-o2-1.5b-hq-512": replace(_SHOWO2_1_5B, image_latent_height=32, image_latent_width=32),
    "show-o2-1.5b-hq-1024": replace(_SHOWO2_1_5B, image_latent_height=64, image_latent_width=64),
    "show-o2-7b": Showo2Config(llm=QWEN2_5_7B, llm_model_path="Qwen/Qwen2.5-7B-Instruct"),
    # The small model that ships with the package: 64x64 pixels, 16 image tokens, about 5 million parameters. It was
    # trained by benchmarks/train_shapes.py.
    "embedded": Showo2Config(
        llm=LlmGeometry(192, 320, 10, 6, 2, tie_word_embeddings=True),
        llm_vocab_size=512,
        image_latent_dim=8,
        image_latent_height=4,
        image_latent_width=4,
        num_diffusion_layers=3,
        max_prompt_tokens=60,
        guidance_scale=EMBEDDED_GUIDANCE,
        vision=VisionGeometry(128, 256, 3, 4, grid=4),
        head=HeadGeometry(192, 320, 6, 2, 32),
    ),
}

VAE_PRESETS = {name: VaeGeometry() for name in PRESETS} | {
    "embedded": VaeGeometry(
        dim=16,
        z_dim=8,
        dim_mult=(1, 2, 3, 3),
        num_res_blocks=1,
        latent_mean=(0.0,) * 8,
        latent_std=(1.0,) * 8,
    )
}


def preset(name: str) -> tuple[Showo2Config, VaeGeometry]:
    """The model and VAE geometry known by `name`. Raises `InputError` with the list of names."""
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name], VAE_PRESETS[name]
