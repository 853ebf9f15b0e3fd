"""How one picture becomes bytes, and bytes a picture again: the encodings behind `--format`."""

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
    """An encoding; `encode` takes uint8 (H, W, 3), C-contiguous or not, and a quality that may be None."""

    suffix: str
    encode: "Callable[[NDArray[np.uint8], int | None], bytes]"
    always_lossless: bool = True

    def lossless(self, quality: int | None) -> bool:
        """Whether what is read back is what was given."""
        return self.always_lossless or (self is WEBP and quality is None)


def encode_png(pixels_HW3: "NDArray[np.uint8]", quality: int | None = None) -> bytes:
    """A lossless PNG: fpng where there is a wheel for it (25 × Pillow's speed), else Pillow."""
    import numpy as np

    pixels_HW3 = np.ascontiguousarray(pixels_HW3)
    try:
        import fpng
    except ImportError:
        return _by_pillow(pixels_HW3, "PNG", compress_level=1)
    return bytes(fpng.from_ndarray(pixels_HW3))


def encode_webp(pixels_HW3: "NDArray[np.uint8]", quality: int | None = None) -> bytes:
    """
    A WebP, lossless unless a quality is named.

    Method 1 takes a third of the default's time, for a file of the same size within 1 %
    (of a smooth picture with noise on it, 96×96).
    """
    if quality is None:
        return _by_pillow(pixels_HW3, "WEBP", lossless=True, method=1, quality=0)
    return _by_pillow(pixels_HW3, "WEBP", quality=quality)


def encode_jpeg(pixels_HW3: "NDArray[np.uint8]", quality: int | None = None) -> bytes:
    """A JPEG at full colour resolution: half of it would show at 96×96."""
    return _by_pillow(pixels_HW3, "JPEG", quality=quality or JPEG_QUALITY, subsampling=0)


def encode_raw(pixels_HW3: "NDArray[np.uint8]", quality: int | None = None) -> bytes:
    """The pixels themselves, row by row."""
    return pixels_HW3.tobytes()


def decode(data: bytes) -> "NDArray[np.uint8]":
    """
    A picture of any encoding but the raw one: uint8 (H, W, 3).

    Raises:
        OSError, SyntaxError: it is broken.
    """
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def _by_pillow(pixels_HW3: "NDArray[np.uint8]", name: str, **options: int | bool) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, name, **options)
    return buffer.getvalue()


def write_png(path: Path, pixels_HW3: "NDArray[np.uint8]") -> str:
    """Write one PNG durably; returns its sha-256 in hex."""
    return write_bytes(path, encode_png(pixels_HW3))


PNG = Codec(".png", encode_png)
WEBP = Codec(".webp", encode_webp, always_lossless=False)
JPEG = Codec(".jpg", encode_jpeg, always_lossless=False)
RAW = Codec("", encode_raw)
