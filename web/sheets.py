"""
Contact sheets: many small images as one file, so that ten thousand take a few requests.

A sheet is drawn on request and cached in memory. Its address contains the hash of the manifest, so that
browsers cache it for good. docs/decisions/0019-the-page.md explains why workers write none.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.errors import StorageError
from storage.results.formats import pixels_of
from web.manifest import ManifestIndex
from web.samples import as_webp

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTHS = (2, 4, 8, 12, 16, 24)
"""Possible numbers of columns; the browser chooses by the width of its window."""
ROWS = 4
MAX_SIDE = 96
MIN_SIDE = 16
MISSING = (128, 128, 128)


def image_at(index: ManifestIndex, number: int) -> "Image":
    """
    Return one published image as a Pillow image.

    Raises:
        OSError, StorageError: it is missing or torn.
    """
    from PIL import Image

    made = index.made(number)
    try:
        pixels = pixels_of(made)
        if pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(pixels.shape)
        return Image.fromarray(pixels)
    except (ValueError, SyntaxError, KeyError, Image.DecompressionBombError) as exc:
        raise StorageError(f"{made.path.name} is torn or no image") from exc


def side_of(index: ManifestIndex) -> int:
    """Return the side of an image on a sheet: as it is, or smaller; the first whole one decides."""
    for number in range(min(index.count, 3)):
        try:
            found = image_at(index, number)
        except (OSError, StorageError):
            continue
        return max(MIN_SIDE, min(MAX_SIDE, max(found.size)))
    return MAX_SIDE


def draw(index: ManifestIndex, numbers: Sequence[int], columns: int, side: int) -> bytes:
    """Return a sheet as WebP; an image that is missing or torn is a crossed grey field."""
    from PIL import Image, ImageDraw

    rows = max(1, -(-len(numbers) // columns))
    sheet = Image.new("RGB", (columns * side, rows * side))
    for place, number in enumerate(numbers):
        row, column = divmod(place, columns)
        try:
            image = image_at(index, number)
        except (OSError, StorageError):
            image = Image.new("RGB", (side, side), MISSING)
            ImageDraw.Draw(image).line([(0, 0), (side, side)], fill=(60, 60, 60))
            ImageDraw.Draw(image).line([(side, 0), (0, side)], fill=(60, 60, 60))
        if max(image.size) > side:
            image = image.resize(
                (side * image.width // max(image.size), side * image.height // max(image.size)),
                Image.Resampling.LANCZOS,
            )
        sheet.paste(
            image, (column * side + (side - image.width) // 2, row * side + (side - image.height) // 2)
        )
    return as_webp(sheet)
