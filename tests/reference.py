"""Reference folders (tests/golden/README.md) as models and tensors: geometry from their meta.json alone."""

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file

from flashu import sampler
from flashu.acceleration.wanda import WandaScores
from flashu.checkpoints.weights import assign_weights
from flashu.fingerprint import fingerprint
from flashu.models import Showo2Qwen2_5, WanImageVAE
from flashu.models.geometry import HeadGeometry, LlmGeometry, Showo2Config, VaeGeometry, VisionGeometry
from flashu.models.wan_vae import fold


class GoldenModel:
    """A reference folder of Show-o2: the model with its weights, the prompts' rows, the expected tensors."""

    def __init__(self, folder: Path, device="cpu", dtype=torch.float32):
        self.meta = json.loads((folder / "meta.json").read_text())
        self.expected = load_file(folder / "expected.safetensors", device=str(device))
        weights = load_file(folder / "weights.safetensors")
        weights = {key.removeprefix("state."): value for key, value in weights.items()}
        with torch.device("meta"):
            self.model = Showo2Qwen2_5(showo2_config(self.meta["spec"]))
        assign_weights(self.model, weights, folder, dtype, device, optional=["showo.lm_head.weight"])
        self.model.showo.tie_weights()

        ids = self.meta["token_ids"]
        limit = self.meta["max_text_len"]
        self.rows = [[ids["bos"], *text[:limit], ids["boi"]] for text in self.meta["prompt_token_ids"]]
        self.null_rows = [[ids["bos"], ids["boi"]]] * len(self.rows)
        self.grid = self.model.config.native_grid

    def prefix(self):
        return self.model.encode_prefix(self.rows + self.null_rows, self.grid)

    def prompt_tokens(self, prompts, guided=True):
        """The rows of some prompts, by number, as the sampler takes them."""
        ids, length = self.meta["token_ids"], self.expected["text_tokens"].shape[1]
        prefixes = [self.rows[i] for i in prompts] + [self.null_rows[i] for i in prompts] * guided
        after = [length - len(row) - 1 - self.grid[0] * self.grid[1] for row in prefixes]
        suffixes = [[ids["eoi"], ids["eos"], *[ids["pad"]] * (count - 2)] for count in after]
        return sampler.PromptTokens(prefixes, suffixes, self.grid)

    def scores(self):
        """The reference's Wanda scores."""
        layers = range(self.model.config.llm.num_hidden_layers)
        ffn, attention = (
            [self.expected[f"wanda_tokens_only.model.layers.{i}.{name}"] for i in layers]
            for name in ("mlp.down_proj", "self_attn.o_proj")
        )
        return WandaScores(ffn, attention, fingerprint(self.model))


def load_vae(folder: Path, device="cpu"):
    """A reference folder's VAE and expected tensors."""
    meta = json.loads((folder / "meta.json").read_text())
    with torch.device("meta"):
        vae = WanImageVAE(VaeGeometry.from_dict(meta, str(folder)))
    assign_weights(vae, fold(load_file(folder / "weights.safetensors")), folder, device=device)
    return vae, load_file(folder / "expected.safetensors", device=str(device))


def showo2_config(spec: dict) -> Showo2Config:
    vision = spec["vision"]
    return Showo2Config(
        llm=_pick(LlmGeometry, spec["llm"]),
        llm_vocab_size=spec["llm"]["vocab_size"],
        vision=VisionGeometry(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_hidden_layers=vision["num_hidden_layers"] - 1,  # Show-o2 drops SigLIP's last layer
            num_attention_heads=vision["num_attention_heads"],
            grid=vision["image_size"] // vision["patch_size"],
            layer_norm_eps=vision["layer_norm_eps"],
        ),
        head=_pick(HeadGeometry, spec["head"]),
        **{
            key: spec["showo"][key]
            for key in ("image_latent_dim", "image_latent_height", "image_latent_width", "num_diffusion_layers")
        },
    )


def _pick(cls, values):
    return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def relative_error(actual, expected):
    """The largest difference, as a share of the expected tensor's largest magnitude."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
