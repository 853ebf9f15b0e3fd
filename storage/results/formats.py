"""
Containers for the images of a result: a folder of files, tar archives, or one npz.

A container writes under temporary names in the attempt's folder; storage/results/writer.py makes the files
durable, renames them and writes the manifest. A new format of `--format` is a line in FORMATS.
"""

import errno
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from jobs.context import PLAIN_NAMES, ImageNames, ShardFiles, StoredImage
from jobs.errors import StorageError
from storage.results import codecs
from storage.results.codecs import Codec
from storage.volume.durable import NO_LINKS
from storage.volume.tar_headers import header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGES, GRIDS, MANIFEST, NPZ = "images", "grids", "manifest.jsonl", "pictures.npz"
MANIFESTS = "manifests"
"""Manifests of the shards to which a manifest refers."""
RESULT = re.compile(rf"{IMAGES}|{GRIDS}|{re.escape(MANIFEST)}|{MANIFESTS}|shard-\d+\.tar|{re.escape(NPZ)}")
"""Names of the files and folders of a published result."""
IMAGES_PER_FOLDER = 10_000
WRITE_BUFFER = 1 << 20

Where = dict[str, Any]
"""Location of an image in the manifest: file, and the offset in an archive."""


class Container(Protocol):
    """Writes encoded images under temporary names."""

    def begin(self) -> None:
        """Prepare for the first image."""

    def put(self, output_index: int, data: bytes, record: dict[str, Any]) -> Where:
        """
        Write one image.

        Args:
            output_index: names its file.
            record: its line: seed, draw, score, bytes, sha256, and shape where the codec has none.
        """

    def adopt(self, output_index: int, made: StoredImage) -> Where:
        """Add an image of a shard without encoding it again."""

    def disk_bytes(self, size: int) -> int:
        """Return the disk space that a file of `size` bytes takes."""

    def finish(self) -> list[dict[str, Any]]:
        """Finish after the last image; return the lines of the manifest about archives."""

    def renames(self) -> Iterator[tuple[Path, str]]:
        """Yield temporary paths and their final names."""

    def discard(self) -> None:
        """Delete what was written."""


def bytes_of(made: StoredImage) -> bytes:
    """
    Return the bytes of an encoded image.

    Raises:
        StorageError: the file is shorter than its line says.
    """
    with open(made.path, "rb") as file:
        file.seek(made.offset)
        data = file.read(made.record["bytes"])
    if len(data) != made.record["bytes"]:
        raise StorageError(f"{made.path} is shorter than its manifest says")
    return data


def pixels_of(made: StoredImage) -> "NDArray[np.uint8]":
    """
    Return the pixels of a published image of any format: uint8 (H, W, 3).

    Raises:
        OSError, StorageError: it is missing or incomplete.
    """
    import numpy as np

    data = bytes_of(made)
    if (shape := made.record.get("shape")) is not None:
        return np.frombuffer(data, np.uint8).reshape(shape)
    return codecs.decode(data)


def link_or_copy(source: Path, target: Path) -> None:
    """
    Make a hard link, or a copy where the file system has none.

    Raises:
        OSError
    """
    try:
        os.link(source, target)
    except OSError as exc:
        if exc.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


class Folder:
    """One file for each image: images/000000.png, or images/0000/000000.png of many."""

    def __init__(
        self, folder: Path, mark: str, codec: Codec, total: int | None, names: ImageNames = PLAIN_NAMES
    ) -> None:
        self.temp = folder / f"{IMAGES}{mark}"
        self.codec = codec
        self.names = names
        self._folders: set[int] = set()
        self._block = 1

    def begin(self) -> None:
        self.temp.mkdir()
        self._block = os.statvfs(self.temp).f_frsize or 1

    def put(self, output_index: int, data: bytes, record: dict[str, Any]) -> Where:
        name = self._name(output_index)
        # Three system calls; open() needs six, which is measurable for small images.
        fd = os.open(f"{self.temp}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        finally:
            os.close(fd)
        return {"file": f"{IMAGES}/{name}"}

    def adopt(self, output_index: int, made: StoredImage) -> Where:
        """Link to the file, so that the shard's folder can be deleted afterwards."""
        name = self._name(output_index)
        link_or_copy(made.path, self.temp / name)
        return {"file": f"{IMAGES}/{name}"}

    def _name(self, output_index: int) -> str:
        """Return the name of an image's file; its folder exists."""
        name = f"{output_index:0{self.names.digits}d}{self.codec.suffix}"
        if not self.names.folders:
            return name
        number = output_index // IMAGES_PER_FOLDER
        if number not in self._folders:
            os.mkdir(self.temp / f"{number:04d}")
            self._folders.add(number)
        return f"{number:04d}/{name}"

    def disk_bytes(self, size: int) -> int:
        return -(-size // self._block) * self._block

    def finish(self) -> list[dict[str, Any]]:
        return []

    def renames(self) -> Iterator[tuple[Path, str]]:
        yield self.temp, IMAGES

    def discard(self) -> None:
        shutil.rmtree(self.temp, ignore_errors=True)


class HashedFile(io.RawIOBase):
    """An append-only file under a temporary name that computes its SHA-256 while it is written."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._file: IO[bytes] = open(path, "xb", buffering=WRITE_BUFFER)  # noqa: SIM115 - closed by close()
        self._digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def line(self) -> dict[str, Any]:
        """Close the file and return its line in the manifest."""
        self.close()
        return {"archive": self.name, "bytes": self.size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()
        super().close()


class Tars:
    """Tar archives: shard-00000.tar with 000000.png …; equal images give equal bytes."""

    def __init__(
        self, folder: Path, mark: str, codec: Codec, total: int | None, names: ImageNames = PLAIN_NAMES
    ) -> None:
        self.folder, self.mark, self.codec, self.names = folder, mark, codec, names
        self.tars: list[HashedFile] = []
        self.lines: list[dict[str, Any]] = []
        self._in_this = 0

    def begin(self) -> None:
        self._next()

    def _next(self) -> None:
        name = f"shard-{self.names.first_tar + len(self.tars):05d}.tar"
        self.tars.append(HashedFile(self.folder / f"{name}{self.mark}", name))
        self._in_this = 0

    def put(self, output_index: int, data: bytes, record: dict[str, Any]) -> Where:
        if self._in_this == self.names.per_tar:
            self._end()
            self._next()
        member = f"{output_index:0{self.names.digits}d}{self.codec.suffix}"
        tar = self.tars[-1]
        tar.write(header(member, len(data)))
        offset = tar.tell()
        tar.write(data)
        tar.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        self._in_this += 1
        return {"file": tar.name, "member": member, "offset": offset}

    def adopt(self, output_index: int, made: StoredImage) -> Where:
        return self.put(output_index, bytes_of(made), made.record)

    def disk_bytes(self, size: int) -> int:
        return size + -size % tarfile.BLOCKSIZE + tarfile.BLOCKSIZE

    def _end(self) -> None:
        """End an archive as tar does: two empty blocks, padded to a record."""
        tar = self.tars[-1]
        tar.write(bytes(2 * tarfile.BLOCKSIZE))
        tar.write(bytes(-tar.tell() % tarfile.RECORDSIZE))
        self.lines.append(tar.line())

    def finish(self) -> list[dict[str, Any]]:
        self._end()
        return self.lines

    def renames(self) -> Iterator[tuple[Path, str]]:
        for one in self.tars:
            yield one.path, one.name

    def discard(self) -> None:
        for one in self.tars:
            with suppress(OSError):  # a full disk, which was reported already
                one.close()
            with suppress(OSError):
                one.path.unlink(missing_ok=True)


class Npz:
    """
    One file that numpy.load() reads: images (N, H, W, 3) uint8, numbers (N,) int64, scores (N,) float64.

    Scores are NaN if there are none. Pixels are written as they come; the header contains their number,
    which must therefore be known.
    """

    def __init__(
        self, folder: Path, mark: str, codec: Codec, total: int | None, names: ImageNames = PLAIN_NAMES
    ) -> None:
        assert total is not None, "an npz starts with the number of its images"
        self.folder, self.total = folder, total
        self.path = folder / f"{NPZ}{mark}"
        self.file: HashedFile | None = None
        self._pixels: IO[bytes] | None = None
        self._written = 0

    def begin(self) -> None:
        self.file = HashedFile(self.path, NPZ)
        self._zip = zipfile.ZipFile(self.file, "w", zipfile.ZIP_STORED, allowZip64=True)
        # Files without a name: nothing remains of them when the process ends.
        self._numbers = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - closed by finish(), discard()
        self._scores = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115

    def put(self, output_index: int, data: bytes, record: dict[str, Any]) -> Where:
        import numpy as np

        assert self.file is not None
        if self._pixels is None:
            self._pixels = self._member("pictures", "|u1", (self.total, *record["shape"]))
        offset = self.file.tell()
        self._pixels.write(data)
        self._numbers.write(np.int64(record["draw"]).tobytes())
        self._scores.write(np.float64(_nan_if_none(record["score"])).tobytes())
        self._written += 1
        return {"file": NPZ, "offset": offset}

    def _member(self, name: str, kind: str, shape: tuple[int, ...]) -> IO[bytes]:
        from numpy.lib import format as npy

        # A fixed date, so that equal images give equal bytes.
        about = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
        member = self._zip.open(about, "w", force_zip64=True)
        npy.write_array_header_1_0(member, {"descr": kind, "fortran_order": False, "shape": shape})
        return member

    def adopt(self, output_index: int, made: StoredImage) -> Where:
        return self.put(output_index, bytes_of(made), made.record)

    def disk_bytes(self, size: int) -> int:
        return size + 16

    def finish(self) -> list[dict[str, Any]]:
        if self._written != self.total:
            raise StorageError(f"{self._written} images were written instead of {self.total}")
        assert self.file is not None
        assert self._pixels is not None
        self._pixels.close()
        for name, kind, column in (("numbers", "<i8", self._numbers), ("scores", "<f8", self._scores)):
            column.seek(0)
            with self._member(name, kind, (self.total,)) as member:
                shutil.copyfileobj(column, member, WRITE_BUFFER)
            column.close()
        self._zip.close()
        return [self.file.line()]

    def renames(self) -> Iterator[tuple[Path, str]]:
        yield self.path, NPZ

    def discard(self) -> None:
        if self.file is None:
            return
        # close() of zipfile writes the end of the archive, which fails on a full disk.
        self._zip.fp = io.BytesIO()
        for one in (self._pixels, self._zip, self._numbers, self._scores, self.file):
            with suppress(OSError):
                if one is not None:
                    one.close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


class LinkedShards:
    """
    The archives and manifests of shards, as hard links.

    Links outlive the shards' folders, and an attempt that has lost its lease cannot take files away from
    another. See docs/decisions/0026-large-results.md.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder, self.mark = folder, mark
        self.manifests = folder / f"{MANIFESTS}{mark}"
        self.archives: list[str] = []
        self.shards = 0

    def begin(self) -> None:
        self.manifests.mkdir()

    def link(self, shard: ShardFiles, first: int, build: int | None) -> dict[str, Any]:
        """
        Link to a shard.

        Args:
            first: index of its first image.

        Returns:
            The line of the manifest that refers to it.
        """
        name = f"{self.shards:05d}.jsonl"
        link_or_copy(shard.folder / MANIFEST, self.manifests / name)
        for archive in shard.archives:
            self.archives.append(archive["archive"])
            link_or_copy(shard.folder / archive["archive"], self._temp(archive["archive"]))
        self.shards += 1
        return {
            "shard": self.shards - 1,
            "first": first,
            "images": shard.images,
            "manifest": f"{MANIFESTS}/{name}",
            "bytes": shard.manifest_bytes,
            "sha256": shard.manifest_sha256,
            "archives": shard.archives,
            **({} if build is None else {"build": build}),
        }

    def _temp(self, name: str) -> Path:
        return self.folder / f"{name}{self.mark}"

    def put(self, output_index: int, data: bytes, record: dict[str, Any]) -> Where:
        raise AssertionError("the images are in the shards")

    def adopt(self, output_index: int, made: StoredImage) -> Where:
        raise AssertionError("the images are in the shards")

    def disk_bytes(self, size: int) -> int:
        return 0

    def finish(self) -> list[dict[str, Any]]:
        return []

    def renames(self) -> Iterator[tuple[Path, str]]:
        for name in self.archives:
            yield self._temp(name), name
        yield self.manifests, MANIFESTS

    def discard(self) -> None:
        shutil.rmtree(self.manifests, ignore_errors=True)
        for name in self.archives:
            with suppress(OSError):
                self._temp(name).unlink(missing_ok=True)


def _nan_if_none(score: float | None) -> float:
    return float("nan") if score is None else score


@dataclass(frozen=True)
class Format:
    """A value of `--format`."""

    codec: Codec
    container: type[Folder] | type[Tars] | type[Npz]


FORMATS = {
    "png": Format(codecs.PNG, Folder),
    "webp": Format(codecs.WEBP, Folder),
    "jpeg": Format(codecs.JPEG, Folder),
    "tar": Format(codecs.PNG, Tars),
    "npz": Format(codecs.RAW, Npz),
}
