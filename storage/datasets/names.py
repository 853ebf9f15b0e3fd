"""
The rules for names in a data set: which files are images, which are hidden, what is packaging.

Folders, zips and tars follow the same rules. The process that reads archives loads this file by its path,
so it imports nothing of ganq.

The rules have versions. A job stores the version under which its data set is read, so that a job of an older
ganq finds the images that it began with.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

READER = 2
"""The newest version of the rules for names and pixels; 1 is that of ganq 0.1 and 0.2."""

SUFFIXES_1 = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SUFFIXES = SUFFIXES_1 | frozenset(
    {
        *(".apng", ".avif", ".avifs", ".blp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".fit", ".fits"),
        *(".flc", ".fli", ".ftc", ".ftu", ".gbr", ".icb", ".icns", ".ico", ".j2c", ".j2k", ".jp2"),
        *(".jpc", ".jpe", ".jpf", ".jpx", ".mpo", ".msp", ".pbm", ".pcd", ".pcx", ".pfm", ".pgm", ".pnm"),
        *(".ppm", ".psd", ".pxr", ".qoi", ".ras", ".rgb", ".rgba", ".sgi", ".tga", ".vda", ".vst", ".xbm"),
        ".xpm",
    }
)
"""Of every format that Pillow decodes by itself. EPS and WMF need another program, which is never run."""
UNSUPPORTED_SUFFIXES = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "HEIC"),
    ".jxl": "JPEG XL",
    **dict.fromkeys((".jxr", ".wdp", ".hdp"), "JPEG XR"),
    **dict.fromkeys((".exr", ".hdr"), "HDR"),
    **dict.fromkeys((".eps", ".svg", ".svgz", ".wmf", ".emf"), "vector graphics"),
    **dict.fromkeys(
        (".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"),
        "camera raw",
    ),
}
"""Images by their names that ganq does not read: they count as left out."""
CONVERT = "convert it: magick mogrify -format jpg FILES"

SYSTEM = frozenset(
    {
        *("__macosx", "$recycle.bin", "system volume information", "lost+found"),
        *("@eadir", "#recycle", "#snapshot", "thumbs.db", "desktop.ini"),
    }
)
"""Files and folders that systems add by themselves, some with thumbnails of the images beside them."""
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"})
"""Folders that divide a data set for experiments; they are no classes."""
ATTRIBUTION = "ATTRIBUTION.txt"
"""Where `ganq dataset make` names the artists; not reported as a file that is no image."""
LABELS = "dataset.json"
"""Labels as StyleGAN's dataset_tool.py writes them."""


def suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def is_image_name(name: str, reader: int = READER) -> bool:
    return suffix(name) in (SUFFIXES_1 if reader == 1 else SUFFIXES)


def is_image(name: str, reader: int = READER) -> bool:
    """Return whether a file is an image by its name, readable or not."""
    return is_image_name(name, reader) or (reader > 1 and suffix(name) in UNSUPPORTED_SUFFIXES)


def canonical(name: str, reader: int = READER) -> str:
    """
    Return a file's name with slashes and composed characters.

    `tar -C faces .` writes ./001.png, which is the image 001.png. Archives made on Windows may have
    backslashes, and macOS writes decomposed characters.
    """
    if reader > 1:
        name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    return str(PurePosixPath(name))


def is_hidden(name: str, reader: int = READER) -> bool:
    """Return whether a file is hidden: a name with a dot, or a folder of the system."""
    parts = name.split("/")
    if any(one.startswith(".") and one not in (".", "..") for one in parts):
        return True
    if reader == 1:
        return parts[0] == "__MACOSX"
    return any(one.lower() in SYSTEM for one in parts)


def class_depth(names: Iterable[str]) -> int | None:
    """
    Return the depth of the folders of the classes; None if there are no classes.

    A single folder around everything is packaging, and so are folders such as train/ and val/ and the
    numbered folders of StyleGAN and FFHQ, which hold a thousand images each.

    Args:
        names: canonical; at least one.
    """
    split = [name.split("/") for name in names]
    depth = 0
    while True:
        tops = {parts[depth] if len(parts) > depth + 1 else None for parts in split}
        if None in tops:
            return None
        if len(tops) > 1 and not {str(top).lower() for top in tops} <= SPLITS:
            return None if _numbered(split, depth) else depth
        depth += 1


def _numbered(split: list[list[str]], depth: int) -> bool:
    """Return whether each folder has the number of its images in thousands (01000/01234.png)."""
    for parts in split:
        folder, stem = parts[depth], PurePosixPath(parts[-1]).stem.removeprefix("img")
        if len(folder) != 5 or not (folder.isdecimal() and stem.isdecimal()) or len(parts) != depth + 2:
            return False
        if int(folder) not in (int(stem) // 1000, int(stem) // 1000 * 1000):
            return False
    return True
