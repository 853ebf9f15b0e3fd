"""Encode and decode images: the codecs of `--format`."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storage.volume.durable import write_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Codec:
    """An encoding; `encode` takes uint8 (H, W, 3) of any strides, and a quality or None."""

    suffix: str
    encode: "Callable[[NDArray[np.uint8], int | None], bytes]"
    always_lossless: bool = True

    def lossless(self, quality: int | None) -> bool:
        """Return whether decoding returns the same pixels."""
        return self.always_lossless or (self is WEBP and quality is None)


def encode_png(pixels_HW3: "NDArray[np.uint8]", quality: int | None = None) -> bytes:
    """
    Encode a PNG with fpng, which is 25 times as fast as Pillow, or with Pillow if fpng is not installed.
    """
    import numpy as np

    pixels_HW3 = np.ascontiguousarray(pixels_HW3)
    try:
        import fpng
    except ImportError:
        return _by_pillow(pixels_HW3, "PNG", compress_level=1)
    return bytes(fpng.from_ndarray(pixels_HW3))


def encode_webp(pixels_HW3: "NDArray[np.uint8]", quality: int | None = None) -> bytes:
    """
    Encode a WebP, lossless if there is no quality.

    Method 1 takes a third of the default's time; files are as large within 1 % (a smooth 96×96 image with
    noise).
    """
    if quality is None:
        return _by_pillow(pixels_HW3, "WEBP", lossless=True, method=1, quality=0)
    return _by_pillow(pixels_HW3, "WEBP", quality=quality)


def encode_jpeg(pixels_HW3: "NDArray[np.uint8]", quality: int | None = None) -> bytes:
    """Encode a JPEG without chroma subsampling, which is visible at 96×96."""
    return _by_pillow(pixels_HW3, "JPEG", quality=quality or JPEG_QUALITY, subsampling=0)


def encode_raw(pixels_HW3: "NDArray[np.uint8]", quality: int | None = None) -> bytes:
    """Return the pixels, row by row."""
    return pixels_HW3.tobytes()


def decode(data: bytes) -> "NDArray[np.uint8]":
    """
    Decode an image of any codec but RAW: uint8 (H, W, 3).

    Raises:
        OSError, SyntaxError: the data are broken.
    """
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _by_pillow(pixels_HW3: "NDArray[np.uint8]", name: str, **options: int | bool) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, name, **options)
    return buffer.getvalue()


def write_png(path: Path, pixels_HW3: "NDArray[np.uint8]") -> str:
    """Write a PNG durably; return its SHA-256 in hex."""
    return write_bytes(path, encode_png(pixels_HW3))


PNG = Codec(".png", encode_png)
WEBP = Codec(".webp", encode_webp, always_lossless=False)
JPEG = Codec(".jpg", encode_jpeg, always_lossless=False)
RAW = Codec("", encode_raw)
