"""Pictures that are still on their way: a GPU decodes a batch and copies it to the host beside the next one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flashu.models.wan_vae import WanVae


class PendingPictures:
    """The pictures of one batch.

    `wait`, and `picture` and `pictures`, which wait, may be called in any thread. They raise what went wrong on the
    device meanwhile; once one has returned, the pictures are on the host, and no failure of the device reaches them any
    more.
    """

    def __init__(self, pixels: Tensor, infos: Sequence[dict[str, Any]], begun: Moment, done: Moment):
        """`pixels` (pictures, height, width, 3), uint8 on the host, are there once `done` is."""
        self._pixels, self.infos, self._begun, self._done = pixels, infos, begun, done
        self._seconds: float | None = None  # known once they were waited for

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def done(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._done.is_past

    def wait(self) -> float:
        """Wait for the pictures. How many seconds the device took for them, from when it was free for them."""
        if self._seconds is None:
            self._done.wait()
            self._seconds = self._done.since(self._begun)
        return self._seconds

    def picture(self, index: int) -> Image.Image:
        """One of them, with its `.info`. Waits for all."""
        self.wait()
        picture = Image.fromarray(self._pixels[index].numpy())
        picture.info.update(self.infos[index])
        return picture

    def pictures(self) -> list[Image.Image]:
        """All of them, in order."""
        return [self.picture(index) for index in range(len(self))]


def decode_beside(vae: WanVae, latents: Tensor, infos: Sequence[dict[str, Any]], begun: Moment) -> PendingPictures:
    """The pictures of latents (pictures, channels, height, width) that the device may not have made yet.

    On a GPU they are decoded on a stream of their own, beside what the current one is given next.
    """
    device = vae.device
    latents = latents.to(device)
    if device.type != "cuda":
        return PendingPictures(vae.decode_pixels(latents).cpu(), infos, begun, Moment())
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Whoever frees these, or moves the VAE away, does so on another stream, which does not wait for this one.
        for tensor in (latents, *vae.parameters()):
            tensor.record_stream(stream)
        pixels = vae.decode_pixels(latents)
        on_host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
        on_host.copy_(pixels, non_blocking=True)
        return PendingPictures(on_host, infos, begun, Moment(stream))


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all pipelines of a process, as each stream has memory set aside for it."""
    return torch.cuda.Stream(device)


class Moment:
    """A point in time: of a stream's work, or of the clock where there is no stream and all work is done at once."""

    def __init__(self, stream: torch.cuda.Stream | None = None):
        """Now, or when `stream` has done what it was given so far."""
        self.event = None
        self.clock_s = time.perf_counter()
        if stream is not None:
            self.event = torch.cuda.Event(enable_timing=True, blocking=True)  # or waiting would keep a core busy
            self.event.record(stream)

    @classmethod
    def on(cls, device: torch.device) -> Moment:
        """When `device` has done what its current stream was given so far."""
        return cls(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    @property
    def is_past(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds; both have passed."""
        if self.event is None or earlier.event is None:
            return self.clock_s - earlier.clock_s
        return earlier.event.elapsed_time(self.event) / 1e3
