"""From prompts to pictures: tokenizer, Show-o2, sampler and VAE, put together for one process and one device."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flashu import sampler
from flashu.devices import resolve_device, resolve_dtype
from flashu.errors import InputError, OutOfMemoryError
from flashu.models import checkpoint, geometry
from flashu.models.geometry import PATCH_SIZE
from flashu.models.showo2 import Showo2Qwen2_5
from flashu.models.tokenizer import EncodedPrompt, PromptTokenizer, find_tokenizer
from flashu.models.wan_vae import RELEASED_FILE, RELEASED_REPOSITORY, WanImageVAE

NUM_INFERENCE_STEPS = 50
GUIDANCE_SCALE = 7.5
BATCH_SIZE = 8


class TextToImagePipeline:
    """`pipe = TextToImagePipeline.from_pretrained(…)`, then `pipe(prompts)` gives PIL images."""

    def __init__(self, model: Showo2Qwen2_5, vae: WanImageVAE, tokenizer: PromptTokenizer):
        if len(tokenizer) > model.config.llm_vocab_size:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only "
                f"{model.config.llm_vocab_size}; they do not belong together"
            )
        self.model, self.vae, self.tokenizer = model, vae, tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path = checkpoint.EMBEDDED,
        *,
        vae: str | Path | None = None,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> TextToImagePipeline:
        """Load a Show-o2 checkpoint with the VAE and tokenizer that go with it.

        `vae` and `tokenizer` are folders, files or hub ids; without them they are looked for in the checkpoint's
        folder, then where the release has them (the Wan 2.1 repository; the LLM that the config names). The name
        `"embedded"` is the small model that ships with this package. `device=None` takes CUDA if it is there;
        `dtype=None` is bfloat16 on CUDA and float32 elsewhere.
        Raises `CheckpointError` and `InputError` naming what cannot be loaded.
        """
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        model = Showo2Qwen2_5.from_pretrained(path_or_hub_id, dtype=dtype, device=device)
        return cls.from_model(model, vae=vae, tokenizer=tokenizer)

    @classmethod
    def from_model(
        cls,
        model: Showo2Qwen2_5,
        *,
        vae: WanImageVAE | str | Path | None = None,
        tokenizer: PromptTokenizer | str | Path | None = None,
    ) -> TextToImagePipeline:
        """A pipeline around a model that is loaded already; `vae` and `tokenizer` may be objects too."""
        if not isinstance(tokenizer, PromptTokenizer):
            tokenizer = PromptTokenizer.from_pretrained(tokenizer or _tokenizer_beside(model))
        if not isinstance(vae, WanImageVAE):
            vae = WanImageVAE.from_pretrained(vae or _vae_beside(model), dtype=model.dtype, device=model.device)
        return cls(model, vae, tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, VAE, tokenizer and config as one folder that `from_pretrained` reads with no download.

        The folder appears whole or not at all. Raises `InputError` when it exists already.
        """
        folder = Path(folder)
        if folder.exists():
            raise InputError(f"{folder} exists already; name a new folder, or remove it first")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self.model.save_pretrained(partial)
            self.vae.save_pretrained(partial / "vae")
            self.tokenizer.save_pretrained(partial / "tokenizer")
            partial.chmod(0o755)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def __call__(self, prompts: str | Sequence[str], **options) -> list[Image.Image]:
        """All pictures of `prompts` as a list; see `stream` for the options and for what each picture carries."""
        return list(self.stream(prompts, **options))

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] | None = None,
        negative_prompts: str | Sequence[str] = "",
        num_inference_steps: int = NUM_INFERENCE_STEPS,
        guidance_scale: float = GUIDANCE_SCALE,
        time_shift: float | None = sampler.TIME_SHIFT,
        size: int | tuple[int, int] | None = None,
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
    ) -> Iterator[Image.Image]:
        """Generate one picture per prompt, in order, each batch as soon as it is done.

        seeds: one per prompt; or one number, which the first prompt gets, and each next one a number higher; or None
            for seeds from torch's global generator. A picture depends on its own seed only, not on its batch.
        negative_prompts: what guidance leads away from; one for all, or one per prompt.
        num_inference_steps: grid points, so one more than the evaluations made.
        guidance_scale: 0 or 1 follow the prompt alone, at half the cost.
        time_shift: see `sampler.time_grid`.
        size: pixels per side, or (height, width); multiples of 16. None is the checkpoint's own.
        batch_size: pictures made at once.

        A picture's `.info` holds its prompt, seed and settings, and `truncated`: whether the prompt was longer than
        the model reads and was cut, of which a warning is given too. An empty prompt is allowed.
        Raises `InputError` before any work for settings that cannot be used; `OutOfMemoryError` names a batch size.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        count = len(prompts)
        negative_prompts = [negative_prompts] * count if isinstance(negative_prompts, str) else list(negative_prompts)
        seeds = _spread_seeds(seeds, count)
        for name, values, kind in (
            ("prompts", prompts, str), ("negative_prompts", negative_prompts, str), ("seeds", seeds, int)
        ):  # fmt: skip
            if len(values) != count:
                raise InputError(f"{len(values)} {name} for {count} prompts; give one for each")
            wrong = next((value for value in values if not isinstance(value, kind)), None)
            if wrong is not None:
                raise InputError(f"{name} holds {wrong!r}, which is no {kind.__name__}")
        if any(not 0 <= seed < 2**64 for seed in seeds):
            raise InputError("a seed must be a whole number from 0 to 2**64 - 1")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        sampler.check_guidance(guidance_scale)
        time_points = sampler.time_grid(num_inference_steps, time_shift)
        token_grid = geometry.parse_size(size, self.model.config.native_grid)

        max_tokens = geometry.max_text_tokens(token_grid[0] * token_grid[1])
        encoded = [self.tokenizer.encode_prompt(prompt, max_tokens) for prompt in prompts]
        negative = [self.tokenizer.encode_prompt(prompt, max_tokens) for prompt in negative_prompts]
        cut = [index for index in range(count) if encoded[index].truncated or negative[index].truncated]
        if cut:
            warnings.warn(
                f"{len(cut)} of {count} prompts are longer than the {max_tokens} tokens that fit and were cut "
                f"(the first is number {cut[0]}, counted from 0)",
                stacklevel=2,
            )

        def generate() -> Iterator[Image.Image]:
            batches = range(0, count, batch_size)
            with tqdm(
                total=len(batches) * (num_inference_steps - 1), unit="step", disable=not progress, leave=False
            ) as bar:
                for first in batches:
                    batch = slice(first, first + batch_size)
                    pictures = self._generate_batch(
                        encoded[batch], negative[batch], seeds[batch], time_points, token_grid, guidance_scale, bar
                    )
                    for index, picture in enumerate(pictures, start=first):
                        picture.info = {
                            "prompt": prompts[index],
                            "negative_prompt": negative_prompts[index],
                            "seed": seeds[index],
                            "num_inference_steps": num_inference_steps,
                            "guidance_scale": guidance_scale,
                            "time_shift": time_shift,
                            "truncated": index in cut,
                        }
                        yield picture

        return generate()

    @torch.no_grad()
    def _generate_batch(
        self,
        encoded: Sequence[EncodedPrompt],
        negative: Sequence[EncodedPrompt],
        seeds: Sequence[int],
        time_points: Tensor,
        token_grid: tuple[int, int],
        guidance_scale: float,
        bar: tqdm,
    ) -> list[Image.Image]:
        height, width = (side * PATCH_SIZE for side in token_grid)
        rows = [prompt.prefix for prompt in encoded]
        if sampler.needs_unconditional(guidance_scale):
            rows += [prompt.prefix for prompt in negative]
        try:
            noise = sampler.initial_noise(seeds, self.model.config.image_latent_dim, height, width)
            prefix = self.model.encode_prefix(rows, token_grid)
            states = sampler.trajectory(self.model, noise, prefix, time_points, guidance_scale)
            latents = next(states)
            for state in states:
                latents = state
                bar.update()
            return to_pictures(self.vae.decode(latents.to(self.vae.device)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, so that the failed batch's tensors, held by its traceback, are free already.
        raise OutOfMemoryError(_out_of_memory_advice(len(encoded), token_grid, self.model.device))


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (n, 3, height, width) in [-1, 1] to RGB pictures, rounded to the nearest of 256 levels."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or in the CPU's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _out_of_memory_advice(images: int, token_grid: tuple[int, int], device: torch.device) -> str:
    height, width = (side * geometry.PIXELS_PER_TOKEN for side in token_grid)
    what = f"out of memory on {device} with {images} images of {height}x{width} at once"
    if images > 1:
        return f"{what}; try batch_size={images // 2} (--batch-size {images // 2})"
    return f"{what}; try a smaller size, dtype bfloat16, or a device with more memory"


def _spread_seeds(seeds: int | Sequence[int] | None, count: int) -> list[int]:
    if seeds is None:
        return torch.randint(2**63 - 1, (count,)).tolist()
    return [seeds + index for index in range(count)] if isinstance(seeds, int) else list(seeds)


def _tokenizer_beside(model: Showo2Qwen2_5) -> str | Path:
    """Where the tokenizer of a loaded model is: in its folder, or with the LLM that its config names."""
    if model.source == checkpoint.EMBEDDED:
        return checkpoint.EMBEDDED
    folder, name = model.source, model.config.llm_model_path
    if folder is not None and find_tokenizer(Path(folder)):
        return folder
    if not name:
        raise InputError("the model names no tokenizer; give one with tokenizer=")
    local = Path(folder or ".") / name
    return local if local.is_dir() else name


def _vae_beside(model: Showo2Qwen2_5) -> str | Path:
    """Where the VAE of a loaded model is: in its folder, or in the Wan 2.1 repository."""
    if model.source == checkpoint.EMBEDDED:
        return checkpoint.EMBEDDED
    folder = Path(model.source or ".")
    return next((path for path in (folder / "vae", folder / RELEASED_FILE) if path.exists()), RELEASED_REPOSITORY)
