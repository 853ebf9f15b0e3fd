"""
Decodes pictures of unknown origin, in a process that has little to lose.

Image libraries are the widest door for hostile data, so they are opened only here: a child
process without torch, with limits on memory and CPU time, confined by the operating system to
its pipes (storage/sandbox.py). Bytes come in on stdin, pixels go out on stdout;
storage/datasets/decode_pool.py is the other end. The file is run by its path and imports nothing but
Pillow and the sandbox, so a child starts in 60 ms.

What is decoded is bounded: known formats, the first frame, 64 megapixels. Warnings count as
errors and a truncated file is never half a picture. `Image.verify()` is not used: it accepts
truncated JPEGs.
"""

import importlib.util
import io
import json
import os
import struct
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import (  # noqa: F401 - each plugin registers its format when it is imported
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 64_000_000
MIN_SIDE = 8
"""Pixels; below that a picture is an icon or a tracking dot, and resizing makes a blur of it."""
MEMORY_BYTES = 3 << 30
"""Address space: 64 megapixels as RGBA, composed on white, are 0.8 GB; the rest is headroom."""
CPU_SECONDS = 60
"""For one picture; 64 megapixels take about 3."""

REQUEST = struct.Struct(">qIQ")
"""Picture's number, side of the square wanted (0: only look at it), bytes that follow."""
ANSWER = struct.Struct(">qIQ")
"""Picture's number, bytes of JSON facts, bytes of pixels."""
READY = b"ready"
"""A child's first word; one that never says it has fallen over its start, not over a picture."""

# 65535 must become 255, and Pillow's own conversion clips at 255 instead.
SIXTEEN_TO_EIGHT = [(value * 255 + 32767) // 65535 for value in range(65536)]


class UnusableError(Exception):
    """
    A picture that is left out.

    Args:
        reason: one of a few phrases, so that reasons can be counted.
        detail: what is particular to this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def decode(data: bytes, size: int = 0) -> tuple[dict[str, Any], bytes]:
    """
    One picture as pixels.

    Args:
        data: the file's bytes.
        size: side of the square wanted, in pixels; 0 decodes only to see whether it can be.

    Returns:
        (facts, pixels): format, mode, width, height and notes of the file; 3·size·size bytes
        in the order channel, row, column, or nothing for size 0.

    Raises:
        UnusableError: with the reason.
    """
    if not data:
        raise UnusableError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Many phones write such files, and the picture in them is sound.
        warnings.filterwarnings("ignore", message="Image appears to be a malformed MPO")
        # Broken metadata around sound pixels, see _upright().
        warnings.filterwarnings("ignore", message=r"(Possibly corrupt|Corrupt) EXIF data")
        try:
            return _decode(data, size)
        except UnusableError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
            raise UnusableError(f"more than {MAX_PIXELS // 1_000_000} megapixels") from exc
        except UnidentifiedImageError as exc:
            raise UnusableError("not a picture in a known format", _start(data)) from exc
        except MemoryError as exc:
            raise UnusableError("takes too much memory to decode") from exc
        except Exception as exc:
            # Pillow's plugins raise nearly anything on broken data: struct.error, SyntaxError, KeyError.
            raise UnusableError("broken or truncated", f"{type(exc).__name__}: {exc}"[:200]) from exc


def _decode(data: bytes, size: int) -> tuple[dict[str, Any], bytes]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        facts: dict[str, Any] = {
            "format": image.format,
            "mode": image.mode,
            "width": width,
            "height": height,
            "notes": [],
        }
        if min(width, height) < MIN_SIDE:
            raise UnusableError(f"smaller than {MIN_SIDE}×{MIN_SIDE} pixels", f"{width}×{height}")
        if width * height > MAX_PIXELS:
            raise UnusableError(f"more than {MAX_PIXELS // 1_000_000} megapixels", f"{width}×{height}")
        if size and size * size * max(width, height) > MAX_PIXELS * min(width, height):
            raise UnusableError("far longer than wide", f"{width}×{height}")
        if getattr(image, "n_frames", 1) > 1:
            facts["notes"].append("first frame only")
        image.load()
        rgb = _rgb(_upright(image, facts), facts)
    if not size:
        return facts, b""
    return facts, _channels_first(_square(rgb, size))


def _upright(image: Image.Image, facts: dict[str, Any]) -> Image.Image:
    """The picture as its EXIF orientation means it to be seen."""
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:
        # Broken metadata around sound pixels: every viewer shows such a picture as it lies.
        return image
    if turned.size != image.size or image.getexif().get(0x0112, 1) != 1:
        facts["notes"].append("turned by EXIF")
    return turned


def _rgb(image: Image.Image, facts: dict[str, Any]) -> Image.Image:
    """8-bit RGB: transparency composed on white, 16 bits scaled to 8."""
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        deep = image.convert("I")
        low, high = deep.getextrema()
        if not 0 <= low <= high <= 65535:  # type: ignore[operator]  # one band: a pair of numbers
            raise UnusableError("pixel values of 32 bits, with no range given", f"{low}…{high}")
        facts["notes"].append("16 bits scaled to 8")
        return deep.point(SIXTEEN_TO_EIGHT, "L").convert("RGB")
    if mode == "F":
        raise UnusableError("floating-point pixels, with no range given")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            facts["notes"].append("transparency on white")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            white.alpha_composite(rgba)
            rgba = white
        return rgba.convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    """
    Short side to `size`, then the centre.

    The same pixels as torchvision's Resize(size), CenterCrop(size) on a PIL picture; the
    rounding of both, Python's to-even in the crop included, is theirs.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if short != size:
        stretched = int(size * long / short)
        to = (size, stretched) if width <= height else (stretched, size)
        image = image.resize(to, Image.Resampling.BILINEAR)
    width, height = image.size
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def _channels_first(image: Image.Image) -> bytes:
    return b"".join(band.tobytes() for band in image.split())


def _start(data: bytes) -> str:
    return "begins with " + data[:8].hex(" ")


# --- the child process ------------------------------------------------------------------------


def _load_sandbox() -> Any:
    """The module beside this one, by its path: this process finds nothing of ganq by name."""
    spec = importlib.util.spec_from_file_location("ganq_sandbox", Path(__file__).parents[1] / "sandbox.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_the_rest() -> None:
    """Import what Pillow imports when a picture needs it: afterwards no file can be opened."""
    import copy  # noqa: F401
    import mmap  # noqa: F401

    from PIL import ImageColor, ImagePalette, MpoImagePlugin, TiffTags  # noqa: F401

    with suppress(ImportError):  # of pictures in LAB; not in every build of Pillow
        from PIL import ImageCms  # noqa: F401
    Image.preinit()
    for encoding in ("ascii", "latin-1", "utf-8", "utf-16", "utf-16-le", "utf-16-be"):
        "".encode(encoding)


def main() -> None:
    """Answer requests until stdin ends."""
    sandbox = _load_sandbox()
    _import_the_rest()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up between the pixels
    sandbox.confine(memory_bytes=MEMORY_BYTES, cpu_seconds=None)
    sink.write(READY)
    sink.flush()
    while header := source.read(REQUEST.size):
        number, size, length = REQUEST.unpack(header)
        data = source.read(length)
        if len(data) < length:
            return
        sandbox.grant_seconds(CPU_SECONDS)
        pixels = b""
        try:
            facts, pixels = decode(data, size)
        except UnusableError as exc:
            facts = {"reason": exc.reason, "detail": exc.detail}
        text = json.dumps(facts).encode()
        sink.write(ANSWER.pack(number, len(text), len(pixels)) + text)
        sink.write(pixels)
        sink.flush()


if __name__ == "__main__":
    main()
