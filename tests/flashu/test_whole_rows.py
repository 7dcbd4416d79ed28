"""Against the network written out the long way: whole rows, a dense mask, plain arithmetic, every position every time.

Covers the sizes that the reference folders do not: an LLM as wide as the head, images that are not square, a single
row, rows of mixed lengths, tied and untied output heads.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from random_weights import random_model

from flashu.acceleration.layer_skipping import importance
from flashu.models import Showo2Qwen2_5
from flashu.models.geometry import HeadGeometry, LlmGeometry, Showo2Config, VisionGeometry
from tests.bounds import EVALUATION
from tests.reference import relative_error

ROWS = {
    "one row": [[1, 7, 2]],
    "guided": [[1, 5, 6, 2], [1, 2]],
    "two guided images": [[1, 5, 6, 7, 8, 2], [1, 9, 2], [1, 2], [1, 4, 2]],
    "equal lengths": [[1, 5, 2], [1, 6, 2]],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (6, 2)], ids=str)
@pytest.mark.parametrize(("llm_hidden", "tied"), [(64, True), (96, False)], ids=["wide as the head", "wider"])
@torch.no_grad()
def test_velocity_and_layer_similarity(rows, grid, llm_hidden, tied):
    config = Showo2Config(
        llm=LlmGeometry(llm_hidden, 160, 4, 4, 2, tie_word_embeddings=tied),
        llm_vocab_size=50,
        image_latent_height=grid[0],
        image_latent_width=grid[1],
        num_diffusion_layers=3,
        vision=VisionGeometry(32, 80, 2, 4, grid=4),
        head=HeadGeometry(64, 128, 4, 2, 16),
    )
    model = random_model(Showo2Qwen2_5, config, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    images = max(1, len(rows) // 2)
    latents = torch.randn(images, 16, 2 * grid[0], 2 * grid[1], generator=generator)
    length = max(map(len, rows)) + grid[0] * grid[1] + 6
    suffixes = [[3] * (length - len(row) - 1 - grid[0] * grid[1]) for row in rows]

    expected_velocity, expected_similarity = whole_rows(model, rows, latents, 0.37, grid, length)
    time = model.embed_times(torch.tensor([0.37])).at(0)
    assert (
        relative_error(model.velocity(latents, time, model.encode_prefix(rows, grid)), expected_velocity) < EVALUATION
    )
    _, similarity = model.measure_llm(latents, time, model.encode_prefix(rows, grid, suffixes=suffixes))
    ours, theirs = importance(similarity, images), importance(expected_similarity, images)
    assert (ours - theirs).abs().max() < EVALUATION, "of similarities, which reach 1"


def whole_rows(model, rows, latents, t, grid, length):
    """Velocities, and each row's and layer's mean cosine similarity of input and output."""
    config, tokens = model.config, grid[0] * grid[1]
    time = model.time_embed(torch.tensor([t]))
    side = config.vision.grid
    positions = model.position_embedding.weight.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    und, gen = (
        F.conv2d(latents, embedder.proj.weight, embedder.proj.bias, stride=2).flatten(2).mT
        for embedder in (model.image_embedder_und, model.image_embedder_gen)
    )
    semantic = model.und_trans(und + positions.reshape(1, tokens, -1))
    image = model.fusion_proj(torch.cat((semantic, gen), dim=-1))
    image = image.repeat(len(rows) // len(latents), 1, 1)

    x = model.showo.model.embed_tokens(torch.tensor([row + [3] * (length - len(row)) for row in rows]))
    mask = torch.ones(length, length).tril().bool().repeat(len(rows), 1, 1)
    spans = [slice(len(row), len(row) + 1 + tokens) for row in rows]
    for number, span in enumerate(spans):
        x[number, span] = torch.cat((model.time_embed_proj(time), image[number]))
        mask[number, span, span] = True

    llm, similarities = model.showo.model, []
    for number, layer in enumerate(llm.layers):
        before = x
        x = x + attend(layer.self_attn, rms(x, layer.input_layernorm), config.llm.rope_theta, mask)
        x = x + ffn(layer.mlp, rms(x, layer.post_attention_layernorm))
        after = rms(x, llm.norm) if number == len(llm.layers) - 1 else x
        similarities.append(F.cosine_similarity(before, after, dim=-1).mean(dim=1))
    x = model.diff_proj(rms(x, llm.norm))

    for block in model.diffusion_head_a:
        steer = torch.zeros(6, *x.shape)
        steer[[2, 5]] = 1
        for number, span in enumerate(spans):
            steer[:, number, span] = block.adaLN_modulation(time)[0].reshape(6, 1, -1)
        inner = rms(x, block.input_layernorm) * (1 + steer[1]) + steer[0]
        x = x + steer[2] * attend(block.self_attn, inner, 500_000.0, mask, llama3=True)
        inner = rms(x, block.post_attention_layernorm) * (1 + steer[4]) + steer[3]
        x = x + steer[5] * ffn(block.mlp, inner)
    x = torch.stack([x[number, span][1:] for number, span in enumerate(spans)])
    final = model.diffusion_head_b
    shift, scale = final.adaLN_modulation(time)[0].chunk(2)
    x = final.linear(rms(x, final.norm_final) * (1 + scale) + shift)
    x = x.reshape(len(rows), *grid, 2, 2, 16).reshape(len(rows), -1, 16).movedim(2, 1)
    return x.reshape(len(rows), 16, 2 * grid[0], 2 * grid[1]), torch.stack(similarities, dim=1)


def rms(x, norm):
    return x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def ffn(mlp, x):
    gate = mlp.gate_proj(x)
    return mlp.down_proj(gate * gate.sigmoid() * mlp.up_proj(x))


def attend(attention, x, theta, mask, llama3=False):
    def heads(projection):
        return projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query, key, value = heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj)
    if llama3:
        query, key = rms(query, attention.q_norm), rms(key, attention.k_norm)
    query, key = (rotate(states, theta, llama3) for states in (query, key))
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    scores = query @ key.mT / math.sqrt(attention.head_dim)
    weights = scores.masked_fill(~mask[:, None], -math.inf).softmax(dim=-1)
    return attention.o_proj((weights @ value).transpose(1, 2).flatten(2))


def rotate(x, theta, llama3):
    """Each pair (i, i + half) turned by its position times its frequency, as complex numbers."""
    half = x.shape[-1] // 2
    frequencies = [theta ** (-i / half) for i in range(half)]
    if llama3:
        frequencies = [slowed(frequency) for frequency in frequencies]
    turns = torch.outer(torch.arange(x.shape[2]).double(), torch.tensor(frequencies).double())
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(turns), turns)
    return torch.cat((turned.real, turned.imag), dim=-1).float()


def slowed(frequency, factor=32.0, low=1.0, high=4.0, original=8192):
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency
