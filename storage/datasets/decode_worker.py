"""
Decode images of unknown origin, in a process that is confined.

    python -P storage/datasets/decode_worker.py READER WHITE_LEVEL

Image libraries have the largest attack surface for hostile data, so they are used only here: a child
process without torch, with limits on memory and CPU time, confined by the operating system to
its pipes (storage/sandbox.py). Bytes come in on stdin, pixels go out on stdout;
storage/datasets/decode_pool.py is the other end. The file is run by its path and imports nothing but
Pillow and the sandbox, so a child starts in 0.1 s.

What is decoded is bounded: the formats that Pillow decodes by itself, the first frame, 64 megapixels. A
truncated file is never half an image. `Image.verify()` is not used: it accepts truncated JPEGs.

Metadata does not decide whether an image is used: a text that is too long, a wrong checksum of a comment or a
malformed EXIF tag are ignored. What metadata says about pixels is applied: orientation and colour profile.
Version 1 of the reader (ganq 0.1 and 0.2) took every warning for an error and ignored profiles. Facts record
where the versions differ ('changed'), because a data set without such an image has the same cache in both.
"""

import hashlib
import importlib.util
import io
import json
import os
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import (
    Image,
    ImageChops,
    ImageCms,
    ImageFile,
    ImageOps,
    PngImagePlugin,
    UnidentifiedImageError,
)

FORMATS_1 = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
FORMATS = (
    *FORMATS_1,
    *("AVIF", "JPEG2000", "PPM", "QOI", "ICO", "ICNS", "CUR", "DIB", "DDS", "BLP", "FTEX", "GBR", "PSD"),
    *("SGI", "SUN", "MSP", "XBM", "XPM", "FITS", "FLI", "PIXAR", "DCX", "PCX", "PCD", "TGA"),
)
"""What Pillow decodes by itself; those with the weakest signatures last. EPS and WMF start programs."""
UNREAD = (
    (4, (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1"), "HEIC is not read"),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL "), "JPEG XL is not read"),
)
"""Formats that are recognised and not read: offset, signatures, reason."""
MAX_PIXELS = 64_000_000
MIN_SIDE = 8
"""Pixels; below that an image is an icon or a tracking dot, and resizing makes a blur of it."""
MEMORY_BYTES = 3 << 30
"""Address space: 64 megapixels as RGBA, composed on white, are 0.8 GB; the rest is headroom."""
CPU_SECONDS = 60
"""For one image; 64 megapixels take about 3."""
MAX_PROFILE_BYTES = 16 << 20
PROFILES_KEPT = 64
SAME_COLOURS = 3
"""Of 255: a profile that changes no colour by more is sRGB under another name, and is not applied."""
GREY_SIDE, GREY_DIFFERENCE = 32, 2
"""Pixels a side that are compared, and by how much the channels of a grey one may differ."""

REQUEST = struct.Struct(">qIQ")
"""Image's number, side of the square (0: only check it), bytes that follow."""
ANSWER = struct.Struct(">qIQ")
"""Image's number, bytes of JSON facts, bytes of pixels."""
READY = b"ready"
"""A child's first output; one that never writes it has failed to start, not failed at an image."""

# 65535 must become 255, and Pillow's own conversion clips at 255 instead.
SIXTEEN_TO_EIGHT = [(value * 255 + 32767) // 65535 for value in range(65536)]

METADATA_CHUNKS = ("cHRM", "eXIf", "gAMA", "iCCP", "iTXt", "pHYs", "sRGB", "tEXt", "zTXt")
ORIENTATION = 0x0112
ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
IGNORED_WARNINGS = (
    # Many phones write such files, and the image in them is sound.
    r"Image appears to be a malformed MPO",
    # Broken metadata around sound pixels, see _upright_1().
    r"(Possibly corrupt|Corrupt) EXIF data",
)


class UnusableError(Exception):
    """
    An image that is left out.

    Args:
        reason: one of a few phrases, so that reasons can be counted.
        detail: what is particular to this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class Decoder:
    """
    Decode images one after the other.

    Args:
        reader: version of the rules.
        white_level: value that becomes white in images of 16 bits or floats; 0: the largest of 16 bits.
        fit: 'crop', 'pad' or 'stretch', as in storage.datasets.sources.Reading.
    """

    def __init__(self, reader: int, white_level: float = 0.0, fit: str = "crop") -> None:
        self.reader, self.white_level = reader, white_level
        self.square = {"crop": _square, "pad": _padded, "stretch": _stretched}[fit]
        self.formats = tuple(one for one in (FORMATS_1 if reader == 1 else FORMATS) if one in Image.OPEN)
        self._profiles: dict[tuple[bytes, str], Any] = {}
        self._tolerated = 0
        if reader > 1:
            self._tolerate_metadata()

    def decode(self, data: bytes, size: int = 0) -> tuple[dict[str, Any], bytes]:
        """
        Return one image as pixels.

        Args:
            data: the file's bytes.
            size: side of the square, in pixels; 0 decodes only to see whether it can be.

        Returns:
            (facts, pixels): format, mode, width, height, notes and what else was seen of the file;
            3·size·size bytes in the order channel, row, column, or nothing for size 0.

        Raises:
            UnusableError: with the reason.
        """
        if not data:
            raise UnusableError("empty file")
        with warnings.catch_warnings(record=self.reader > 1) as self.warned:
            warnings.simplefilter("error" if self.reader == 1 else "always")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for message in IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            try:
                return self._decode(data, size)
            except UnusableError:
                raise
            except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
                raise UnusableError(f"more than {MAX_PIXELS // 1_000_000} megapixels") from exc
            except UnidentifiedImageError as exc:
                raise UnusableError(_kind(data), _start(data)) from exc
            except MemoryError as exc:
                raise UnusableError("takes too much memory to decode") from exc
            except Exception as exc:
                # Pillow's plugins raise nearly anything on broken data: struct.error, SyntaxError, KeyError.
                raise UnusableError("broken or truncated", f"{type(exc).__name__}: {exc}"[:200]) from exc

    def _decode(self, data: bytes, size: int) -> tuple[dict[str, Any], bytes]:
        self._tolerated = 0
        with Image.open(io.BytesIO(data), formats=self.formats) as image:
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
            deep = self.reader > 1 and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
            image.load()
            if self.reader == 1:
                rgb = self._rgb(_upright_1(image, facts), facts)
            else:
                known = image.format in FORMATS_1 or image.format == "MPO"
                if not known or self.warned or self._tolerated:
                    facts["changed"] = True
                rgb = self._rgb(self._upright(image, facts), facts)
                if deep and "depth" not in facts:
                    rgb = self._deep_colours(rgb, facts)
                facts["grey"] = _is_grey(rgb)
        if not size:
            return facts, b""
        return facts, _channels_first(self.square(rgb, size))

    # --- metadata ---------------------------------------------------------------------------

    def _tolerate_metadata(self) -> None:
        """Make Pillow ignore invalid metadata of a PNG instead of refusing the image."""

        def tolerant(read: Callable[..., bytes]) -> Callable[..., bytes]:
            def chunk(stream: Any, pos: int, length: int) -> bytes:
                start = stream.fp.tell()
                try:
                    return read(stream, pos, length)
                except (ValueError, SyntaxError, IndexError, struct.error):
                    self._tolerated += 1
                    stream.fp.seek(start)
                    return ImageFile._safe_read(stream.fp, length)

            return chunk

        stream: Any = PngImagePlugin.PngStream
        for name in METADATA_CHUNKS:
            setattr(stream, f"chunk_{name}", tolerant(getattr(stream, f"chunk_{name}")))
        check = stream.crc

        def crc(stream: Any, cid: bytes, data: bytes) -> None:
            if cid.decode("latin-1") not in METADATA_CHUNKS:
                check(stream, cid, data)
                return
            start = stream.fp.tell()
            try:
                check(stream, cid, data)
            except SyntaxError:
                self._tolerated += 1
                stream.fp.seek(start)
                stream.crc_skip(cid, data)

        stream.crc = crc

    def _upright(self, image: Image.Image, facts: dict[str, Any]) -> Image.Image:
        """Return the image turned by the orientation in its metadata."""
        before = len(self.warned or ())
        try:
            exif = image.getexif()
            orientation = exif.get(ORIENTATION, 1)
        except Exception:  # broken metadata around sound pixels
            return image
        if isinstance(orientation, tuple) and orientation:
            orientation = orientation[0]
        turn = ROTATIONS.get(orientation) if isinstance(orientation, int) else None
        if turn is None:
            return image
        facts["notes"].append("turned by EXIF")
        try:
            exif.tobytes()
            strange = len(self.warned or ()) > before or not isinstance(exif.get(ORIENTATION), int)
        except Exception:
            strange = True
        if strange:  # version 1 did not turn it
            facts["changed"] = True
        return image.transpose(turn)

    # --- colours ----------------------------------------------------------------------------

    def _rgb(self, image: Image.Image, facts: dict[str, Any]) -> Image.Image:
        """Return 8-bit sRGB: transparency composed on white, 16 bits scaled to 8, profiles applied."""
        mode = image.mode
        if mode.startswith("I;16") or mode == "I":
            deep = image.convert("I")
            low, high = deep.getextrema()
            facts["depth"] = [low, high]
            if self.white_level:
                return self._to_srgb(self._scaled(deep, facts), image, facts).convert("RGB")
            if not 0 <= low <= high <= 65535:  # type: ignore[operator]  # one band: a pair of numbers
                raise UnusableError("pixel values of 32 bits, with no range given", f"{low}…{high}")
            facts["notes"].append("16 bits scaled to 8")
            grey = deep.point(SIXTEEN_TO_EIGHT, "L")
            return self._to_srgb(grey, image, facts).convert("RGB")
        if mode == "F":
            if not self.white_level:
                raise UnusableError("floating-point pixels, with no range given")
            facts["depth"] = list(image.getextrema())
            return self._scaled(image, facts).convert("RGB")
        if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = self._to_srgb(image.convert("RGBA"), image, facts)
            if rgba.getchannel("A").getextrema() != (255, 255):
                facts["notes"].append("transparency on white")
                white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
                white.alpha_composite(rgba)
                rgba = white
            return rgba.convert("RGB")
        image = self._to_srgb(image, image, facts)
        return image if image.mode == "RGB" else image.convert("RGB")

    def _scaled(self, deep: Image.Image, facts: dict[str, Any]) -> Image.Image:
        """Return grey values from 0 to the white level as 8 bits."""
        facts["changed"] = True
        facts["notes"].append(f"scaled to a white level of {self.white_level:g}")
        factor = 255.0 / self.white_level
        # Conversion to 8 bits clips.
        return deep.convert("F").point(lambda value: value * factor + 0.5).convert("L")

    def _deep_colours(self, rgb: Image.Image, facts: dict[str, Any]) -> Image.Image:
        """Return an image of 16 bits a colour, of which Pillow reads the upper eight."""
        high = max(top for _, top in rgb.getextrema())  # type: ignore[misc]
        facts["depth"] = [0, high * 256 + 255]
        facts["notes"].append("16 bits a colour, the upper 8 used")
        if not self.white_level:
            return rgb
        facts["changed"] = True
        return rgb.point([min(255, round(value * 256 * 255 / self.white_level)) for value in range(256)] * 3)

    def _to_srgb(self, pixels: Image.Image, image: Image.Image, facts: dict[str, Any]) -> Image.Image:
        """
        Return the colours that the image's profile means, in sRGB.

        Args:
            pixels: of `image`, with its transparency.
        """
        profile = image.info.get("icc_profile") if self.reader > 1 else None
        if not isinstance(profile, bytes) or not 128 <= len(profile) <= MAX_PROFILE_BYTES:
            return pixels
        space = profile[16:20]
        if space == b"RGB ":
            pixels = pixels if pixels.mode in ("RGB", "RGBA") else pixels.convert("RGB")
        elif {b"GRAY": "L", b"CMYK": "CMYK"}.get(space) != pixels.mode:
            return pixels
        convert = self._conversion(profile, pixels.mode)
        if convert is None:
            return pixels
        facts["changed"] = True
        facts["notes"].append("colour profile converted to sRGB")
        converted: Image.Image = ImageCms.applyTransform(pixels, convert)  # type: ignore[assignment]
        return converted

    def _conversion(self, profile: bytes, mode: str) -> Any:
        """Return the transform of a profile to sRGB; None if there is nothing to convert, or it is broken."""
        key = hashlib.sha256(profile).digest(), mode
        if key not in self._profiles:
            if len(self._profiles) >= PROFILES_KEPT:
                self._profiles.clear()
            self._profiles[key] = _conversion(profile, mode)
        return self._profiles[key]


def _conversion(profile: bytes, mode: str) -> Any:
    to = mode if mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        convert = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, to)
        probe = _probe(mode)
        plain, converted = probe.convert("RGB"), ImageCms.applyTransform(probe, convert)
    except Exception:  # a broken profile around sound pixels
        return None
    assert converted is not None
    differences = ImageChops.difference(plain, converted.convert("RGB")).getextrema()
    return convert if max(high for _, high in differences) > SAME_COLOURS else None  # type: ignore[misc]


def _probe(mode: str) -> Image.Image:
    """Return an image of colours from all over the cube."""
    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    if mode == "CMYK":
        return Image.frombytes("CMYK", (81, 1), bytes(_grid(4, 3)))
    colours = Image.frombytes("RGB", (729, 1), bytes(_grid(3, 9)))
    return colours.convert(mode)


def _grid(channels: int, steps: int) -> list[int]:
    count = steps**channels
    return [
        255 * (number // steps**channel % steps) // (steps - 1)
        for number in range(count)
        for channel in range(channels)
    ]


def _is_grey(rgb: Image.Image) -> bool:
    """Return whether an image shows no colour, by pixels spread over it."""
    red, green, blue = rgb.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.NEAREST).split()
    for other in (green, blue):
        if ImageChops.difference(red, other).getextrema()[1] > GREY_DIFFERENCE:  # type: ignore[operator]
            return False
    return True


def _upright_1(image: Image.Image, facts: dict[str, Any]) -> Image.Image:
    """Return the image turned by its EXIF orientation, as version 1 did."""
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:
        # Broken metadata around sound pixels: viewers show such an image unturned.
        return image
    if turned.size != image.size or image.getexif().get(ORIENTATION, 1) != 1:
        facts["notes"].append("turned by EXIF")
    return turned


def _square(image: Image.Image, size: int) -> Image.Image:
    """
    Return the centre of the image, its short side scaled to `size`.

    The same pixels as torchvision's Resize(size), CenterCrop(size) on a PIL image; the
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


def _padded(image: Image.Image, size: int) -> Image.Image:
    """Return the whole image with black bars, its long side scaled to `size`."""
    return ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR)


def _stretched(image: Image.Image, size: int) -> Image.Image:
    """Return the whole image, both sides scaled to `size`."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _channels_first(image: Image.Image) -> bytes:
    return b"".join(band.tobytes() for band in image.split())


def _kind(data: bytes) -> str:
    for offset, signatures, reason in UNREAD:
        if data[offset:].startswith(signatures):
            return reason
    return "not an image in a known format"


def _start(data: bytes) -> str:
    return "begins with " + data[:8].hex(" ")


# --- the child process ------------------------------------------------------------------------


def _load_sandbox() -> Any:
    """Load the module by its path: this process finds nothing of ganq by name."""
    spec = importlib.util.spec_from_file_location("ganq_sandbox", Path(__file__).parents[1] / "sandbox.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_libraries() -> None:
    """Import what Pillow imports when an image needs it: afterwards no file can be opened."""
    import copy  # noqa: F401
    import mmap  # noqa: F401

    from PIL import AvifImagePlugin, ImageColor, ImagePalette, MpoImagePlugin, TiffTags  # noqa: F401

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a confined process cannot start another
    Image.init()
    for encoding in ("ascii", "latin-1", "utf-8", "utf-16", "utf-16-le", "utf-16-be"):
        "".encode(encoding)


def main() -> None:
    """Answer requests until stdin ends."""
    sandbox = _load_sandbox()
    _import_libraries()
    decoder = Decoder(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not get between the pixels
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
            facts, pixels = decoder.decode(data, size)
        except UnusableError as exc:
            facts = {"reason": exc.reason, "detail": exc.detail}
        text = json.dumps(facts).encode()
        sink.write(ANSWER.pack(number, len(text), len(pixels)) + text)
        sink.write(pixels)
        sink.flush()


if __name__ == "__main__":
    main()
