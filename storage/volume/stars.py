"""Starred images of a result, in <volume>/stars/000012.json, bound to the hash of its manifest."""

import json
import threading
from pathlib import Path

from storage.volume.durable import make_folder, raise_storage_error, write_json
from storage.volume.layout import Volume

MOST = 100_000
_writing = threading.Lock()


def _path(volume: Volume, job_id: int) -> Path:
    return volume.root / "stars" / f"{job_id:06d}.json"


def read_stars(volume: Volume, job_id: int, manifest_sha256: str) -> list[int]:
    """Return the starred images of a result, by index; none if it was generated again since."""
    try:
        found = json.loads(_path(volume, job_id).read_bytes())
        if found["manifest_sha256"] != manifest_sha256:
            return []
        return sorted({one for one in found["images"] if isinstance(one, int)})
    except (OSError, ValueError, KeyError, TypeError):
        return []


def set_star(volume: Volume, job_id: int, manifest_sha256: str, index: int, *, starred: bool) -> list[int]:
    """
    Set or remove the star of an image.

    Returns:
        The starred images now.

    Raises:
        StorageError: it cannot be written.
    """
    with _writing:
        kept = set(read_stars(volume, job_id, manifest_sha256)) - {index}
        images = sorted(kept | {index} if starred and len(kept) < MOST else kept)
        path = _path(volume, job_id)
        try:
            make_folder(path.parent, inside=path.parent.parent)
            write_json(path, {"manifest_sha256": manifest_sha256, "images": images})
        except OSError as exc:
            raise_storage_error(exc, path)
        return images
