"""From prompts to pictures: tokenizer, network, sampler and VAE put to work on one device, batch by batch. No files."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flashu import arguments, sampler
from flashu.acceleration.applied import Acceleration
from flashu.acceleration.plan import Plan, make_plan
from flashu.config import BATCH_SIZE, NUM_INFERENCE_STEPS
from flashu.devices import is_out_of_memory
from flashu.errors import InputError, OutOfMemoryError
from flashu.models import blocks, geometry
from flashu.models.geometry import PATCH_SIZE
from flashu.models.showo2 import Showo2
from flashu.models.wan_vae import WanVae
from flashu.pending import Moment, PendingPictures, decode_beside
from flashu.tokenizer import EncodedPrompt, PromptTokenizer

Own = TypeVar("Own", bound="ImageGenerator")  # the class itself, or one made of it


@dataclass
class _Request:
    """One picture to make: its text as rows, its seed, and what its `.info` will say."""

    encoded: EncodedPrompt
    negative: EncodedPrompt
    seed: int
    info: dict[str, Any]


@dataclass
class _Order:
    """Pictures to make, all in the same way."""

    requests: list[_Request]
    time_points: Tensor
    token_grid: tuple[int, int]
    plan: Plan
    acceleration: Acceleration | None


class ImageGenerator:
    """`generator(prompts)` gives PIL images. With files and answers around it, it is `flashu.TextToImagePipeline`."""

    def __init__(self, model: Showo2, vae: WanVae, tokenizer: PromptTokenizer):
        if len(tokenizer) > model.config.llm_vocab_size:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only "
                f"{model.config.llm_vocab_size}; they do not belong together"
            )
        if vae.geometry.z_dim != model.config.image_latent_dim:
            raise InputError(
                f"the VAE's latents have {vae.geometry.z_dim} channels, the model's "
                f"{model.config.image_latent_dim}; they do not belong together"
            )
        self.model, self.vae, self.tokenizer = model, vae, tokenizer
        self.blocks = blocks.AS_THEY_ARE

    def compile(self: Own, mode: str = "auto") -> Own:
        """From now on, generate with compiled blocks, which the first batches compile; returns itself.

        mode: "auto" compiles on CUDA and does nothing elsewhere; "max" compiles on any device, and on CUDA tries more
        kernels, which takes minutes; "graphs" compiles on CUDA and replays small batches as CUDA graphs, one batch at a
        time; "off" takes it back.
        Pictures stay the same to rounding; hooks on blocks are not called. Raises `InputError` for another mode, in
        mode "graphs" without CUDA, and in modes "max" and "graphs" when there is nothing to compile with; "auto" then
        warns.
        """
        self._drop_graphs()
        self.blocks = blocks.compile_blocks(mode, self.model.device)
        return self

    def _drop_graphs(self) -> None:
        if self.blocks.graphs:
            self.blocks.graphs.drop()

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> list[Image.Image]:
        """All pictures of `prompts` as a list; see `stream` for the options and for what each picture carries."""
        return list(self.stream(prompts, **options))

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] | None = None,
        negative_prompts: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        time_shift: float | None = sampler.TIME_SHIFT,
        size: int | tuple[int, int] | None = None,
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
    ) -> Iterator[Image.Image]:
        """Generate one picture per prompt, in order, batch by batch: each when it is done, and on CUDA when the next
        one is under way.

        seeds: one per prompt; or one number, which the first prompt gets, and each next one a number higher; or None
            for seeds from torch's global generator. A picture depends on its own seed only, not on its batch.
        negative_prompts: what guidance leads away from; one for all, or one per prompt.
        num_inference_steps: grid points, so one more than the steps made. None is 50, or what FlashU is set to.
        guidance_scale: 0 or 1 follow the prompt alone, at half the cost. None is the checkpoint's own, 7.5 for the
            released ones. A FlashU guidance schedule goes before it.
        time_shift: how far the time grid's points are moved towards the noise; None, or 1, leaves them even.
        size: pixels per side, or (height, width); multiples of 16. None is the checkpoint's own.
        batch_size: pictures made at once.

        A picture's `.info` holds its prompt, seed and settings, and `truncated`: whether its prompt or negative prompt
        was longer than the model reads and was cut, of which a warning is given too. An empty prompt is allowed.
        Raises `InputError` before any work for settings that cannot be used; `OutOfMemoryError` names a batch size.
        """
        batch_size = arguments.whole("batch_size", batch_size, least=1)
        order = self._order(prompts, seeds, negative_prompts, num_inference_steps, guidance_scale, time_shift, size)
        return self._generate(order, batch_size, progress)

    def submit(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] | None = None,
        negative_prompts: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        time_shift: float | None = sampler.TIME_SHIFT,
        size: int | tuple[int, int] | None = None,
    ) -> PendingPictures:
        """Begin one batch of all prompts, at least one, and hand back its pictures to be waited for.

        On CUDA the next batch may be submitted meanwhile, and this one is decoded and copied beside it; elsewhere the
        pictures are there already. Options and errors are those of `stream`.
        """
        order = self._order(prompts, seeds, negative_prompts, num_inference_steps, guidance_scale, time_shift, size)
        if not order.requests:
            raise InputError("prompts is empty; a batch has at least one")
        with tqdm(disable=True) as bar:
            return self._begin(order, order.requests, bar)

    def _order(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] | None,
        negative_prompts: str | Sequence[str],
        num_inference_steps: int | None,
        guidance_scale: float | None,
        time_shift: float | None,
        size: int | tuple[int, int] | None,
    ) -> _Order:
        """Check what is asked for, and lay it out."""
        prompts = arguments.texts("prompts", prompts)
        count = len(prompts)
        negative_prompts = arguments.texts("negative_prompts", negative_prompts, count)
        seeds = arguments.seeds(seeds, count)
        acceleration = self.model.acceleration
        flashu = acceleration and acceleration.config
        if num_inference_steps is None:
            num_inference_steps = flashu.total_steps if flashu else NUM_INFERENCE_STEPS
        time_points = sampler.time_grid(num_inference_steps, time_shift)
        if guidance_scale is None:
            guidance_scale = self.model.config.guidance_scale
        guidance_scale = arguments.finite("guidance_scale", guidance_scale, zero=True)
        num_inference_steps = len(time_points)
        if acceleration:
            plan = acceleration.plan(num_inference_steps, guidance_scale)
        else:
            plan = make_plan(None, num_inference_steps, guidance_scale)
        token_grid = geometry.token_grid(size, self.model.config.native_grid)
        if size is None and (unsuited := geometry.unsuited_size(self.model.source, token_grid)):
            warnings.warn(unsuited, stacklevel=3)
        max_tokens = self.model.config.max_text_tokens(token_grid[0] * token_grid[1])

        requests = []
        for prompt, negative_prompt, seed in zip(prompts, negative_prompts, seeds, strict=True):
            encoded, negative = (self.tokenizer.encode_prompt(text, max_tokens) for text in (prompt, negative_prompt))
            info = {
                "prompt": prompt,
                "negative_prompt": negative_prompt,
                "seed": seed,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": flashu.schedule if flashu and flashu.schedule else guidance_scale,
                "time_shift": time_shift,
                "flashu": flashu and flashu.describe(),
                "truncated": encoded.truncated or negative.truncated,
            }
            requests.append(_Request(encoded, negative, seed, info))
        cut = [index for index, request in enumerate(requests) if request.info["truncated"]]
        if cut:
            warnings.warn(
                f"{len(cut)} of {count} prompts are longer than the {max_tokens} tokens that fit and were cut "
                f"(the first is number {cut[0]}, counted from 0)",
                stacklevel=3,  # the caller of `stream` or `submit`
            )
        return _Order(requests, time_points, token_grid, plan, acceleration)

    def _generate(self, order: _Order, batch_size: int, progress: bool) -> Iterator[Image.Image]:
        starts = range(0, len(order.requests), batch_size)
        ahead = _batches_ahead(self.model.device)
        hidden = None if progress else True  # None: shown on a terminal only
        pending: deque[PendingPictures] = deque()
        with tqdm(total=len(starts) * len(order.plan.steps), unit="step", disable=hidden, leave=False) as bar:
            for start in starts:
                try:
                    pending.append(self._begin(order, order.requests[start : start + batch_size], bar))
                except Exception:
                    for batch in pending:  # what was begun before it is not lost
                        yield from batch.pictures()
                    raise
                if len(pending) > ahead:
                    yield from pending.popleft().pictures()
            for batch in pending:
                yield from batch.pictures()

    def _begin(self, order: _Order, batch: Sequence[_Request], bar: tqdm[Any]) -> PendingPictures:
        """Have the device make a batch of an order. Raises `OutOfMemoryError`."""
        if self.model.acceleration is not order.acceleration:
            raise RuntimeError("FlashU was switched on or off between two batches of one call")
        try:
            return self._denoise_and_decode(order, batch, bar)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, whose traceback would hold on to the batch's tensors.
        self._drop_graphs()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemoryError(_out_of_memory_advice(len(batch), order.token_grid, self.model.device))

    @torch.no_grad()
    def _denoise_and_decode(self, order: _Order, batch: Sequence[_Request], bar: tqdm[Any]) -> PendingPictures:
        begun = Moment.on(self.vae.device)
        height, width = (side * PATCH_SIZE for side in order.token_grid)
        texts = [request.encoded for request in batch]
        if order.plan.guided:
            texts += [request.negative for request in batch]
        text = sampler.PromptTokens([text.prefix for text in texts], [text.suffix for text in texts], order.token_grid)
        seeds = [request.seed for request in batch]
        noise = sampler.initial_noise(seeds, self.model.config.image_latent_dim, height, width)
        states = sampler.trajectory(self.model, noise, text, order.time_points, order.plan, self.blocks)
        latents = next(states)
        for state in states:
            latents = state
            bar.update()
        return decode_beside(self.vae, latents, [request.info for request in batch], begun)


def _batches_ahead(device: torch.device) -> int:
    """How many batches are begun before the pictures of one are waited for: a GPU works at the next one meanwhile."""
    return 1 if device.type == "cuda" else 0


def _out_of_memory_advice(images: int, token_grid: tuple[int, int], device: torch.device) -> str:
    height, width = (side * geometry.PIXELS_PER_TOKEN for side in token_grid)
    what = f"out of memory on {device} with {images} images of {height}x{width} at once"
    if images > 1:
        return f"{what}; try batch_size={images // 2} (--batch-size {images // 2})"
    return f"{what}; try a smaller size, dtype bfloat16, or a device with more memory"
