"""Show-o2 assembled from transformers' stock modules, and run as its release and FlashU's run it.

The baseline that `gpu.py` measures against; `release_vae.py` is its other half. Here nothing is saved: on every step
both guidance rows of every image go whole, padding and all, through the image path, the LLM under a dense mask (whose
states of all layers are kept), the logits of every token, and the head. FlashU's pruned FFNs are second copies of the
weights; layers are skipped by one measurement for the whole batch; a step that reuses the head's output still runs all
that comes before the head's blocks. And the places of the images are known on the device only, so that the host waits
for it whenever it cuts one out of its row.

Beyond geometry and the rules of which step does what, only the time embedder is `flashu`'s, so what the library
gains does not speed up its baseline. Parameter names are those of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from release_modules import Batch, FinalLayer, HeadBlock, PatchEmbed, head_config, llm_config, vision_config
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from flashu.acceleration import ffn_pruning, layer_skipping
from flashu.acceleration.head_cache import Head
from flashu.acceleration.plan import Llm, PlannedStep
from flashu.config import FlashUConfig
from flashu.models import Showo2Qwen2_5
from flashu.models.geometry import PATCH_SIZE, Showo2Config
from flashu.models.patches import unpatchify
from flashu.models.times import TimestepEmbedder
from flashu.sampler import PromptTokens


class ReleaseShaped(nn.Module):
    def __init__(self, config: Showo2Config):
        super().__init__()
        self.config = config
        llm, vision, head = config.llm.hidden_size, config.vision.hidden_size, config.head.hidden_size
        self.showo = Qwen2ForCausalLM(llm_config(config))
        self.image_embedder_und = PatchEmbed(config.image_latent_dim, vision)
        self.image_embedder_gen = PatchEmbed(config.image_latent_dim, llm)
        self.position_embedding = nn.Embedding(config.vision.grid**2, vision)
        self.und_trans = SiglipEncoder(vision_config(config.vision))
        self.fusion_proj = nn.Sequential(
            Qwen2RMSNorm(vision + llm, eps=1e-6), nn.Linear(vision + llm, llm), nn.GELU(), nn.Linear(llm, llm)
        )
        self.time_embed = TimestepEmbedder(head)
        if llm != head:
            self.time_embed_proj = nn.Linear(head, llm)
            self.diff_proj = nn.Sequential(nn.Linear(llm, head), nn.GELU(), nn.Linear(head, head))
        else:
            self.time_embed_proj = self.diff_proj = nn.Identity()
        blocks = head_config(config.head)
        self.diffusion_head_a = nn.ModuleList(HeadBlock(blocks) for _ in range(config.num_diffusion_layers))
        self.diffusion_head_b = FinalLayer(head, PATCH_SIZE**2 * config.image_latent_dim)
        self.head_rotary = Qwen3RotaryEmbedding(blocks)
        self.whole_ffns: list[nn.Module] = [layer.mlp for layer in self.showo.model.layers]
        self.pruned_ffns: list[nn.Module] = self.whole_ffns

    @classmethod
    def sharing(cls, model: Showo2Qwen2_5) -> ReleaseShaped:
        """The same network over the very parameters of `model`: no second copy, wherever they lie."""
        with torch.device("meta"):
            release = cls(model.config)
        release.load_state_dict(dict(model.named_parameters(remove_duplicate=False)), assign=True)
        # Frequencies are made by their modules, and are no parameters.
        release.showo.model.rotary_emb = Qwen2RotaryEmbedding(release.showo.config).to(model.device)
        release.head_rotary = Qwen3RotaryEmbedding(head_config(model.config.head)).to(model.device)
        return release.eval()

    @property
    def device(self) -> torch.device:
        return self.showo.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.showo.model.embed_tokens.weight.dtype

    @torch.no_grad()
    def prune_ffns(self, scores: Sequence[Tensor], ratio: float) -> None:
        """Gather each layer's most important neurons, by `scores` (neurons,), into weights of their own."""
        kept = ffn_pruning.kept_neurons(self.config.llm.intermediate_size, ratio)
        self.pruned_ffns = []
        for whole, layer_scores in zip(self.whole_ffns, scores, strict=True):
            neurons = layer_scores.topk(kept).indices.sort().values.to(self.device)
            with torch.device("meta"):
                pruned = Qwen2MLP(llm_config(self.config, kept))
            weights = {
                "gate_proj.weight": whole.gate_proj.weight[neurons],
                "up_proj.weight": whole.up_proj.weight[neurons],
                "down_proj.weight": whole.down_proj.weight[:, neurons].contiguous(),
            }
            pruned.load_state_dict(weights, assign=True)
            self.pruned_ffns.append(pruned)

    def forget_pruned_ffns(self) -> None:
        self._use_ffns(self.whole_ffns)
        self.pruned_ffns = self.whole_ffns

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        rows: PromptTokens,
        time_points: Tensor,
        steps: Sequence[PlannedStep],
        layers_to_skip: int = 0,
    ) -> Tensor:
        """From `noise` (images, channels, height, width) to latents, float32, by one step an interval: those of
        `release_plan`.

        `rows` are guided ones. `layers_to_skip` layers are chosen by the steps that measure.
        """
        batch = Batch.of(rows, self.device, self.dtype)
        latents = torch.cat((noise, noise)).to(self.device, self.dtype).float()
        skipped: Collection[int] = ()
        stored = None
        for step, (t, later) in zip(steps, pairwise(time_points.to(self.device)), strict=True):
            time = self.time_embed(t.expand(len(latents)))
            states = self.run_llm(
                self.embed_rows(latents, time, batch), batch, step.llm is Llm.FULL, skipped if step.skip else ()
            )
            if step.measure:
                skipped = least_important(states, layers_to_skip)
            features = self.run_head(states[-1], time, batch, stored if step.head is Head.REUSE else None)
            stored = None if step.head is Head.COMPUTE else features
            velocity = self.guide(self.run_final(features, time, batch), step.guidance)
            latents = latents + (later - t) * velocity.float()
        return latents.chunk(2)[0]

    def velocity(self, latents: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """One evaluation of it all: latents (rows, channels, height, width) at time `t` to their velocity."""
        time = self.time_embed(t.expand(len(latents)))
        states = self.run_llm(self.embed_rows(latents, time, batch), batch)
        return self.run_final(self.run_head(states[-1], time, batch), time, batch)

    def guide(self, velocity: Tensor, scale: float) -> Tensor:
        """The guided velocity, for both rows of each image."""
        conditional, unconditional = velocity.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        return torch.cat((guided, guided))

    def embed_rows(self, latents: Tensor, time: Tensor, batch: Batch) -> Tensor:
        """Every row's embeddings, (rows, length, hidden)."""
        embeds = self.showo.model.embed_tokens(batch.tokens)
        images, times = self.embed_images(latents.to(self.dtype), batch.grid), self.time_embed_proj(time)
        for row, (start, length) in enumerate(batch.spans):
            embeds[row, start] = times[row]
            embeds[row, start + 1 : start + length] = images[row]
        return embeds

    def embed_images(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        side = self.config.vision.grid
        positions = self.position_embedding.weight.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
        semantic = self.image_embedder_und(latents) + positions.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
        semantic = self.und_trans(inputs_embeds=semantic).last_hidden_state
        return self.fusion_proj(torch.cat((semantic, self.image_embedder_gen(latents)), dim=-1))

    def run_llm(self, x: Tensor, batch: Batch, full: bool = True, skipped: Collection[int] = ()) -> list[Tensor]:
        """What enters each layer, and last what leaves the final norm; each (rows, length, hidden)."""
        llm, states = self.showo.model, []
        self._use_ffns(self.whole_ffns if full else self.pruned_ffns)
        rotary = llm.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
        for number, layer in enumerate(llm.layers):
            states.append(x)
            if number not in skipped:
                x = layer(x, attention_mask=batch.mask, position_embeddings=rotary)
        states.append(llm.norm(x))
        self.showo.lm_head(states[-1])  # which nothing reads: the release makes these logits all the same
        return states

    def run_head(self, hidden: Tensor, time: Tensor, batch: Batch, stored: Tensor | None = None) -> Tensor:
        """The head's blocks over whole rows, or what an earlier step `stored` of them."""
        x = self.diff_proj(hidden)
        if stored is not None:
            return stored
        positions = torch.arange(x.shape[1], device=x.device)[None]
        for block in self.diffusion_head_a:
            x = block(x, time, batch, self.head_rotary(x, positions))
        return x

    def run_final(self, features: Tensor, time: Tensor, batch: Batch) -> Tensor:
        patches = self.diffusion_head_b(features, time, batch.spans)
        images = [patches[row, start + 1 : start + length] for row, (start, length) in enumerate(batch.spans)]
        return unpatchify(torch.stack(images), batch.grid)

    def _use_ffns(self, ffns: Sequence[nn.Module]) -> None:
        for layer, ffn in zip(self.showo.model.layers, ffns, strict=True):
            layer.mlp = ffn


def least_important(states: Sequence[Tensor], count: int) -> list[int]:
    """The layers whose outputs are most like their inputs, over all positions of all rows; waits for each of them."""
    importances = []
    for before, after in pairwise(states):
        similarity = F.normalize(before, dim=-1) * F.normalize(after, dim=-1)
        importances.append(1 - similarity.sum(dim=-1).mean().item())
    return sorted(range(len(importances)), key=importances.__getitem__)[:count]


def layers_to_skip(settings: FlashUConfig | None, config: Showo2Config) -> int:
    return layer_skipping.count_to_skip(config.llm.num_hidden_layers, settings.r_LS) if settings else 0
