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

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flashu.devices import FLOAT8, send, send_numbers
from flashu.models import attention
from flashu.models.attention import Halves, KeyValue
from flashu.models.blocks import AS_THEY_ARE, Blocks
from flashu.models.diffusion_head import DiffusionHead, FinalLayer
from flashu.models.geometry import PATCH_SIZE, Showo2Config
from flashu.models.joined import Joined
from flashu.models.layers import Rotary, embedding, rotary_frequencies, rotary_table
from flashu.models.patches import PatchEmbed, patchify, unpatchify
from flashu.models.prefix import (
    KeptStates,
    Prefix,
    Suffix,
    SuffixLayout,
    TextLayout,
    halves_of,
    padded_rows,
    prefix_mask,
    suffix_mask,
)
from flashu.models.qwen2 import WHOLE, DecoderLayer, Qwen2ForCausalLM, Subnetwork
from flashu.models.siglip import SiglipEncoder
from flashu.models.times import Times, TimestepEmbedder

# Rows up to half as long again as their span are measured at once, unless there are parts of so many: the VAE's peak is
# beyond theirs by far.
MEASURED_AT_ONCE = 4
HARDLY_LONGER = 1.5


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
        embeds = self.time_embed(send(t, self.device))
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

        `subnetwork` is how much of the LLM runs, here and over the span; for the rest see `lay_out_text`.
        """
        text = self.lay_out_text(rows, grid, suffixes, guided, blocks)
        return self.read_text(text, subnetwork, bool(suffixes), blocks)

    def lay_out_text(
        self,
        rows: Sequence[Sequence[int]],
        grid: tuple[int, int],
        suffixes: Sequence[Sequence[int]] | None = None,
        guided: bool = False,
        blocks: Blocks = AS_THEY_ARE,
    ) -> TextLayout:
        """Lay out on the device what stands before the image: for each row its token ids, from bos to boi.

        `grid` is the image's (height, width) in tokens. Rows may differ in length. With `suffixes` (what follows the
        span, eoi to padding) `measure_llm` can run. `guided` says that the rows are in CFG order: the second half,
        which mostly are the same empty text, then need no mask for the sake of the first. `blocks` is how blocks are
        called later. A GPU is sent all this at once, and not waited for.
        """
        lengths, span = [len(row) for row in rows], torch.arange(1 + grid[0] * grid[1], device=self.device)
        padded = blocks.padded_length(lengths, len(span))
        numbers = {row: number for number, row in enumerate(dict.fromkeys(map(tuple, rows)))}
        ids, ends, starts, alike, suffix_ids, suffix_ends = send_numbers(
            self.device,
            padded_rows(numbers, padded),
            [[len(row)] for row in numbers],
            [[length] for length in lengths],
            [numbers[tuple(row)] for row in rows],
            *self._suffix_numbers(suffixes or (), padded + len(span), blocks),
        )
        positions = torch.arange(padded, device=self.device)[None]
        valid = positions < starts
        suffix = None
        if suffixes:
            after = torch.arange(len(span) + suffix_ids.shape[1], device=self.device)
            in_suffix = after[: suffix_ids.shape[1]] < suffix_ends
            suffix = SuffixLayout(
                embeds=self.showo.model.embed_tokens(suffix_ids),
                prefix_mask=prefix_mask(lengths, valid, len(span), blocks.always_padded),
                rotary=self._llm_rotary(starts + after),
                mask=suffix_mask(valid, len(span), suffix_ids.shape[1]),
                valid=torch.cat((in_suffix.new_ones(len(in_suffix), len(span)), in_suffix), dim=1),
                row_length=lengths[0] + len(span) + len(suffixes[0]),
            )
        cut = guided and len(rows) > attention.choice().joint_rows
        halves = halves_of(lengths, padded, blocks.always_padded) if cut else None
        first = slice(None) if halves is None else slice(len(rows) // 2)
        text = TextLayout(
            lengths=lengths,
            grid=grid,
            ids=ids,
            valid=positions < ends,
            alike=alike if len(numbers) < len(rows) else None,
            llm_rotary=self._llm_rotary(positions),
            head_rotary=self._head_rotary(positions),
            span_llm_rotary=self._llm_rotary(starts + span),
            span_head_rotary=self._head_rotary(starts + span),
            halves=halves,
            mask=prefix_mask(lengths[first], valid[first, : halves and halves[0]], len(span), blocks.always_padded),
            semantic_positions=blocks.kept(self.semantic_positions(grid)),  # a weight, which may be changed in place
            suffix=suffix,
        )
        blocks.mark_dynamic((2,), text.llm_rotary, text.head_rotary)
        blocks.mark_dynamic((0,), text.span_llm_rotary, text.span_head_rotary)
        blocks.mark_dynamic((0, 3), text.mask)
        return text

    def _suffix_numbers(
        self, suffixes: Sequence[Sequence[int]], before: int, blocks: Blocks
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids and lengths of suffixes, padded to one length, after so many positions."""
        longest = max(map(len, suffixes), default=0)
        longest += -(before + longest) % blocks.key_multiple  # of the tail's mask, always there
        return padded_rows(suffixes, longest), [[len(row)] for row in suffixes]

    def _llm_rotary(self, positions: Tensor) -> Rotary:
        config = self.config.llm
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, self.device)
        return rotary_table(frequencies, positions, self.dtype)

    def _head_rotary(self, positions: Tensor) -> Rotary:
        return rotary_table(self.diffusion_head_a.rotary_frequencies(self.device), positions, self.dtype)

    def read_text(
        self, text: TextLayout, subnetwork: Subnetwork = WHOLE, measured: bool = False, blocks: Blocks = AS_THEY_ARE
    ) -> Prefix:
        """Run text that is laid out. `measured` says that whole rows are to be measured with the prefix."""
        if blocks.compiled:
            for module in self._joined():
                module.join_again_if_moved()
        # Rows that are alike run once, where they run through the same layers.
        ids, valid, alike = text.ids, text.valid, text.alike
        if alike is not None and subnetwork.running_rows is not None:
            ids, valid, alike = ids[alike], valid[alike], None
        keeps = KeptStates(text.halves, copied=blocks.compiled, whole=measured, made_by=subnetwork.kind)
        run_layer = blocks.measured_layer if measured else blocks.llm_layer
        layers, suffix = blocks.of_layers(subnetwork), None

        def run(layer: DecoderLayer, x: Tensor, *others: Any) -> Any:
            return layers.run_in_place(_text_layer, run_layer, layer, x, keeps, alike, *others)

        x = self.showo.model.embed_tokens(ids)
        blocks.mark_dynamic((0, 1), x)
        if measured:
            blocks.mark_dynamic((0, 1), valid)
            x, llm, similarity = self.showo.model.measure(
                x, text.llm_rotary, valid, subnetwork=subnetwork, run_layer=run
            )
            suffix = Suffix(
                **vars(cast("SuffixLayout", text.suffix)),
                llm=[whole for _, whole in llm],
                prefix_similarity=similarity if alike is None else similarity[alike],
            )
        else:
            x, llm = self.showo.model(x, text.llm_rotary, subnetwork=subnetwork, run_layer=run)
        prefix = Prefix(
            rows=len(text.lengths),
            grid=text.grid,
            subnetwork=subnetwork,
            llm=[states and states[0] for states in llm],
            head=blocks.run(Showo2._read_head, self, x, text.head_rotary, keeps, alike, blocks),
            llm_rotary=text.span_llm_rotary,
            head_rotary=text.span_head_rotary,
            mask=text.mask,
            semantic_positions=text.semantic_positions,
            suffix=suffix,
        )
        blocks.mark_dynamic((0, 2), *prefix.llm, *prefix.head)
        return prefix

    def _read_head(
        self, x: Tensor, rotary: Rotary, keeps: KeptStates, alike: Tensor | None, blocks: Blocks
    ) -> list[KeyValue | Halves]:
        """What spans see of the text in the head's blocks, of the LLM's output over it."""
        x = self.diff_proj(x)
        blocks.mark_dynamic((0, 1), x)
        return [
            keeps.of(own, alike)[0] for own in self.diffusion_head_a.encode_prefix(x, rotary, blocks.head_text_block)
        ]

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
        generative = self.image_embedder_gen(patches)
        blocks.mark_dynamic((0,), semantic, generative)
        return blocks.compile(_fused)(self.fusion_proj, semantic, generative)

    def run_llm(self, latents: Tensor, time: Times, prefix: Prefix, blocks: Blocks = AS_THEY_ARE) -> Tensor:
        """The LLM's normed output over the image span: (rows, 1 + tokens, hidden), the time token first."""
        span = self._embed_span(latents, time, prefix, blocks)
        past = (prefix.llm_rotary, prefix.llm, prefix.mask)
        run_layer = _over_span(blocks.of_layers(prefix.subnetwork), blocks.llm_layer)
        hidden, _ = self.showo.model(span, *past, subnetwork=prefix.subnetwork, run_layer=run_layer)
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
        layers). Many rows, or far longer ones, are run a part at a time, so that this takes no more memory than a step.
        """
        whole = prefix.suffix
        assert whole is not None, "a prefix that was made without suffixes cannot be measured"
        count, length = len(span), span.shape[1]
        longer = 1 + whole.embeds.shape[1] / length
        parts = math.ceil(longer)
        if longer <= HARDLY_LONGER:
            parts = min(parts, max(1, count // MEASURED_AT_ONCE))
        at_once = -(-count // parts)
        run_layer = _over_span(blocks, blocks.measured_layer)
        hidden, similarities = [], []
        for first in range(0, count, at_once):
            rows = slice(first, first + at_once)
            suffix = whole.select(rows)
            embeds = torch.cat((span[rows], suffix.embeds), dim=1)
            blocks.mark_dynamic((0, 1), embeds, suffix.valid)
            blocks.mark_dynamic((0, 2), suffix.rotary, *suffix.llm)
            blocks.mark_dynamic((0, 3), suffix.prefix_mask)
            blocks.mark_dynamic((0, 2, 3), suffix.mask)
            seen = (suffix.llm, suffix.prefix_mask, suffix.mask)
            part, _, similarity = self.showo.model.measure(
                embeds, suffix.rotary, suffix.valid, *seen, prefix.subnetwork, run_layer
            )
            hidden.append(part[:, :length])
            similarities.append(similarity)
        return torch.cat(hidden), torch.cat(similarities)

    def _embed_span(self, latents: Tensor, time: Times, prefix: Prefix, blocks: Blocks) -> Tensor:
        """Time token and image tokens as the LLM gets them, (rows, 1 + tokens, hidden)."""
        copies = prefix.rows // len(latents)
        span = blocks.run(Showo2._span_of, self, latents, time.token, prefix.semantic_positions, copies, blocks)
        blocks.mark_dynamic((0,), span)
        return span

    def _span_of(
        self, latents: Tensor, token: Tensor, semantic_positions: Tensor, copies: int, blocks: Blocks
    ) -> Tensor:
        images = self.embed_images(latents.to(self.dtype), semantic_positions, blocks)
        return torch.cat((token.expand(len(images), 1, -1), images), dim=1).repeat(copies, 1, 1)

    def run_head(self, hidden: Tensor, time: Times, prefix: Prefix, blocks: Blocks = AS_THEY_ARE) -> Tensor:
        """The diffusion head over the LLM's span output: (rows, tokens, head hidden), without the time token."""
        past = (prefix.head_rotary, time.blocks, prefix.head, prefix.mask)
        return blocks.run(Showo2._features_of, self, hidden, *past, blocks)

    def _features_of(
        self,
        hidden: Tensor,
        rotary: Rotary,
        modulation: Tensor,
        past: Sequence[KeyValue | Halves],
        mask: Tensor | None,
        blocks: Blocks,
    ) -> Tensor:
        x = self.diff_proj(hidden)
        blocks.mark_dynamic((0,), x)
        features = self.diffusion_head_a(x, rotary, modulation, past, mask, blocks.head_block)[:, 1:]
        return features.contiguous() if blocks.graphs else features  # as the next call is given it, captured or not

    def run_final(self, hidden: Tensor, modulation: Tensor, grid: tuple[int, int]) -> Tensor:
        """Head output (rows, tokens, head hidden) to velocity (rows, channels, height, width), at the time of
        `modulation`."""
        return unpatchify(self.diffusion_head_b(hidden, modulation), grid)

    def velocity(self, latents: Tensor, time: Times, prefix: Prefix, blocks: Blocks = AS_THEY_ARE) -> Tensor:
        """One evaluation: the velocity that each row of `prefix` gives `latents` at one `time`.

        latents: (images, channels, height, width); `prefix` has one row an image, or two.
        Returns (rows, channels, height, width).
        """
        hidden = self.run_llm(latents, time, prefix, blocks)
        return self.run_final(self.run_head(hidden, time, prefix, blocks), time.final, prefix.grid)


def _fused(projection: nn.Module, semantic: Tensor, generative: Tensor) -> Tensor:
    """Both embeddings of images, (images, tokens, …), as the LLM gets them."""
    return cast("Tensor", projection(torch.cat((semantic, generative), dim=-1)))


def _text_layer(
    run_layer: Callable[..., Any],
    layer: DecoderLayer,
    x: Tensor,
    keeps: KeptStates,
    alike: Tensor | None,
    *others: Any,
) -> tuple[Any, ...]:
    """A layer's call over text: its stream, what is kept of its keys and values, and whatever else it makes."""
    x, own, *more = run_layer(layer, x, *others)
    return x, keeps.of(own, alike), *more


def _over_span(blocks: Blocks, run_layer: Callable[..., Any]) -> Callable[..., Any]:
    """How a layer is called over a span, whose own keys and values nothing else sees; a graph would keep them."""
    return partial(blocks.run_in_place, _without_states, run_layer) if blocks.graphs else run_layer


def _without_states(run_layer: Callable[..., Any], layer: DecoderLayer, x: Tensor, *others: Any) -> tuple[Any, ...]:
    x, _, *more = run_layer(layer, x, *others)
    return x, None, *more
