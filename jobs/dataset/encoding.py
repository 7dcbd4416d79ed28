"""Pictures to image files: png, jpeg or webp, the same bytes for the same pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from flashu.errors import InputError

SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True)
class ImageEncoder:
    """image_format: png, jpeg or webp. quality: 1 to 100, of jpeg and webp; webp at 100 is lossless.

    Raises `InputError` for others.
    """

    image_format: str = "png"
    quality: int = 95

    def __post_init__(self):
        if self.image_format not in SUFFIXES:
            raise InputError(f"output.image_format is {self.image_format!r}; choose one of: {', '.join(SUFFIXES)}")
        if not 1 <= self.quality <= 100:
            raise InputError(f"output.quality is {self.quality}; it goes from 1 to 100")

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.image_format]

    def encode(self, picture: Image.Image) -> bytes:
        options: dict[str, object] = {}
        if self.image_format != "png":
            options["quality"] = self.quality
        if self.image_format == "webp" and self.quality == 100:
            options["lossless"] = True
        if self.image_format == "jpeg" and self.quality >= 90:
            options["subsampling"] = 0  # full colour resolution, as the quality asked for suggests
        buffer = io.BytesIO()
        Image.frombytes(picture.mode, picture.size, picture.tobytes()).save(  # without the picture's .info
            buffer, self.image_format, **options
        )
        return buffer.getvalue()
