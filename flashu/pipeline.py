"""Show-o2 with the VAE and tokenizer that go with it, loaded, saved, and put to work: prompts to pictures, and pictures
and questions to answers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flashu import answering
from flashu.checkpoints import weights
from flashu.checkpoints.files import EMBEDDED, RELEASED_VAE
from flashu.config import BATCH_SIZE, MAX_NEW_TOKENS
from flashu.devices import FLOAT8, is_out_of_memory, resolve_device, resolve_dtype
from flashu.errors import InputError, OutOfMemoryError
from flashu.generation import ImageGenerator
from flashu.pretrained import Showo2Qwen2_5, WanImageVAE, companions
from flashu.tokenizer import PromptTokenizer


class TextToImagePipeline(ImageGenerator):
    """`pipe = TextToImagePipeline.from_pretrained(…)`, then `pipe(prompts)` gives PIL images, and
    `pipe.answer(images, questions)` texts."""

    model: Showo2Qwen2_5
    vae: WanImageVAE

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path = EMBEDDED,
        *,
        vae: str | Path | None = None,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
    ) -> TextToImagePipeline:
        """Load a Show-o2 checkpoint with the VAE and tokenizer that go with it.

        `vae` and `tokenizer` are folders, files or hub ids; without them they are looked for in the checkpoint's
        folder, then where the release has them (the Wan 2.1 repository; the LLM that the config names). The name
        `"embedded"` is the small model that ships with this package. `device=None` takes CUDA if it is there;
        `dtype=None` is bfloat16 on CUDA and float32 elsewhere; "float8" is bfloat16 with FFNs in float8. `variant`: see
        `Showo2Qwen2_5.from_pretrained`.
        Raises `CheckpointError` and `InputError` naming what cannot be loaded, `OutOfMemoryError` when it does not fit.
        """
        device = resolve_device(device)
        dtype = dtype if dtype == FLOAT8 else resolve_dtype(dtype, device)
        try:
            model = Showo2Qwen2_5.from_pretrained(path_or_hub_id, dtype=dtype, device=device, variant=variant)
            return cls.from_model(model, vae=vae, tokenizer=tokenizer)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        raise OutOfMemoryError(
            f"{path_or_hub_id} does not fit into the memory of {device}; try dtype bfloat16, or a device with more"
        )

    @classmethod
    def from_model(
        cls,
        model: Showo2Qwen2_5,
        *,
        vae: WanImageVAE | str | Path | None = None,
        tokenizer: PromptTokenizer | str | Path | None = None,
    ) -> TextToImagePipeline:
        """A pipeline around a model that is loaded already; `vae` and `tokenizer` may be objects too."""
        return cls(model, *companions(model, vae, tokenizer))

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | str | None = None, layout: str = weights.SAFETENSORS
    ) -> None:
        """Write model, VAE, tokenizer and config as one folder that `from_pretrained` reads with no download.

        `dtype` and `layout` are those of `Showo2Qwen2_5.save_pretrained`. In layout "release" the VAE is the released
        file again, where it was loaded from one.
        The folder appears whole or not at all. Raises `InputError` when it exists already or cannot be written.
        """
        folder = Path(folder)
        if folder.exists():
            raise InputError(f"{folder} exists already; name a new folder, or remove it first")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {error.strerror}") from None
        try:
            self.model.save_pretrained(partial, dtype, layout)
            released = self.vae.source
            if layout == weights.RELEASE and released and released.name == RELEASED_VAE:
                shutil.copy(released, partial / RELEASED_VAE)
            else:
                self.vae.save_pretrained(partial / "vae", dtype)
            self.tokenizer.save_pretrained(partial / "tokenizer")
            partial.chmod(0o755)
            os.replace(partial, folder)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder} cannot be written: {error}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone already where all went well

    def answer(
        self,
        images: Any,
        questions: Any,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seeds: int | Sequence[int] | None = None,
        size: int | tuple[int, int] | None = None,
        fit: str = "crop",
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """Answer questions about images: texts, in the shape in which the questions came.

        images: a PIL image or a file of one, or a list; of any size and mode.
        questions: one, asked of every image; or a list with a question, or a list of questions, for each. Questions
            about one image share its encoding and prefill.
        max_new_tokens: where an answer is cut that has not ended.
        temperature: 0 takes the likeliest token each time. Above, tokens are drawn, from the `top_k` likeliest and from
            the likeliest that have `top_p` of the probability; `seeds` then has one for each question, or the first's.
        size: as in generation: what images are resized to. None is the checkpoint's own.
        fit: "crop" cuts off what does not fit the size, as the release does; "letterbox" shows all of it, on grey.
        batch_size: images read at once.

        Raises `InputError` for what is no image or no question, and for settings that cannot be used.
        """
        asked = answering.Asked.of(images, questions)
        decoding = answering.Decoding(max_new_tokens, temperature, top_k, top_p)
        view = answering.View(size, fit)
        return asked.shaped(self._answerer.answer(asked, decoding, seeds, view, batch_size))

    def yes_probability(
        self,
        images: Any,
        questions: Any,
        *,
        size: int | tuple[int, int] | None = None,
        fit: str = "crop",
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """How likely "yes" is, against "no", as the answer to each question: numbers in [0, 1].

        One pass, with no decoding. Arguments and shape are those of `answer`.
        """
        asked = answering.Asked.of(images, questions)
        view = answering.View(size, fit)
        return asked.shaped(self._answerer.yes_probability(asked, view, batch_size))

    @property
    def _answerer(self) -> answering.ImageAnswerer:
        return answering.ImageAnswerer(self.model, self.vae, self.tokenizer)
