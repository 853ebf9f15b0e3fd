"""
Random access to the images of a published result: line i of a manifest of a million.

The offsets of the lines are found once by a scan for newlines. A line is parsed when it is shown; scores
are read when a gallery is sorted by them.
"""

import json
import re
import threading
from bisect import bisect_right
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.context import StoredImage
from jobs.errors import NotFoundError, StorageError
from storage.db.rows import Job
from storage.results.formats import MANIFEST
from web.site import Site

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK = 16 << 20
TAIL_LINES = 2000
"""Maximum number of lines about whole archives, which stand at the end of a manifest."""
MAX_LINE = 1 << 16
SHARD_LINE = b'{"shard"'
OPEN_SHARDS = 64
"""Shards of one result whose indices are kept in memory."""
ORDERS = ("index", "best", "worst")
_SHA256 = re.compile(rb"[0-9a-f]{64}")
_OF_IMAGE = re.compile(rb'"sha256": ?"([0-9a-f]{16})')
_SCORE = re.compile(rb'"score": ?(null|-?[0-9.]+(?:[eE][-+]?[0-9]+)?)')


class ManifestIndex:
    """
    Where each image's line begins.

    Args:
        folder: of the result.
        path: of the manifest, if it is that of a shard.

    Raises:
        StorageError: the manifest cannot be read.
    """

    def __init__(self, folder: Path, path: Path | None = None) -> None:
        import numpy as np

        self.folder = folder
        self.path = path or folder / MANIFEST
        self._lock = threading.Lock()
        starts, at = [np.zeros(1, np.int64)], 0
        try:
            with open(self.path, "rb") as file:
                while chunk := file.read(CHUNK):
                    ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
                    starts.append(ends.astype(np.int64) + (at + 1))
                    at += len(chunk)
        except OSError as exc:
            raise StorageError(f"{self.path} cannot be read: {(exc.strerror or str(exc)).lower()}") from exc
        self._starts: NDArray[np.int64] = np.concatenate(starts)
        self.count = len(self._starts) - 1
        for _ in range(min(TAIL_LINES, self.count)):
            if b'"archive"' not in self._raw(self.count - 1)[:64]:
                break
            self.count -= 1

    @property
    def cost(self) -> int:
        return 64 + 16 * self.count

    def _raw(self, index: int) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(int(self._starts[index]))
                return file.read(min(int(self._starts[index + 1] - self._starts[index]), MAX_LINE))
        except OSError as exc:
            raise StorageError(f"{self.path} cannot be read: {(exc.strerror or str(exc)).lower()}") from exc

    def line(self, index: int) -> dict[str, Any]:
        """
        Return the line of an image.

        Raises:
            NotFoundError: there is no such image.
            StorageError: its line is broken.
        """
        if not 0 <= index < self.count:
            raise NotFoundError(f"there is no image {index}: the last is {self.count - 1}")
        try:
            found = json.loads(self._raw(index))
            if not isinstance(found, dict) or not isinstance(found["file"], str):
                raise ValueError(index)
            int(found["bytes"]), str(found["sha256"])
        except (ValueError, KeyError, TypeError) as exc:
            raise StorageError(f"line {index + 1} of {self.path} is broken") from exc
        return found

    def made(self, index: int) -> StoredImage:
        """Return where an image lies; never outside of its attempt's folder."""
        line = self.line(index)
        name = Path(line["file"])
        if name.is_absolute() or ".." in name.parts:
            raise StorageError(f"line {index + 1} of {self.path} names a file elsewhere")
        return StoredImage(self.folder / name, line, offset=int(line.get("offset", 0)))

    def find(self, sha256: str) -> int:
        """
        Return the index of an image with these bytes.

        Raises:
            NotFoundError: there is none.
        """
        import numpy as np

        if _SHA256.fullmatch(sha256.encode(errors="replace")):
            order, prefixes = self._by_sha256
            wanted = np.uint64(int(sha256[:16], 16))
            for place in range(*np.searchsorted(prefixes, [wanted, wanted + np.uint64(1)])):
                if self.line(int(order[place]))["sha256"] == sha256:
                    return int(order[place])
        raise NotFoundError(f"there is no image {sha256[:64]!r}", hint="the list of images has their SHA-256")

    @cached_property
    def _by_sha256(self) -> "tuple[NDArray[np.int32], NDArray[np.uint64]]":
        """Return the indices in the order of the first 8 bytes of the hashes, and those."""
        import numpy as np

        prefixes = np.zeros(self.count, np.uint64)
        with self._lock, open(self.path, "rb") as file:
            for number, line in zip(range(self.count), file, strict=False):
                if (found := _OF_IMAGE.search(line)) is not None:
                    prefixes[number] = int(found[1], 16)
        order = np.argsort(prefixes, kind="stable")
        return order.astype(np.int32), prefixes[order]

    @cached_property
    def scores(self) -> "NDArray[np.float32] | None":
        """Scores by index, NaN for an image without one; None if no image has a score."""
        import numpy as np

        with self._lock, open(self.path, "rb") as file:
            found = [m[1] for line in file if (m := _SCORE.search(line)) is not None][: self.count]
        if len(found) != self.count or all(one == b"null" for one in found):
            return None
        return np.array([np.nan if one == b"null" else float(one) for one in found], np.float32)

    @cached_property
    def _ranked(self) -> "NDArray[np.int32]":
        import numpy as np

        assert self.scores is not None
        order = np.argsort(-self.scores, kind="stable")  # NaN last
        return order.astype(np.int32)

    def ordered(self, order: str, first: int, count: int) -> list[int]:
        """Return the indices at these places of an order."""
        last = min(first + count, self.count)
        if order == "index" or self.scores is None:
            return list(range(first, last))
        if order == "best":
            return [int(one) for one in self._ranked[first:last]]
        return [int(one) for one in self._ranked[::-1][first:last]]


class ShardedIndex(ManifestIndex):
    """
    The index of a manifest that refers to those of its shards, of which the last used are in memory.

    Raises:
        StorageError: the manifest cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / MANIFEST
        self._lock = threading.Lock()
        self._open: dict[int, ManifestIndex] = {}
        self._found_in = 0
        try:
            with open(self.path, "rb") as file:
                self._shards = [line for line in map(json.loads, file) if "shard" in line]
            self._firsts = [int(line["first"]) for line in self._shards]
            self.count = sum(int(line["images"]) for line in self._shards)
        except OSError as exc:
            raise StorageError(f"{self.path} cannot be read: {(exc.strerror or str(exc)).lower()}") from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise StorageError(f"{self.path} is broken") from exc

    @property
    def cost(self) -> int:
        largest = max((int(line["images"]) for line in self._shards), default=0)
        return 1024 * len(self._shards) + min(28 * self.count, 28 * OPEN_SHARDS * largest)

    def line(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise NotFoundError(f"there is no image {index}: the last is {self.count - 1}")
        place = bisect_right(self._firsts, index) - 1
        build = {"build": one} if (one := self._shards[place].get("build")) is not None else {}
        return {**self._shard(place).line(index - self._firsts[place]), **build, "index": index}

    def _shard(self, place: int) -> ManifestIndex:
        """Return the index of a shard; drop the one that was not used for the longest time."""
        with self._lock:
            found = self._open.pop(place, None)
            if found is None:
                name = Path(self._shards[place]["manifest"])
                if name.is_absolute() or ".." in name.parts:
                    raise StorageError(f"line {place + 1} of {self.path} names a file elsewhere")
                found = ManifestIndex(self.folder, self.folder / name)
                if found.count != self._shards[place]["images"]:
                    raise StorageError(f"{found.path} has changed since it was published")
            self._open[place] = found
            if len(self._open) > OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            return found

    def find(self, sha256: str) -> int:
        shards = len(self._shards)
        for step in range(shards):  # images are mostly read in order: begin where the last one was
            place = (self._found_in + step) % shards
            with suppress(NotFoundError):
                index = self._shard(place).find(sha256)
                self._found_in = place
                return self._firsts[place] + index
        raise NotFoundError(f"there is no image {sha256[:64]!r}", hint="the list of images has their SHA-256")

    @cached_property
    def scores(self) -> "NDArray[np.float32] | None":
        import numpy as np

        found = [self._shard(place).scores for place in range(len(self._shards))]
        known = [one for one in found if one is not None]
        return np.concatenate(known) if known and len(known) == len(found) else None


def open_index(folder: Path) -> ManifestIndex:
    """
    Return the index of a published result.

    Raises:
        StorageError: the manifest cannot be read.
    """
    try:
        with open(folder / MANIFEST, "rb") as file:
            sharded = file.read(len(SHARD_LINE)) == SHARD_LINE
    except OSError as exc:
        raise StorageError(
            f"{folder / MANIFEST} cannot be read: {(exc.strerror or str(exc)).lower()}"
        ) from exc
    return ShardedIndex(folder) if sharded else ManifestIndex(folder)


def published_folder(site: Site, job: Job) -> Path:
    return site.volume.attempt(job.id, job.attempt)


def index_of(site: Site, job: Job) -> ManifestIndex:
    """
    Return the index of a job's manifest.

    Raises:
        NotFoundError: the job has no published images.
        StorageError: its manifest cannot be read.
    """
    sha256 = (job.result or {}).get("manifest_sha256")
    if not isinstance(sha256, str) or "deleted_at" in (job.result or {}):
        raise NotFoundError(f"job {job.id} has no images", hint="they are published when it has succeeded")
    key = ("manifest", job.id, job.attempt, sha256)
    found: ManifestIndex = site.indexes.get_or_make(
        key, lambda: open_index(published_folder(site, job)), lambda made: made.cost
    )
    return found
