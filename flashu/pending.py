"""Pictures that are still on their way: a GPU decodes a batch and copies it to the host beside the next one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flashu.models.wan_vae import WanImageVAE


class PendingPictures:
    """The pictures of one batch. `picture` and `pictures` wait for them, in any thread; nothing else does."""

    def __init__(self, pixels: Tensor, infos: Sequence[dict[str, Any]], begun: _Moment, done: _Moment):
        """`pixels` (pictures, height, width, 3), uint8 on the host, are there once `done` is."""
        self._pixels, self.infos, self._begun, self._done = pixels, infos, begun, done

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._pixels.shape[1], self._pixels.shape[2]

    def picture(self, index: int) -> Image.Image:
        """One of them, with its `.info`."""
        self._done.wait()
        picture = Image.fromarray(self._pixels[index].numpy())
        picture.info = dict(self.infos[index])
        return picture

    def pictures(self) -> list[Image.Image]:
        """All of them, in order."""
        return [self.picture(index) for index in range(len(self))]

    @property
    def seconds(self) -> float:
        """How long the device took for the batch, from when it was free for it. Waits for it."""
        self._done.wait()
        return self._done.since(self._begun)


class Decoder:
    """Decodes batches of latents, on a stream of its own where the VAE is on a GPU."""

    def __init__(self, vae: WanImageVAE):
        self.vae = vae
        self._stream: torch.cuda.Stream | None = None  # made when it is first needed

    def begin(self) -> _Moment:
        """Now, as the device sees it: after what it was given so far."""
        return _Moment(torch.cuda.current_stream(self.vae.device) if self.vae.device.type == "cuda" else None)

    def decode(self, latents: Tensor, infos: Sequence[dict[str, Any]], begun: _Moment) -> PendingPictures:
        """The pictures of latents (pictures, channels, height, width) that the device may not have made yet."""
        device = self.vae.device
        latents = latents.to(device)
        if device.type != "cuda":
            return PendingPictures(self.vae.decode_pixels(latents).cpu(), infos, begun, _Moment())
        if self._stream is None or self._stream.device != latents.device:
            self._stream = torch.cuda.Stream(latents.device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            latents.record_stream(self._stream)
            pixels = self.vae.decode_pixels(latents)
            on_host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            on_host.copy_(pixels, non_blocking=True)
            return PendingPictures(on_host, infos, begun, _Moment(self._stream))


class _Moment:
    """A point in time: of a stream's work, or of the clock where there is no stream and all work is done at once."""

    def __init__(self, stream: torch.cuda.Stream | None = None):
        self.event = None
        self.clock_s = time.perf_counter()
        if stream is not None:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(stream)

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: _Moment) -> float:
        """Seconds; both have passed."""
        if self.event is None:
            return self.clock_s - earlier.clock_s
        return earlier.event.elapsed_time(self.event) / 1e3
