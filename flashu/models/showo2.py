"""Show-o2: one network that turns text and a noisy image latent into that image's velocity.

    text ──► embed ──► LLM ──────────────► head ───────► keys and values     `encode_prefix`, once per prompt
                        ▲                    ▲
    latent ─► und ─► SigLIP ─┐               │
           └► gen ───────────┴► fusion ──► LLM ──► head ──► velocity         `run_llm`, `run_head`, `run_final`: steps
                                             ▲       ▲
    time ────────────────────────────────────┴───────┘                       `embed_times`, once per time grid

A row of the released model is `[bos] text [boi] [time] [image × N] [eoi] [eos] [pad]…`, run whole at every step, and
twice for guidance. Its velocity is reproduced here from less: nothing before the image span sees the image or the
time, so those keys and values are made once; nothing in the span sees what follows it, so that is not run; the rows
of one image share its latent, so the image path runs once for both; and no logits are made.

Parameter names and shapes are those of the released checkpoints. No sampling, no tokens' meaning, no files here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flashu.devices import FLOAT8
from flashu.models.blocks import AS_THEY_ARE, Blocks
from flashu.models.diffusion_head import DiffusionHead, FinalLayer
from flashu.models.geometry import PATCH_SIZE, Showo2Config
from flashu.models.joined import Joined
from flashu.models.layers import Halves, KeyValue, Rotary, embedding, rotary_frequencies, rotary_table
from flashu.models.patches import PatchEmbed, patchify, unpatchify
from flashu.models.prefix import Prefix, Suffix, TextLayout, cut_halves, prefix_mask, suffix_mask
from flashu.models.qwen2 import WHOLE, Qwen2ForCausalLM, SimilaritySum, Subnetwork
from flashu.models.siglip import SiglipEncoder
from flashu.models.times import Times, TimestepEmbedder


class Showo2(nn.Module):
    """The network. With the released names and files around it, it is `flashu.Showo2Qwen2_5`."""

    def __init__(self, config: Showo2Config):
        super().__init__()
        self.config = config
        self.source: Path | None = None  # the folder that its weights are from
        self.acceleration: Any = None  # the `acceleration.applied.Acceleration` that is on; no step here asks for it
        self.original_fingerprint: str | None = None  # of the weights that `to_float8` was given
        llm, vision, head = config.llm.hidden_size, config.vision.hidden_size, config.head.hidden_size

        self.image_embedder_und = PatchEmbed(config.image_latent_dim, vision)
        self.image_embedder_gen = PatchEmbed(config.image_latent_dim, llm)
        self.position_embedding = embedding(config.vision.grid**2, vision)
        self.und_trans = SiglipEncoder(config.vision)
        self.fusion_proj = nn.Sequential(
            nn.RMSNorm(vision + llm, eps=1e-6), nn.Linear(vision + llm, llm), nn.GELU(), nn.Linear(llm, llm)
        )
        self.showo = Qwen2ForCausalLM(config.llm, config.llm_vocab_size)
        self.time_embed = TimestepEmbedder(head)
        # The released code leaves both projections out where the two hidden sizes agree.
        self.time_embed_proj: nn.Module
        self.diff_proj: nn.Module
        if llm != head:
            self.time_embed_proj = nn.Linear(head, llm)
            self.diff_proj = nn.Sequential(nn.Linear(llm, head), nn.GELU(), nn.Linear(head, head))
        else:
            self.time_embed_proj = self.diff_proj = nn.Identity()
        self.diffusion_head_a = DiffusionHead(config.head, config.num_diffusion_layers)
        self.diffusion_head_b = FinalLayer(head, PATCH_SIZE**2 * config.image_latent_dim)

    @property
    def device(self) -> torch.device:
        return self.showo.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.showo.model.embed_tokens.weight.dtype

    @property
    def number_format(self) -> str:
        """What the model runs in, by the name that `from_pretrained` takes."""
        return FLOAT8 if self.original_fingerprint else str(self.dtype).removeprefix("torch.")

    def join(self) -> None:
        """Join the linear layers that read one input, as is done on CUDA anyway; see `Joined`."""
        for module in self._joined():
            module.join()

    def _joined(self) -> Iterator[Joined]:
        return (module for module in self.modules() if isinstance(module, Joined))

    def embed_times(self, t: Tensor) -> Times:
        """Everything that depends on time alone, for times `t` (steps,) at once."""
        embeds = self.time_embed(t.to(self.device))
        return Times(
            token=self.time_embed_proj(embeds),
            blocks=self.diffusion_head_a.modulations(embeds),
            final=self.diffusion_head_b.modulations(embeds),
        )

    def encode_prefix(
        self,
        rows: Sequence[Sequence[int]],
        grid: tuple[int, int],
        subnetwork: Subnetwork = WHOLE,
        suffixes: Sequence[Sequence[int]] | None = None,
        guided: bool = False,
        blocks: Blocks = AS_THEY_ARE,
    ) -> Prefix:
        """Run what stands before the image: for each row its token ids, from bos to boi.

        `grid` is the image's (height, width) in tokens. Rows may differ in length. `subnetwork` is how much of the LLM
        runs, here and over the span. With `suffixes` (what follows the span, eoi to padding) `measure_llm` can run.
        `guided` says that the rows are in CFG order: the second half, which mostly are the same empty text, then need
        no mask for the sake of the first. `blocks` is how blocks are called, here as over the span later.
        """
        if blocks.compiled:
            for module in self._joined():
                module.join_again_if_moved()
        lengths = [len(row) for row in rows]
        span = torch.arange(1 + grid[0] * grid[1], device=self.device)
        room = -(max(lengths) + len(span)) % blocks.key_multiple  # for more padding, where there is some
        padded_length = max(lengths) + (room if len(set(lengths)) > 1 else 0)
        text_positions = torch.arange(padded_length, device=self.device)[None]
        starts = torch.tensor(lengths, device=self.device)[:, None]
        text = TextLayout(lengths, starts, text_positions < starts)

        config = self.config.llm
        llm_frequencies = rotary_frequencies(config.head_dim, config.rope_theta, self.device)
        head_frequencies = self.diffusion_head_a.rotary_frequencies(self.device)
        text_rotaries = [rotary_table(of, text_positions, self.dtype) for of in (llm_frequencies, head_frequencies)]
        blocks.mark_dynamic((2,), *text_rotaries)
        llm, head, similarity = self._run_text(rows, text_rotaries, subnetwork, bool(suffixes), blocks)
        suffix = None
        if suffixes:
            suffix = self._lay_out_suffix(suffixes, llm, similarity, text, len(span), llm_frequencies, blocks)
        seen_llm, seen_head, mask = _as_seen_by_span(llm, head, text, len(span), guided, blocks.compiled)
        prefix = Prefix(
            rows=len(rows),
            grid=grid,
            subnetwork=subnetwork,
            llm=seen_llm,
            head=seen_head,
            llm_rotary=rotary_table(llm_frequencies, starts + span, self.dtype),
            head_rotary=rotary_table(head_frequencies, starts + span, self.dtype),
            mask=mask,
            semantic_positions=self.semantic_positions(grid),
            suffix=suffix,
        )
        blocks.mark_dynamic((0, 2), *prefix.llm, *prefix.head)
        blocks.mark_dynamic((0,), prefix.llm_rotary, prefix.head_rotary)
        blocks.mark_dynamic((0, 3), mask)
        return prefix

    def _lay_out_suffix(
        self,
        suffixes: Sequence[Sequence[int]],
        llm: Sequence[KeyValue | None],
        similarity: Tensor | None,
        text: TextLayout,
        span: int,
        frequencies: Tensor,
        blocks: Blocks,
    ) -> Suffix:
        """What measuring steps run after `text` and a span of so many positions; `llm` and `similarity` are what
        `_run_text` made of it, `frequencies` the LLM's."""
        suffix_lengths = torch.tensor([len(row) for row in suffixes], device=self.device)[:, None]
        longest = max(map(len, suffixes))
        longest += -(text.valid.shape[1] + span + longest) % blocks.key_multiple  # of the tail's mask, always there
        positions = text.starts + torch.arange(span + longest, device=self.device)
        in_suffix = torch.arange(longest, device=self.device) < suffix_lengths
        return Suffix(
            embeds=self._embed_padded(suffixes, longest),
            llm=cast("list[KeyValue]", llm),  # steps that measure run every layer
            prefix_mask=prefix_mask(text.lengths, text.valid, span),
            rotary=rotary_table(frequencies, positions, self.dtype),
            mask=suffix_mask(text.valid, span, longest),
            valid=torch.cat((in_suffix.new_ones(len(in_suffix), span), in_suffix), dim=1),
            row_length=text.lengths[0] + span + len(suffixes[0]),
            prefix_similarity=cast("Tensor", similarity),
        )

    def _run_text(
        self,
        rows: Sequence[Sequence[int]],
        rotaries: Sequence[Rotary],
        subnetwork: Subnetwork,
        measure: bool,
        blocks: Blocks,
    ) -> tuple[Sequence[KeyValue | None], Sequence[KeyValue], Tensor | None]:
        """Each layer's and head block's keys and values of rows of text, padded to the length of `rotaries`, LLM's and
        head's; and with `measure` the layers' similarities, summed over each row (rows, layers). Rows that are alike
        run once, where they run through the same layers."""
        distinct = rows if subnetwork.running_rows else [list(row) for row in dict.fromkeys(map(tuple, rows))]
        llm_rotary, head_rotary = rotaries
        padded_length = llm_rotary.cos.shape[2]
        lengths = torch.tensor([len(row) for row in distinct], device=self.device)[:, None]
        similarity = SimilaritySum(torch.arange(padded_length, device=self.device) < lengths) if measure else None
        embeds = self._embed_padded(distinct, padded_length)
        blocks.mark_dynamic((0, 1), embeds)
        x, llm = self.showo.model(
            embeds, llm_rotary, subnetwork=subnetwork, observe=similarity, run_layer=blocks.llm_layer
        )
        x = self.diff_proj(x)
        blocks.mark_dynamic((0, 1), x)
        head = self.diffusion_head_a.encode_prefix(x, head_rotary, blocks.head_text_block)
        summed = similarity.total() if similarity else None
        if len(distinct) < len(rows):
            numbers = {tuple(row): number for number, row in enumerate(distinct)}
            alike = torch.tensor([numbers[tuple(row)] for row in rows], device=self.device)
            llm, head = [seen and seen.select(alike) for seen in llm], [seen.select(alike) for seen in head]
            summed = summed if summed is None else summed[alike]
        return llm, head, summed

    def _embed_padded(self, rows: Sequence[Sequence[int]], length: int) -> Tensor:
        """Embeddings (rows, length, hidden); what pads a shorter row is run, and never seen."""
        padded = [[*row, *([0] * (length - len(row)))] for row in rows]
        return self.showo.model.embed_tokens(torch.tensor(padded, device=self.device))

    def semantic_positions(self, grid: tuple[int, int]) -> Tensor:
        """SigLIP's learned positions, resized (bicubic) from their own grid to `grid`: (tokens, hidden)."""
        side = self.config.vision.grid
        weight = self.position_embedding.weight
        if grid == (side, side):
            return weight
        planes = rearrange(weight.float(), "(height width) hidden -> 1 hidden height width", height=side)
        resized = F.interpolate(planes, size=grid, mode="bicubic", align_corners=False)
        return rearrange(resized, "1 hidden height width -> (height width) hidden").to(weight.dtype)

    def embed_images(self, latents: Tensor, semantic_positions: Tensor, blocks: Blocks = AS_THEY_ARE) -> Tensor:
        """Latents (images, channels, height, width) to LLM embeddings (images, tokens, hidden)."""
        patches = patchify(latents)
        semantic = self.image_embedder_und(patches) + semantic_positions
        blocks.mark_dynamic((0,), semantic)
        semantic = self.und_trans(semantic, blocks.vision_layer)
        return self.fusion_proj(torch.cat((semantic, self.image_embedder_gen(patches)), dim=-1))

    def run_llm(self, latents: Tensor, time: Times, prefix: Prefix, blocks: Blocks = AS_THEY_ARE) -> Tensor:
        """The LLM's normed output over the image span: (rows, 1 + tokens, hidden), the time token first."""
        span = self._embed_span(latents, time, prefix, blocks)
        past = (prefix.llm_rotary, prefix.llm, prefix.mask)
        hidden, _ = self.showo.model(span, *past, subnetwork=prefix.subnetwork, run_layer=blocks.llm_layer)
        return hidden

    def measure_llm(
        self, latents: Tensor, time: Times, prefix: Prefix, blocks: Blocks = AS_THEY_ARE
    ) -> tuple[Tensor, Tensor]:
        """`run_llm` over whole rows, up to their padding.

        Returns its output over the span, and each layer's cosine similarity of input and output, (rows, layers),
        averaged over every position of a row. `prefix` needs its suffix.
        """
        span = self._embed_span(latents, time, prefix, blocks)
        hidden, similarity = self.run_rows(span, prefix, blocks)
        suffix = cast("Suffix", prefix.suffix)
        return hidden, (suffix.prefix_similarity + similarity) / suffix.row_length

    def run_rows(self, span: Tensor, prefix: Prefix, blocks: Blocks = AS_THEY_ARE) -> tuple[Tensor, Tensor]:
        """The LLM over span embeddings (rows, span, hidden) and the suffixes after them.

        Returns its normed output over the span, and the layers' similarities summed over span and suffix, (rows,
        layers). Rows are run a part at a time, so that their length does not take more memory than a step does.
        """
        suffix = prefix.suffix
        assert suffix is not None, "a prefix that was made without suffixes cannot be measured"
        length = span.shape[1] + suffix.embeds.shape[1]
        hidden, similarities = [], []
        for rows in torch.arange(len(span), device=span.device).chunk(-(-length // span.shape[1])):
            similarity = SimilaritySum(suffix.valid[rows])
            embeds, rotary = torch.cat((span[rows], suffix.embeds[rows]), dim=1), suffix.rotary.select(rows)
            past, tail = [layer.select(rows) for layer in suffix.llm], suffix.mask[rows]
            mask = None if suffix.prefix_mask is None else suffix.prefix_mask[rows]
            blocks.mark_dynamic((0, 1), embeds)
            blocks.mark_dynamic((0, 2), rotary, *past)
            blocks.mark_dynamic((0, 3), mask)
            blocks.mark_dynamic((0, 2, 3), tail)
            part, _ = self.showo.model(
                embeds, rotary, past, mask, tail, prefix.subnetwork, similarity, run_layer=blocks.llm_layer
            )
            hidden.append(part[:, : span.shape[1]])
            similarities.append(similarity.total())
        return torch.cat(hidden), torch.cat(similarities)

    def _embed_span(self, latents: Tensor, time: Times, prefix: Prefix, blocks: Blocks) -> Tensor:
        """Time token and image tokens as the LLM gets them, (rows, 1 + tokens, hidden)."""
        images = self.embed_images(latents.to(self.dtype), prefix.semantic_positions, blocks)
        span = torch.cat((time.token.expand(len(images), 1, -1), images), dim=1)
        span = span.repeat(prefix.rows // len(images), 1, 1)
        blocks.mark_dynamic((0,), span)
        return span

    def run_head(self, hidden: Tensor, time: Times, prefix: Prefix, blocks: Blocks = AS_THEY_ARE) -> Tensor:
        """The diffusion head over the LLM's span output: (rows, tokens, head hidden), without the time token."""
        x = self.diff_proj(hidden)
        blocks.mark_dynamic((0,), x)
        past = (prefix.head, prefix.mask)
        return self.diffusion_head_a(x, prefix.head_rotary, time.blocks, *past, blocks.head_block)[:, 1:]

    def run_final(self, hidden: Tensor, time: Times, grid: tuple[int, int]) -> Tensor:
        """Head output (rows, tokens, head hidden) to velocity (rows, channels, height, width)."""
        return unpatchify(self.diffusion_head_b(hidden, time.final), grid)

    def velocity(self, latents: Tensor, time: Times, prefix: Prefix, blocks: Blocks = AS_THEY_ARE) -> Tensor:
        """One evaluation: the velocity that each row of `prefix` gives `latents` at one `time`.

        latents: (images, channels, height, width); `prefix` has one row an image, or two.
        Returns (rows, channels, height, width).
        """
        hidden = self.run_llm(latents, time, prefix, blocks)
        return self.run_final(self.run_head(hidden, time, prefix, blocks), time, prefix.grid)


def _as_seen_by_span(
    llm: Sequence[KeyValue | None],
    head: Sequence[KeyValue],
    text: TextLayout,
    span: int,
    guided: bool,
    compiled: bool,
) -> tuple[Sequence[KeyValue | Halves | None], Sequence[KeyValue | Halves], Tensor | None]:
    """The text's keys and values, and the mask of a span of so many positions: in halves without padding, where a
    `guided` batch's second half are of one length."""
    lengths, valid = text.lengths, text.valid
    half, padded = len(lengths) // 2, valid.shape[1]
    if guided and len(set(lengths)) > 1 and len(set(lengths[half:])) == 1:
        end = padded if len(set(lengths[:half])) > 1 else lengths[0]
        return (
            [seen and cut_halves(seen, end, lengths[half]) for seen in llm],
            [cut_halves(seen, end, lengths[half]) for seen in head],
            prefix_mask(lengths[:half], valid[:half, :end], span),
        )
    if compiled:  # in memory of their own, whatever made them: other layouts would be compiled apart
        llm, head = [seen and seen.copied_upto(padded) for seen in llm], [seen.copied_upto(padded) for seen in head]
    return llm, head, prefix_mask(lengths, valid, span)
