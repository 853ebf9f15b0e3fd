"""
Write and publish generated images, grids and their manifest.

Everything is written under temporary names and made durable by one syncfs(2), which takes 0.05 s for 1,000
images of 96×96 (an fsync of each: 0.34 s). Then all is renamed; manifest.jsonl, which lists all images,
comes last.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jobs.context import PLAIN_NAMES, GeneratedImage, ImageNames, ShardFiles, StoredImage
from jobs.errors import StorageError
from jobs.failpoints import failpoint
from storage.results.codecs import PNG, decode, encode_png
from storage.results.formats import (
    FORMATS,
    GRIDS,
    IMAGES,
    MANIFEST,
    RESULT,
    Container,
    LinkedShards,
    Where,
    pixels_of,
)
from storage.results.passport import with_passport
from storage.volume.durable import (
    TEMP_MARK,
    fsync_folder,
    make_folder,
    raise_storage_error,
    remove,
    require_room,
    sync_filesystem,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LINES_PER_WRITE = 1000


class ImageFiles:
    """
    The result of a generation job; implements jobs.context.ImageSink.

    Args:
        folder: the attempt's own folder, or one of its shards.
        inside: the attempt's own folder, if it exists; it is not created again when it is gone.
        format: a key of storage.results.formats.FORMATS.
        quality: of a lossy encoding, 1 to 100; None: the format's own.
        total: number of images, if known: lack of space for all of them is then reported after the first
            ones. Required by npz.
        names: of the images; of linked archives the result lists the files.
        of_shards: link to the archives of shards instead.

    After an error or a stop neither visible nor temporary files remain.
    """

    def __init__(
        self,
        folder: Path,
        *,
        inside: Path | None = None,
        format: str = "png",
        quality: int | None = None,
        total: int | None = None,
        names: ImageNames = PLAIN_NAMES,
        of_shards: bool = False,
    ) -> None:
        self.folder = folder
        self.inside = inside
        self.total = total
        self.lists_archives = names.linked and not of_shards
        self.quality = quality
        mark = f"{TEMP_MARK}{secrets.token_hex(4)}"
        self.codec = FORMATS[format].codec
        self.container: Container = (
            LinkedShards(folder, mark)
            if of_shards
            else FORMATS[format].container(folder, mark, self.codec, total, names)
        )
        self.grids = folder / f"{GRIDS}{mark}"
        self.manifest = folder / f"{MANIFEST}{mark}"
        self.written = 0
        self.names: list[str] = []
        self.files: list[dict[str, Any]] = []
        self._lines: list[bytes] = []  # not written yet
        self._digest = hashlib.sha256()
        self.bytes = 0
        self.archives: list[dict[str, Any]] = []
        self.manifest_bytes = 0
        self._on_disk = 0
        self._begun = False

    def _begin(self) -> None:
        if not self._begun:
            self._sweep()
            make_folder(self.folder, inside=self.inside)
            self.grids.mkdir()
            self._begun = True
            self.container.begin()

    def _sweep(self) -> None:
        """Delete what an attempt that was killed has left."""
        for left in self.folder.glob(f"*{TEMP_MARK}*"):
            if RESULT.fullmatch(left.name.split(TEMP_MARK)[0]):
                remove(left)

    def add(self, images: Iterable[GeneratedImage]) -> None:
        try:
            self._begin()
            for image in images:
                self._write(image)
            if (remaining := self._remaining()) is not None:
                require_room(self.folder, remaining)
        except OSError as exc:
            self._fail(exc, needed=self._remaining())
        except StorageError:
            self.discard()
            raise

    def _fail(self, exc: OSError, *, needed: int | None = None) -> NoReturn:
        """Raise the StorageError for an OSError; delete what was written."""
        try:
            raise_storage_error(exc, self.folder, needed=needed)  # while the folder and its files are there
        finally:
            self.discard()

    def _remaining(self) -> int | None:
        """Estimate the bytes of the images that are still missing."""
        if self.total is None or not self._on_disk:
            return None
        begun = max(self.written, 1)
        return (self.total - self.written) * self._on_disk // begun

    def _write(self, image: GeneratedImage) -> None:
        output_index = self.written if image.output_index is None else image.output_index
        data = self.codec.encode(image.pixels_HW3, self.quality)
        if image.passport is not None and self.codec is PNG:
            data = with_passport(data, image.passport, image.pixels_HW3)
        record = {**image.record, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if not self.codec.suffix:
            record["shape"] = list(image.pixels_HW3.shape)
        self._on_disk += self.container.disk_bytes(len(data))
        where = self.container.put(output_index, data, record)
        failpoint("images.written")
        self._add_line(where, record)

    def adopt(self, image: StoredImage, *, output_index: int) -> None:
        try:
            self._begin()
            self._add_line(self.container.adopt(output_index, image), image.record)
        except OSError as exc:
            self._fail(exc, needed=self._remaining())

    def link(self, shard: ShardFiles, *, build: int | None = None) -> None:
        assert isinstance(self.container, LinkedShards)
        try:
            self._begin()
            self._write_line(self.container.link(shard, self.written, build))
        except OSError as exc:
            self._fail(exc)
        self.bytes += shard.bytes
        self.written += shard.images

    def shard_files(self) -> ShardFiles:
        return ShardFiles(
            self.folder,
            self.written,
            self.bytes,
            self.manifest_bytes,
            self._digest.hexdigest(),
            self.archives,
        )

    def _add_line(self, where: Where, record: dict[str, Any]) -> None:
        """Add an image's line to the manifest; `index` counts the lines."""
        self._write_line({"index": self.written, **where, **record})
        self.bytes += record["bytes"]
        self.written += 1

    def _write_line(self, facts: dict[str, Any]) -> None:
        line = json.dumps(facts).encode() + b"\n"
        self._lines.append(line)
        self._digest.update(line)
        self.manifest_bytes += len(line)
        if len(self._lines) == LINES_PER_WRITE:
            self._flush_lines()

    def _flush_lines(self) -> None:
        """Append the lines to the file, so that memory does not grow with their number."""
        with open(self.manifest, "ab") as file:
            file.writelines(self._lines)
        self._lines.clear()

    def shown(self, pixels_HW3: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
        if self.codec.lossless(self.quality):
            return pixels_HW3
        return decode(self.codec.encode(pixels_HW3, self.quality))

    def pixels(self, image: StoredImage) -> "NDArray[np.uint8]":
        try:
            return pixels_of(image)
        except OSError as exc:
            raise_storage_error(exc, image.path)

    def add_grid(self, name: str, pixels_HW3: "NDArray[np.uint8]") -> None:
        try:
            self._begin()
            (self.grids / f"{name}.png").write_bytes(encode_png(pixels_HW3))
        except OSError as exc:
            self._fail(exc)
        self.names.append(f"{GRIDS}/{name}.png")

    def add_file(self, name: str, data: bytes) -> None:
        try:
            self._begin()
            (self.grids / name).write_bytes(data)
        except OSError as exc:
            self._fail(exc, needed=len(data))
        digest = hashlib.sha256(data).hexdigest()
        self.files.append({"name": f"{GRIDS}/{name}", "bytes": len(data), "sha256": digest})

    def publish(self) -> dict[str, Any]:
        try:
            self._begin()
            self.archives = self.container.finish()
            for line in self.archives:
                self._write_line(line)
            self._flush_lines()
            sync_filesystem(self.folder)
            failpoint("images.synced")
            there = [name for _, name in self.container.renames()]
            for temp, name in (*self.container.renames(), (self.grids, GRIDS)):
                final = self.folder / name
                if final.exists():  # an attempt publishes once, so that this name is not in use
                    remove(final)
                temp.rename(final)
                failpoint(f"images.{name if name == GRIDS else IMAGES}_renamed")
            fsync_folder(self.folder)
            failpoint("images.renamed")
            self.manifest.rename(self.folder / MANIFEST)
            failpoint("images.manifest_renamed")
            fsync_folder(self.folder)
        except OSError as exc:
            self._unpublish()
            raise_storage_error(exc, self.folder, needed=sum(map(len, self._lines)) or None)
        except StorageError:
            self._unpublish()
            raise
        failpoint("images.published")
        self._begun = False
        return {
            "image_count": self.written,
            # Several archives are put into the attempt's folder, beside their manifest.
            "images": there[0] if len(there) == 1 else ".",
            "grids": self.names,
            "manifest": MANIFEST,
            "manifest_sha256": self._digest.hexdigest(),
            "bytes": self.bytes,
            **({"files": self.files} if self.files else {}),
            **(
                {"archives": self.archives, "manifest_bytes": self.manifest_bytes}
                if self.lists_archives
                else {}
            ),
        }

    def stored(self) -> Iterable[StoredImage]:
        from storage.results.reader import PublishedImages

        return PublishedImages(self.folder, self._digest.hexdigest())

    def _unpublish(self) -> None:
        """Delete all files, including those that have their final names."""
        self.discard()
        with suppress(OSError):
            (self.folder / MANIFEST).unlink(missing_ok=True)
        for name in (*(name for _, name in self.container.renames()), GRIDS):
            with suppress(OSError):
                remove(self.folder / name)

    def discard(self) -> None:
        """Delete what was written and not published."""
        if not self._begun:
            return
        self._begun = False
        with suppress(OSError):
            self.manifest.unlink(missing_ok=True)
        shutil.rmtree(self.grids, ignore_errors=True)
        self.container.discard()
