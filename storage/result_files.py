"""
Files of a result that its row names with their sha-256, beside the pictures of the manifest.

Films, overviews and the report of an evaluation: few, so that the row itself can list them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jobs.errors import StorageError
from storage.durable import sha256_file


def verify_files(folder: Path, files: Iterable[Mapping[str, Any]]) -> None:
    """
    Check the files that a result lists.

    Args:
        folder: of the attempt that made them.
        files: name (relative to the folder), bytes and sha256 of each.

    Raises:
        StorageError: one is missing, or is not the one that was registered.
    """
    for one in files:
        path = folder / one["name"]
        if not path.is_file() or path.stat().st_size != one["bytes"] or sha256_file(path) != one["sha256"]:
            raise StorageError(f"{path} is missing or has changed since it was published")
