"""The real sizes without real weights: names, shapes and counts on `meta`, against independent sources.

The LLM's come from transformers at Qwen2.5's published config, the semantic layers' from its SigLIP so400m; the rest is
written out below from the released geometry.
"""

from math import prod

import pytest
import torch

from flashu.models import Showo2Qwen2_5
from flashu.models.presets import PRESETS

QWEN2_5 = {
    "1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def llm_shapes(size):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        oracle = Qwen2ForCausalLM(Qwen2Config(vocab_size=151669, num_hidden_layers=28, **QWEN2_5[size]))
    return {f"showo.{name}": tuple(value.shape) for name, value in oracle.state_dict().items()}


def semantic_shapes():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    with torch.device("meta"):
        oracle = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                image_size=384, patch_size=14,
            )
        )  # fmt: skip
    return {
        "und_trans." + name.split("encoder.", 1)[1]: tuple(value.shape)
        for name, value in oracle.state_dict().items()
        if "encoder.layers." in name and "layers.26." not in name
    }


def own_shapes(llm):
    """What Show-o2 adds, `llm` being the LLM's hidden size."""
    shapes = {
        "image_embedder_und.proj.weight": (1152, 16, 2, 2),
        "image_embedder_und.proj.bias": (1152,),
        "image_embedder_gen.proj.weight": (llm, 16, 2, 2),
        "image_embedder_gen.proj.bias": (llm,),
        "position_embedding.weight": (729, 1152),
        "fusion_proj.0.weight": (1152 + llm,),
        "fusion_proj.1.weight": (llm, 1152 + llm),
        "fusion_proj.1.bias": (llm,),
        "fusion_proj.3.weight": (llm, llm),
        "fusion_proj.3.bias": (llm,),
        "time_embed.mlp.0.weight": (2048, 256),
        "time_embed.mlp.0.bias": (2048,),
        "time_embed.mlp.2.weight": (2048, 2048),
        "time_embed.mlp.2.bias": (2048,),
        "time_embed_proj.weight": (llm, 2048),
        "time_embed_proj.bias": (llm,),
        "diff_proj.0.weight": (2048, llm),
        "diff_proj.0.bias": (2048,),
        "diff_proj.2.weight": (2048, 2048),
        "diff_proj.2.bias": (2048,),
        "diffusion_head_b.norm_final.weight": (2048,),
        "diffusion_head_b.linear.weight": (64, 2048),
        "diffusion_head_b.linear.bias": (64,),
        "diffusion_head_b.adaLN_modulation.1.weight": (4096, 2048),
        "diffusion_head_b.adaLN_modulation.1.bias": (4096,),
    }
    for block in range(10):
        shapes |= {
            f"diffusion_head_a.{block}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (2048,),
                "self_attn.q_proj.weight": (2048, 2048),
                "self_attn.k_proj.weight": (512, 2048),
                "self_attn.v_proj.weight": (512, 2048),
                "self_attn.o_proj.weight": (2048, 2048),
                "self_attn.q_norm.weight": (64,),
                "self_attn.k_norm.weight": (64,),
                "post_attention_layernorm.weight": (2048,),
                "mlp.gate_proj.weight": (8192, 2048),
                "mlp.up_proj.weight": (8192, 2048),
                "mlp.down_proj.weight": (2048, 8192),
                "adaLN_modulation.1.weight": (12288, 2048),
                "adaLN_modulation.1.bias": (12288,),
            }.items()
        }
    return shapes


@pytest.mark.parametrize(
    ("preset", "llm", "tokens", "billions"),
    [
        ("show-o2-1.5b", "1.5b", 729, 2.83),
        ("show-o2-1.5b-hq-512", "1.5b", 1024, 2.83),
        ("show-o2-1.5b-hq-1024", "1.5b", 4096, 2.83),
        ("show-o2-7b", "7b", 729, 8.93),
    ],
)
def test_released_models_have_the_released_parameters(preset, llm, tokens, billions):
    with torch.device("meta"):
        model = Showo2Qwen2_5(PRESETS[preset])
    expected = llm_shapes(llm) | semantic_shapes() | own_shapes(QWEN2_5[llm]["hidden_size"])
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    tied = prod(expected["showo.lm_head.weight"]) if QWEN2_5[llm]["tie_word_embeddings"] else 0
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(map(prod, expected.values())) - tied
    assert round(count / 1e9, 2) == billions
    assert PRESETS[preset].image_latent_height * PRESETS[preset].image_latent_width == tokens
