"""The last grid of a job and its curves in a terminal: half blocks and sparklines."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.session import Session
from cli.ui import output
from jobs.errors import VolumeError
from storage.db.rows import Job

if TYPE_CHECKING:
    from rich.text import Text

COLUMNS, ROWS = 64, 32
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48
SHOWN = ("loss_d", "loss_g", "d_real", "d_fake", "augment_p", "images_per_s")


def enabled() -> bool:
    """Return whether stdout is a terminal that shows colours and these characters."""
    return (
        output.on_terminal() and not os.environ.get("NO_COLOR") and output.overflow() == "ellipsis"  # UTF-8
    )


def print_graphics(session: Session, job: Job) -> None:
    """Print the last grid of a training or the first of a generation, and a line for each curve."""
    if job.kind not in ("train", "generate") or not job.attempt:
        return
    from rich.console import Console

    from storage.results.attempts import Metrics
    from web.curves import columns
    from web.samples import newest_grid

    try:
        volume = session.volume
    except VolumeError:  # reported above
        return
    console = Console(highlight=False)
    grid = newest_grid(volume, job)
    if grid is not None and (drawn := half_blocks(grid, min(COLUMNS, console.width))) is not None:
        console.print(drawn)
    if job.kind == "train":
        found = columns(volume, job, Metrics())
        for name, values in _curves(found):
            console.print(f"{name:>16}  {sparkline(values)}  {values[-1]:.4g}")


def _curves(found: dict[str, Any]) -> list[tuple[str, list[float]]]:
    curves = [(name, found["series"][name]) for name in SHOWN if name in found["series"]]
    by_key: dict[str, list[Any]] = {}
    for one in found["evaluations"]:
        by_key.setdefault(one["key"].partition("/")[0], []).append(one["value"])
    curves += list(by_key.items())
    some = [(name, [one for one in values if one is not None]) for name, values in curves]
    return [(name, values) for name, values in some if values]


def half_blocks(path: Path, width: int) -> "Text | None":
    """Return an image as text, two pixels in a cell; None if it cannot be read."""
    from PIL import Image
    from rich.text import Text

    from web.samples import open_image

    try:
        image = open_image(path)
    except OSError:
        return None
    scale = min(width / image.width, 2 * ROWS / image.height)
    size = max(1, int(image.width * scale)), max(2, int(image.height * scale) // 2 * 2)
    pixels = image.resize(size, Image.Resampling.BOX).load()
    assert pixels is not None
    text = Text(no_wrap=True)
    for y in range(0, size[1], 2):
        for x in range(size[0]):
            text.append("▀", style=f"{_colour(pixels[x, y])} on {_colour(pixels[x, y + 1])}")
        text.append("\n")
    text.rstrip()
    return text


def _colour(pixel: Any) -> str:
    return "#{:02x}{:02x}{:02x}".format(*pixel)


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Return a curve as one line of bars, averaged in groups where it is long."""
    if len(values) > width:
        edges = [len(values) * i // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(values), max(values)
    if not math.isfinite(high - low) or high == low:
        return SPARKS[0] * len(values)
    return "".join(SPARKS[min(7, int((one - low) / (high - low) * 8))] for one in values)
