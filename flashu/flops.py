"""Counting the operations of one image, step by step of its plan and part by part of the network, and of answers.

The real sampler runs on PyTorch's `meta` device under its FLOP counter, so the count is of what a generation
dispatches; no weights and no GPU are needed. A multiply-add counts as two. Parts that are called again with the same
shapes are not dispatched again, but counted as often as they are called: that makes it a matter of a second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flashu import conversation, sampler
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.head_cache import Head
from flashu.acceleration.plan import Llm, Plan, make_plan, release_plan
from flashu.config import FLASHU_PRESETS, GUIDANCE_SCALE, NUM_INFERENCE_STEPS, FlashUConfig
from flashu.errors import InputError
from flashu.models.attention import KeyValueCache
from flashu.models.diffusion_head import ModulatedAttentionBlock
from flashu.models.geometry import PATCH_SIZE, PIXELS_PER_TOKEN, Showo2Config, VaeGeometry
from flashu.models.layers import rotary_table
from flashu.models.qwen2 import WHOLE, DecoderLayer, Subnetwork
from flashu.models.showo2 import Showo2
from flashu.models.siglip import EncoderLayer
from flashu.models.wan_vae import WanVae
from flashu.question_rows import rotary_at
from flashu.tokenizer import EncodedQuestion

FAR = 4.0  # times the usual, from where a size or a number of steps is told to be unusual
TYPICAL_TEXT_TOKENS = 30  # of a prompt
MOST_TOKENS = 2**22  # of an image, whose cost is counted
FRAME_TOKENS = 15  # bos, system, user, boi, by Qwen2.5's tokenizer
ONCE = ("prefix", "VAE decode")  # parts that an image does not take at every step
REPEATED_BLOCKS = (DecoderLayer, EncoderLayer, ModulatedAttentionBlock)


@dataclass(frozen=True)
class FlopCount:
    """FLOP of one image."""

    steps: tuple[int, ...]  # per step of the plan; a prefix belongs to the step that first needs it
    parts: Mapping[str, int]  # by part of the network, VAE included

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@cache
@torch.no_grad()
def count_image(
    config: Showo2Config,
    vae: VaeGeometry,
    plan: Plan,
    token_grid: tuple[int, int],
    prefix_tokens: int,
) -> FlopCount:
    """Count one image made by `plan`, from a prompt of `prefix_tokens` with bos and boi.

    What was counted once is kept. Raises `InputError` when so long a prompt does not fit.
    """
    text = any_text(config, plan, token_grid, prefix_tokens)
    with torch.device("meta"):
        model = Showo2(config).bfloat16()
    noise = torch.empty(1, config.image_latent_dim, *(side * PATCH_SIZE for side in token_grid), device="meta")

    with _Counter(model) as counter:
        counter.watch_call(model, "read_text", "prefix")
        counter.watch_call(model, "embed_times", "time")
        for part, modules in {
            "image path": (model.image_embedder_und, model.image_embedder_gen, model.und_trans, model.fusion_proj),
            "LLM": (model.showo.model,),
            "head": (model.diff_proj, model.diffusion_head_a, model.diffusion_head_b),
        }.items():
            for module in modules:
                counter.watch_call(module, "forward", part)
        counter.watch_call(model.showo.model, "measure", "LLM")
        marks = []
        points = sampler.time_grid(plan.num_inference_steps)
        for _ in sampler.trajectory(model, noise, text, points, plan):
            marks.append(counter.total())
    parts = {**counter.parts, "VAE decode": _decoding(vae, tuple(noise.shape))}
    return FlopCount(tuple(after - before for before, after in itertools.pairwise(marks)), parts)


def any_text(
    config: Showo2Config, plan: Plan, token_grid: tuple[int, int], prefix_tokens: int, images: int = 1
) -> sampler.PromptTokens:
    """Prompts of `prefix_tokens` with bos and boi, for what does not depend on what they say.

    Raises `InputError` when so long a prompt does not fit.
    """
    limit = config.max_text_tokens(token_grid[0] * token_grid[1])
    if not 2 <= prefix_tokens <= limit + 2:
        raise InputError(f"a prefix of {prefix_tokens} tokens: bos and boi are 2, and at most {limit + 2} fit")
    lengths = [prefix_tokens] * images + [2] * images * plan.guided
    return sampler.PromptTokens(
        [[0] * length for length in lengths], [[0] * (4 + limit - length) for length in lengths], token_grid
    )


@cache
def _decoding(vae: VaeGeometry, shape: tuple[int, ...]) -> int:
    """FLOP of decoding latents of that shape."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        WanVae(vae).bfloat16().decode(torch.empty(shape))
    return counter.get_total_flops()


@dataclass
class UnusualCost:
    """An image whose size or steps are far from the usual, and what it takes. As a text, a sentence without its dot."""

    text: str
    tflop: float

    def __str__(self) -> str:
        return self.text


def unusual_cost(
    config: Showo2Config,
    vae: VaeGeometry,
    plan_of: Callable[[int], Plan],
    num_inference_steps: int,
    token_grid: tuple[int, int],
) -> UnusualCost | None:
    """What an image costs, where it has over `FAR` times as many pixels as the model's own, or as few, or takes over
    `FAR` times the usual steps; None where it has not and does not.

    plan_of: the plan of so many steps, raising `InputError` where there is none. Runs of more than the usual steps are
    not counted out, which takes as long: they are taken to cost as much more.
    """
    pixels = math.prod(token_grid) / math.prod(config.native_grid)
    longer = num_inference_steps / NUM_INFERENCE_STEPS
    parts = []
    if not 1 / FAR <= pixels <= FAR:
        size, own = (
            "x".join(str(side * PIXELS_PER_TOKEN) for side in grid[::-1]) for grid in (token_grid, config.native_grid)
        )
        share = f"{pixels:,.0f} times" if pixels > 1 else f"1/{1 / pixels:.0f} of"
        parts.append(f"an image of {size} has {share} the pixels of {own}, which the model was made for")
    if longer > FAR:
        parts.append(f"{num_inference_steps:,} steps are {longer:,.0f} times the usual {NUM_INFERENCE_STEPS}")
    if not parts:
        return None
    told = ", and ".join(parts)
    if math.prod(token_grid) > MOST_TOKENS:
        return UnusualCost(f"{told}: it takes more than is counted here", math.inf)
    steps = min(num_inference_steps, NUM_INFERENCE_STEPS)
    try:
        plan = plan_of(steps)
    except InputError:  # settings that fit no run as short as that
        plan = make_plan(None, steps, GUIDANCE_SCALE)
    usual, asked = (
        count_image(
            config, vae, plan, grid, 2 + min(TYPICAL_TEXT_TOKENS, config.max_text_tokens(math.prod(grid)))
        ).total
        for grid in (config.native_grid, token_grid)
    )
    flop = asked * (num_inference_steps - 1) / (steps - 1)
    text = f"{told}: about {flop / 1e12:,.4g} TFLOP an image"
    if flop > FAR * usual:
        text += f", {flop / usual:,.0f} times as many as usual"
    return UnusualCost(text, flop / 1e12)


@torch.no_grad()
def count_answer(
    config: Showo2Config,
    acceleration: Acceleration | None,
    token_grid: tuple[int, int],
    question_tokens: int,
    answer_tokens: int,
    questions: int = 1,
    frame_tokens: int = FRAME_TOKENS,
) -> dict[str, int]:
    """FLOP of so many questions about one image, each answered in so many tokens, by part; without the VAE's encoder.

    question_tokens: of each question, with what follows it in its row. frame_tokens: what stands before the image.
    """
    with torch.device("meta"):
        model = Showo2(config).bfloat16()
    model.acceleration = acceleration
    latents = torch.empty(1, config.image_latent_dim, *(side * PATCH_SIZE for side in token_grid), device="meta")
    question = EncodedQuestion([0] * frame_tokens, [0] * (1 + question_tokens))
    with _Counter(model) as counter:
        images = conversation.read_images(model, latents, question)
        parts = {"image": counter.total()}
        asked = conversation.Conversation(model, images, [[question] * questions], answer_tokens - 1)
        parts["questions"] = counter.total() - parts["image"]
        for _ in range(answer_tokens - 1):
            asked.advance(torch.empty(1, questions, dtype=torch.long, device="meta"))
        parts["further tokens"] = counter.total() - parts["image"] - parts["questions"]
    return parts


@torch.no_grad()
def count_release(
    config: Showo2Config, flashu: FlashUConfig | None, num_inference_steps: int, token_grid: tuple[int, int]
) -> list[int]:
    """FLOP of each evaluation as the release makes it, without its 3-D VAE.

    Both guidance rows, whole and padded, through image path, LLM, lm_head and head, on every step; under `flashu`, the
    pruned FFN and skipped layers on steps that are not full, and no head blocks on a step that reuses their output.
    """
    with torch.device("meta"):
        model = Showo2(config).bfloat16()
    tokens = token_grid[0] * token_grid[1]
    length = config.max_text_tokens(tokens) + tokens + 5
    latents = torch.empty(2, config.image_latent_dim, *(side * PATCH_SIZE for side in token_grid), device="meta")
    x = torch.empty(2, length, config.llm.hidden_size, dtype=model.dtype, device="meta")
    positions = torch.arange(length, device="meta")[None]
    llm_rotary = rotary_at(model, positions)
    head_rotary = rotary_table(model.diffusion_head_a.rotary_frequencies(model.device), positions, x.dtype)
    acceleration = Acceleration.of(flashu or FLASHU_PRESETS["off"], config.llm)
    none = torch.empty(0, dtype=torch.long, device="meta")

    @cache  # as those of one kind cost the same
    def evaluation(llm: Llm, skip: bool, reuse: bool) -> int:
        before = counter.total()
        model.embed_images(latents.to(x.dtype), model.semantic_positions(token_grid))
        subnetwork = WHOLE
        if llm is Llm.PRUNED:
            run = config.llm.num_hidden_layers - (acceleration.layers_to_skip if skip else 0)
            layers = [None] * run + [none] * (config.llm.num_hidden_layers - run)
            width = acceleration.ffn_width
            neurons = ((0, width),) * len(layers) if width else None
            subnetwork = Subnetwork(neurons, acceleration.kv_heads, tuple(layers))
        hidden, _ = model.showo.model(x, llm_rotary, subnetwork=subnetwork)
        model.showo.lm_head(hidden)
        hidden = model.diff_proj(hidden)
        times = model.embed_times(torch.empty(2, device="meta"))
        if not reuse:
            for block in model.diffusion_head_a:
                hidden, _ = block.forward_prefix(hidden, head_rotary)
        model.diffusion_head_b(hidden, times.final[0])
        return counter.total() - before

    plan = release_plan(flashu, num_inference_steps, GUIDANCE_SCALE)
    with _Counter(model) as counter:
        return [evaluation(step.llm, step.skip, step.head is Head.REUSE) for step in plan.steps]


def format_plan(plan: Plan, costs: Sequence[int]) -> str:
    """A plan as a table, a line a step."""
    lines = [f"{'step':>4}  {'LLM':<7} {'layers':<13} {'head':<8} {'guidance':>8} {'order':>5} {'TFLOP':>8}"]
    for step, flop in zip(plan.steps, costs, strict=True):
        layers = "all, measured" if step.measure else "skips" if step.skip else "-" if step.llm == "-" else "all"
        lines.append(
            f"{step.number:>4}  {step.llm.value:<7} {layers:<13} {step.head.value:<8} {step.guidance:>8g} "
            f"{step.order:>5} {flop / 1e12:>8.3f}"
        )
    return "\n".join(lines) + "\n"


class _Counter:
    """PyTorch's FLOP counter, with what every step repeats remembered, and the growth within chosen calls by part."""

    def __init__(self, model: Showo2):
        self.parts: dict[str, int] = {}
        self._counter = FlopCounterMode(display=False)
        self._remembered: dict[Any, tuple[Any, int, list[int]]] = {}
        self._repeated = 0
        self._inside = False
        for module in model.modules():
            if isinstance(module, REPEATED_BLOCKS):
                self._remember(module, "forward", type(module))
                if isinstance(module, ModulatedAttentionBlock):
                    self._remember(module, "forward_prefix", "prefix")
        embedders = (model.image_embedder_und, model.image_embedder_gen, model.fusion_proj)
        for module in (*embedders, model.showo.model.norm, model.diff_proj, model.diffusion_head_b):
            self._remember(module, "forward", module)

    def __enter__(self) -> _Counter:
        self._counter.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._counter.__exit__(*error)

    def total(self) -> int:
        return self._counter.get_total_flops() + self._repeated

    def watch_call(self, owner: Any, method: str, part: str) -> None:
        """Book what `owner.method` adds to the total as `part`; calls within watched calls are part of those."""
        original = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            self._inside, before = True, self.total()
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False
                self.parts[part] = self.parts.get(part, 0) + self.total() - before

        setattr(owner, method, watched)

    def _remember(self, module: nn.Module, method: str, kind: object) -> None:
        """Dispatch calls of a module's method once for each `kind` and shapes."""
        forward = getattr(module, method)

        def remembered(*args: Any) -> Any:
            key = (kind, _shapes(args))
            caches = [given for given in args if isinstance(given, KeyValueCache)]
            if key in self._remembered:
                result, flop, lengths = self._remembered[key]
                self._repeated += flop
                for cache, length in zip(caches, lengths, strict=True):
                    cache.length = length
                return result
            before = self.total()
            result = forward(*args)
            self._remembered[key] = result, self.total() - before, [cache.length for cache in caches]
            return result

        setattr(module, method, remembered)


def _shapes(value: Any) -> Any:
    if isinstance(value, (Tensor, KeyValueCache)):
        return tuple(value.shape)
    return tuple(map(_shapes, value)) if isinstance(value, tuple) else value
