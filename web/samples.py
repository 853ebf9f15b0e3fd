"""The sample grids of a run, over all its attempts; and crops of them."""

import io
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.db.rows import Job
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLE = re.compile(r"epoch-([0-9]{1,9})\.png")
COLUMNS, PADDING = 8, 2
"""Layout of a grid, as in jobs/grids.py, which imports torch."""
MAX_PIXELS = 64_000_000
THUMB_FACES, THUMB_SIDE = 4, 56


@dataclass(frozen=True)
class Sample:
    """One grid."""

    attempt: int
    epoch: int
    version: str
    """Differs for each version of the file."""
    at: float

    def url(self, job_id: int) -> str:
        return f"/jobs/{job_id}/samples/{self.attempt}/{self.epoch}.png?v={self.version}"


def path_of(volume: Volume, job_id: int, attempt: int, epoch: int) -> Path:
    return volume.attempt(job_id, attempt) / "samples" / f"epoch-{epoch:04d}.png"


def samples_of(volume: Volume, job: Job) -> list[Sample]:
    """Return a run's grids by epoch; of two attempts that drew one epoch, the newer's."""
    found: dict[int, Sample] = {}
    for attempt in range(1, job.attempt + 1):
        folder = volume.attempt(job.id, attempt) / "samples"
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                name = SAMPLE.fullmatch(entry.name)
                if name is None or not entry.is_file(follow_symlinks=False):
                    continue
                with suppress(OSError):  # deleted meanwhile
                    about = entry.stat(follow_symlinks=False)
                    version = f"{about.st_mtime_ns:x}-{about.st_size:x}"
                    epoch = int(name[1])
                    found[epoch] = Sample(attempt, epoch, version, about.st_mtime)
    return [found[epoch] for epoch in sorted(found)]


def open_image(data: bytes | Path) -> "Image":
    """
    Open an image of limited size.

    Raises:
        OSError: it is no whole image, or a far too large one.
    """
    from PIL import Image

    try:
        found = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        if found.width * found.height > MAX_PIXELS:
            raise OSError("it is too large to be shown")
        return found.convert("RGB")
    except (ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise OSError(str(exc)) from exc


def faces(grid: "Image", side: int | None, count: int) -> "Image":
    """
    Cut the first images out of a grid into a strip.

    Args:
        side: of one image in the grid; None: the grid has COLUMNS columns.
    """
    from PIL import Image

    if side is None or not 0 < side <= grid.width - 2 * PADDING:
        side = max(1, (grid.width - PADDING) // COLUMNS - PADDING)
        if (grid.height - PADDING) % (side + PADDING):  # fewer images than columns: one row
            side = max(1, grid.height - 2 * PADDING)
    strip = Image.new("RGB", (count * THUMB_SIDE, THUMB_SIDE))
    columns = max(1, (grid.width - PADDING) // (side + PADDING))
    for place in range(count):
        row, column = divmod(place, columns)
        left, top = PADDING + column * (side + PADDING), PADDING + row * (side + PADDING)
        if top + side > grid.height:
            break
        face = grid.crop((left, top, left + side, top + side))
        if side != THUMB_SIDE:
            how = Image.Resampling.LANCZOS if side > THUMB_SIDE else Image.Resampling.NEAREST
            face = face.resize((THUMB_SIDE, THUMB_SIDE), how)
        strip.paste(face, (place * THUMB_SIDE, 0))
    return strip


def as_webp(image: "Image", quality: int = 85) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", quality=quality, method=2)
    return out.getvalue()


def side_of(job: Job) -> int | None:
    """Return the side of one image in the grids of a training."""
    side: Any = job.spec.get("size")
    return side if isinstance(side, int) and not isinstance(side, bool) else None


def newest_grid(volume: Volume, job: Job) -> Path | None:
    """Return the last sample grid of a training, or the first grid of a generation."""
    if job.kind == "train":
        drawn = samples_of(volume, job)
        return path_of(volume, job.id, drawn[-1].attempt, drawn[-1].epoch) if drawn else None
    folder = volume.attempt(job.id, job.attempt) / "grids"
    return next(iter(sorted(folder.glob("grid-[0-9]*.png"))), None) if folder.is_dir() else None
