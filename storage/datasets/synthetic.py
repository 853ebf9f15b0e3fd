"""
Draw a demo data set: cartoon faces from avatar styles by artists, under licences that allow it.

Face i of (style, seed) is always the same image. The artists are named in
ATTRIBUTION.txt beside the images.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jobs.errors import ConfigError, DatasetError, SpecError
from storage.datasets.names import ATTRIBUTION
from storage.volume.durable import fsync_folder, make_folder, raise_storage_error, sync_filesystem

STYLES = ("adventurer", "big-smile", "lorelei", "notionists", "open-peeps", "pixel-art", "critters")
BACKGROUNDS = ("b6e3f4", "c0aede", "d1d4f9", "ffd5dc", "ffdfbf")
"""Light background colours; one is drawn for each face."""
MAX_FACES = 1_000_000
CHUNK = 100

HOW_TO_INSTALL = "pip install 'ganq[faces]'"


@dataclass(frozen=True)
class StyleInfo:
    """The artist of a style and its licence."""

    name: str
    title: str
    creator: str
    source: str
    licence: str
    licence_url: str

    def attribution(self) -> str:
        return (
            f"{self.title} by {self.creator} ({self.source})\n"
            f"licensed under {self.licence} ({self.licence_url})\n"
            "drawn by DiceBear (https://www.dicebear.com), put together at random by ganq dataset make\n"
        )


def styles() -> list[StyleInfo]:
    """
    Return the styles with their licences, as their package states them.

    Raises:
        ConfigError: the package is not installed.
    """
    return [_info(name) for name in STYLES]


def _info(name: str) -> StyleInfo:
    meta = _definition(name)["meta"]
    source = meta.get("source", {})
    return StyleInfo(
        name=name,
        title=source.get("name", name),
        creator=meta.get("creator", {}).get("name", "DiceBear"),
        source=source.get("url", "https://www.dicebear.com"),
        licence=meta["license"]["name"],
        licence_url=meta["license"]["url"],
    )


def _definition(name: str) -> dict[str, Any]:
    try:
        definition: dict[str, Any] = json.loads((files("dicebear_styles") / f"{name}.json").read_text())
    except ModuleNotFoundError as exc:
        raise ConfigError("drawing faces needs the dicebear packages", hint=HOW_TO_INSTALL) from exc
    return definition


def make_faces(
    folder: Path,
    *,
    style: str = "adventurer",
    count: int = 2000,
    size: int = 96,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """
    Draw `count` faces of size×size pixels as PNG files.

    Args:
        folder: must not exist, be empty, or hold an earlier data set of this function,
            which is then replaced.
        progress: called with (faces drawn, count).

    Returns:
        The folder.

    Raises:
        SpecError, DatasetError, ConfigError, DiskFullError: nothing was left behind.
    """
    if style not in STYLES:
        raise SpecError(f"there is no style {style[:40]!r}", hint=f"styles: {', '.join(STYLES)}")
    if not 1 <= count <= MAX_FACES:
        raise SpecError(f"--count {count} is not between 1 and {MAX_FACES}", hint="e.g. --count 2000")
    if not 16 <= size <= 1024:
        raise SpecError(f"--size {size} is not between 16 and 1024 pixels", hint="e.g. --size 96")
    _check_replaceable(folder)
    info = _info(style)
    temp = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        make_folder(folder.parent)
        temp.mkdir()
        done = 0
        for drawn in _drawn_in_parallel(temp, style, count, size, seed):
            done += drawn
            progress(done, count)
        (temp / ATTRIBUTION).write_text(info.attribution())
        sync_filesystem(temp)
        if folder.exists():
            shutil.rmtree(folder)
        temp.rename(folder)
        fsync_folder(folder.parent)
    except OSError as exc:
        raise_storage_error(exc, folder.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DatasetError(f"{folder} is a file", hint="name a folder that does not exist yet")
    there = {one.name for one in folder.iterdir()}
    ours = ATTRIBUTION in there and all(
        name == ATTRIBUTION or (name.startswith("face-") and name.endswith(".png")) for name in there
    )
    if there and not ours:
        raise DatasetError(
            f"{folder} holds files that ganq did not draw", hint="name another folder, or empty this one"
        )


def _drawn_in_parallel(folder: Path, style: str, count: int, size: int, seed: int) -> Iterator[int]:
    starts = range(0, count, CHUNK)
    jobs = [(str(folder), style, start, min(start + CHUNK, count), size, seed) for start in starts]
    if len(jobs) == 1:
        yield _draw(jobs[0])
        return
    # 'spawn': a forked child would carry the caller's threads and open files along.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        yield from pool.map(_draw, jobs)


def _draw(job: tuple[str, str, int, int, int, int]) -> int:
    folder, style, first, end, size, seed = job
    try:
        import resvg_py
        from dicebear import Avatar, Style
    except ModuleNotFoundError as exc:
        raise ConfigError("drawing faces needs the dicebear packages", hint=HOW_TO_INSTALL) from exc
    drawing = Style(_definition(style))
    for i in range(first, end):
        svg = Avatar(drawing, {"seed": f"{seed}-{i}", "backgroundColor": list(BACKGROUNDS)}).to_string()
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        (Path(folder) / f"face-{i:06d}.png").write_bytes(bytes(png))
    return end - first
