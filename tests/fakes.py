"""Small checkpoints laid out like the releases, with random weights: what tests load instead of gigabytes.

`write_release_folder` makes a whole folder; the other functions make its parts, for tests that arrange their own.
"""

import json
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from random_weights import random_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from flashu.models import Showo2Qwen2_5
from flashu.models.geometry import HeadGeometry, LlmGeometry, Showo2Config, VisionGeometry
from flashu.tokenizer import PromptTokenizer

GOLDEN_VAE = Path(__file__).parent / "golden" / "vae_tiny" / "weights.safetensors"
VAE_FILE = "Wan2.1_VAE.pth"

# Qwen2.5's added tokens, in its order; the vocabulary proper comes before them.
QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = (("Ġ", "r"), ("e", "d"), ("Ġr", "ed"), ("c", "i"), ("Ġ", "a"))

VOCAB_SIZE = 256 + len(MERGES) + len(QWEN_TOKENS) + 4

# Every part of the network at its smallest, with an LLM and a head of different widths, as in the releases.
LLM = LlmGeometry(48, 96, 3, 4, 2, tie_word_embeddings=True, vocab_size=VOCAB_SIZE)
CONFIG = Showo2Config(
    llm=LLM,
    llm_vocab_size=VOCAB_SIZE,
    image_latent_height=4,
    image_latent_width=4,
    num_diffusion_layers=2,
    vision=VisionGeometry(32, 88, 2, 4, grid=4),
    head=HeadGeometry(64, 128, 4, 2, 16),
)

# File names of weights, from a suffix for shards, and the name of their index. The first two are what the release's
# `save_pretrained` writes; the others are those of transformers and diffusers, and of the release with `variant=`.
LAYOUTS = {
    "bin": ("pytorch_model{suffix}.bin", None),
    "sharded bin": ("pytorch_model{suffix}.bin", "diffusion_pytorch_model.bin.index.json"),
    "sharded bin, transformers": ("pytorch_model{suffix}.bin", "pytorch_model.bin.index.json"),
    "sharded bin, no index": ("pytorch_model{suffix}.bin", ""),
    "legacy bin": ("pytorch_model{suffix}.bin", None),
    "diffusers bin": ("diffusion_pytorch_model{suffix}.bin", None),
    "variant bin": ("pytorch_model{suffix}.bf16.bin", None),
    "sharded variant bin": ("pytorch_model{suffix}.bf16.bin", "diffusion_pytorch_model.bin.index.bf16.json"),
    "safetensors": ("model{suffix}.safetensors", None),
    "released safetensors": ("pytorch_model{suffix}.safetensors", None),
    "sharded safetensors": ("model{suffix}.safetensors", "model.safetensors.index.json"),
    "sharded released safetensors": (
        "pytorch_model{suffix}.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ),
    "sharded safetensors, no index": ("model{suffix}.safetensors", ""),
    "sharded variant safetensors, transformers": (
        "model.fp16{suffix}.safetensors",
        "model.safetensors.index.fp16.json",
    ),
    "diffusers safetensors": ("diffusion_pytorch_model{suffix}.safetensors", None),
}


# ------------------------------------------------------------------------------------------------ whole folders


def write_showo2(folder, layout="bin", config=CONFIG, seed=0, dtype=torch.float32, tensors=None, llm="llm"):
    """What the release's repository holds: config.json and weights. `llm` is what the config calls its LLM."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config, llm)
    write_weights(folder, tensors or weights(config, seed, dtype), layout)
    return folder


def write_release_folder(folder, config=CONFIG, **options):
    """A Show-o2 release, and inside it the folder of its LLM, so that the model loads with no download."""
    write_showo2(folder, config=config, **options)
    write_llm_folder(folder / "llm", config.llm)
    return folder


def write_whole_folder(folder, **options):
    """A release with its LLM and VAE in its folder, so that it makes pictures with no download."""
    write_release_folder(folder, **options)
    write_released_vae(folder / VAE_FILE)
    return folder


# ---------------------------------------------------------------------------------------------------- their parts


def weights(config=CONFIG, seed=0, dtype=torch.float32):
    """The model's state dict, of tensors that nobody changes. Where the LLM is tied, both names share one tensor, as in
    a trained model."""
    return dict(_weights(config, seed, dtype))


@cache
def _weights(config, seed, dtype):
    return random_model(Showo2Qwen2_5, config, seed, dtype).state_dict()


def write_weights(folder, tensors, layout, shards=3):
    """Write `tensors` under the names, and in the formats, that releases and tools use."""
    pattern, index = LAYOUTS[layout]
    total = sum(tensor.nbytes for tensor in tensors.values())
    if pattern.endswith(".safetensors"):
        tensors = without_tied_head(tensors)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=pattern, max_shard_size=2 * total if index is None else total // shards
    )
    for name, keys in split.filename_to_tensors.items():
        part = {key: tensors[key] for key in keys}
        if pattern.endswith(".safetensors"):
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name, _use_new_zipfile_serialization=layout != "legacy bin")
    if index:
        write_index(folder / index, split.tensor_to_filename)


def without_tied_head(tensors):
    """What transformers writes into safetensors files, which cannot hold one tensor under two names."""
    embedding, head = tensors["showo.model.embed_tokens.weight"], tensors.get("showo.lm_head.weight")
    tied = head is not None and head.data_ptr() == embedding.data_ptr()
    return {key: tensor for key, tensor in tensors.items() if not (tied and key == "showo.lm_head.weight")}


def write_index(file, weight_map):
    file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_config(folder, config=CONFIG, llm="llm"):
    """A config.json with the release's keys, and two more for sizes that the release leaves to hub ids."""
    data = {**config.to_dict(), "_diffusers_version": "0.30.1", "llm_model_path": llm}
    del data["llm_config"]
    (folder / "config.json").write_text(json.dumps(data, indent=2))


def write_llm_folder(folder, llm=LLM):
    """A Qwen2.5 folder without weights: config.json and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": llm.intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": llm.num_attention_heads,
        "num_hidden_layers": llm.num_hidden_layers,
        "num_key_value_heads": llm.num_key_value_heads,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_theta": llm.rope_theta,
        "sliding_window": 32768,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder)


def released_vae():
    """The state dict of a small `Wan2.1_VAE.pth`: 3-D kernels and temporal convolutions, as the release has them."""
    return load_file(GOLDEN_VAE)


def write_released_vae(file):
    torch.save(released_vae(), file)
    return file


def write_tokenizer(folder):
    qwen_tokenizer().save(str(folder / "tokenizer.json"))


def write_slow_tokenizer(folder, vocabulary, merges, tokens=None):
    """Qwen2.5's tokenizer of this vocabulary, as transformers' slow Qwen2Tokenizer saved itself (version 4): no
    `tokenizer.json`. `tokens` are what was added, in order; Qwen2.5's own if left out."""
    tokens = tokens or qwen_added_tokens()
    folder.mkdir(parents=True, exist_ok=True)
    flags = ("lstrip", "normalized", "rstrip", "single_word")
    told = [{"content": token.content} | {flag: getattr(token, flag) for flag in flags} for token in tokens]
    ids = {token.content: len(vocabulary) + index for index, token in enumerate(tokens)}
    special = [token.content for token in tokens if token.special]
    end, others = special[0], [content for content in special[1:] if content != "[PAD]"]
    pad = "[PAD]" if "[PAD]" in special else end
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(ids[token.content]): facts | {"special": token.special}
            for token, facts in zip(tokens, told, strict=True)
        },
        "additional_special_tokens": others,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": pad,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": end,
    }
    by_content = {facts["content"]: facts for facts in told}
    special_tokens = {
        "additional_special_tokens": [by_content[content] for content in others],
        "eos_token": "<|im_end|>",
        "pad_token": by_content[pad],
        "unk_token": by_content[end],
    }
    for name, data in (
        ("vocab.json", vocabulary),
        ("added_tokens.json", ids),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special_tokens),
    ):
        (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")


def extended_tokenizer():
    return PromptTokenizer(qwen_tokenizer())


def qwen_tokenizer():
    """Qwen2.5's tokenizer with five merges instead of 151387: the same pipeline, the same added tokens in order."""
    return qwen_pipeline(small_vocabulary(), MERGES)


def small_vocabulary():
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]
    return {piece: index for index, piece in enumerate(pieces)}


def qwen_pipeline(vocabulary, merges):
    """Qwen2.5's tokenizer of this vocabulary, with its 22 added tokens, of which the last eight are not special."""
    tokenizer = Tokenizer(BPE(vocabulary, list(merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(qwen_added_tokens())
    return tokenizer


def qwen_added_tokens():
    return [AddedToken(token, normalized=False, special=token not in QWEN_TOKENS[14:]) for token in QWEN_TOKENS]
