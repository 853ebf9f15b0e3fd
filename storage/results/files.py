"""
Files of a result that its row lists with their SHA-256, beside the images of the manifest.

These are videos, grids and the report of an evaluation.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import ForeignFileError
from storage.volume.durable import sha256_file, write_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REPORTS = re.compile(r"evaluation\.json|neighbours\.png")
"""Names of the files of an evaluation."""


def write_files(folder: Path, files: "Mapping[str, bytes | NDArray[np.uint8]]") -> list[dict[str, Any]]:
    """
    Write files durably; pixels are encoded as PNG.

    Returns:
        name, bytes and sha256 of each.

    Raises:
        DiskFullError, VolumeError: the file does not exist.
    """
    from storage.results.codecs import encode_png

    written = []
    for name, content in files.items():
        data = content if isinstance(content, bytes) else encode_png(content)
        digest = write_bytes(folder / name, data)
        written.append({"name": name, "bytes": len(data), "sha256": digest})
    return written


def require_sha256(path: Path, expected: str) -> None:
    """
    Check the SHA-256 of a file.

    Raises:
        ForeignFileError: it is missing, or another file.
    """
    try:
        found = sha256_file(path)
    except OSError as exc:
        raise ForeignFileError(
            f"{path} cannot be read: {(exc.strerror or str(exc)).lower()}",
            hint="check the path on the worker",
        ) from exc
    if found != expected:
        raise ForeignFileError(
            f"{path} has the sha-256 {found[:12]}…, not {expected[:12]}…",
            hint="it is another file, or was changed; get it again from where it comes from",
        )
