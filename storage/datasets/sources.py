"""
What pictures there are in a folder, a zip or a tar: names in a fixed order, and their bytes.

Archives are read by a process that can be killed (storage/datasets/archives.py). Nothing is extracted to a
name that came from outside. What leaves the folder, is no regular file, or grows without measure
when unpacked is left out, with the reason.
"""

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from jobs.errors import DatasetError, NotFoundError, StorageError
from storage.datasets import archive_process
from storage.datasets.archive_process import (
    MAX_FILE_BYTES,
    MAX_RATIO,
    PACK_AGAIN,
    RATIO_FREE_BYTES,
    is_image_name,
)
from storage.datasets.archives import ArchiveProcess, MemberError, list_archive
from storage.results.formats import GRIDS, IMAGES, MANIFEST, NPZ
from storage.volume.durable import raise_storage_error

MAX_FILES = 5_000_000
MOST_DEATHS = 5
"""Of the process that reads a zip, before the zip is given up."""


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why."""

    name: str
    reason: str
    detail: str = ""


@dataclass
class Listing:
    """The picture files of a source, sorted by the bytes of their names."""

    source: Path
    kind: str  # folder, zip, tar
    names: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)  # suffix → files that are no pictures
    _wrapper: str = ""

    def classes(self) -> tuple[str, ...]:
        """
        First-level folders, if every picture lies in one and there are several.

        One folder around everything in an archive is its packaging: faces.zip usually holds faces/.
        """
        self._wrapper = ""
        tops = self._tops()
        if self.kind != "folder" and len(tops) == 1 and None not in tops:
            self._wrapper = f"{tops.pop()}/"
            tops = self._tops()
        if None in tops or len(tops) < 2:
            return ()
        return tuple(sorted(top for top in tops if top is not None))

    def class_of(self, name: str) -> str:
        """The class of a picture; only after classes() found some."""
        return name.removeprefix(self._wrapper).split("/", 1)[0]

    def _tops(self) -> set[str | None]:
        inside = (name.removeprefix(self._wrapper) for name in self.names)
        return {name.split("/", 1)[0] if "/" in name else None for name in inside}

    def _take(self, name: str) -> None:
        suffix = PurePosixPath(name).suffix.lower()
        if is_image_name(name):
            self.names.append(name)
        else:
            self.ignored[suffix or "(none)"] = self.ignored.get(suffix or "(none)", 0) + 1
        if len(self.names) > MAX_FILES:
            raise DatasetError(f"{self.source} holds more than {MAX_FILES} pictures", hint="split it")

    def _sorted(self) -> "Listing":
        # An archive may name a member twice; the last one counts, as when it is unpacked.
        self.names = sorted(set(self.names), key=os.fsencode)
        return self


def scan(source: Path) -> Listing:
    """
    List a folder (flat or a tree), a zip or a tar. Cheap: no picture is opened.

    Of a folder that `ganq submit generate` has made, its pictures: a grid is none.

    Raises:
        NotFoundError: it does not exist.
        DatasetError: it is none of these, or cannot be read.
    """
    source = _pictures_of(source)
    try:
        if source.is_dir():
            return _scan_folder(source)
        if not source.exists():
            raise NotFoundError(
                f"there is no data set at {source}", hint="give a folder of pictures, a zip or a tar"
            )
        if source.is_file() and (listing := _scan_archive(source)) is not None:
            return listing
    except OSError as exc:
        raise DatasetError(f"{source} cannot be read: {exc}", hint="check its permissions") from exc
    raise DatasetError(f"{source} is no folder, zip or tar", hint="give a folder of pictures, a zip or a tar")


def _pictures_of(source: Path) -> Path:
    """
    Where the pictures are of what a generation has made; any other source as it is.

    Raises:
        DatasetError: they lie in something that is no data set.
    """
    if not ((source / MANIFEST).is_file() and (source / GRIDS).is_dir()):
        return source
    places = [source / IMAGES, *sorted(source.glob("shard-*.tar")), source / NPZ]
    there = [one for one in places if one.exists()]
    if len(there) == 1 and there[0].name != NPZ:
        return there[0]
    raise DatasetError(
        f"the pictures in {source} lie in {'several tars' if len(there) > 1 else NPZ}",
        hint="give one of the tars, or generate them with --format png; ganq submit evaluate JOB reads all",
    )


def _scan_folder(root: Path) -> Listing:
    listing = Listing(root, "folder")
    real_root = os.path.realpath(root)
    pending = [""]
    while pending:
        here = pending.pop()
        try:
            entries = list(os.scandir(os.path.join(root, here)))
        except OSError as exc:
            listing.skipped.append(Skipped(here or ".", "folder cannot be read", os.strerror(exc.errno or 0)))
            continue
        for entry in entries:
            name = f"{here}/{entry.name}" if here else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.append(name)
            elif entry.is_file(follow_symlinks=False):
                listing._take(name)
            elif entry.is_symlink():
                _scan_link(listing, entry, name, real_root)
            else:
                listing.skipped.append(Skipped(name, "no regular file"))
    return listing._sorted()


def _scan_link(listing: Listing, entry: "os.DirEntry[str]", name: str, real_root: str) -> None:
    target = os.path.realpath(entry.path)
    if not os.path.exists(target):
        listing.skipped.append(Skipped(name, "link to nowhere"))
    elif os.path.isdir(target):
        listing.skipped.append(Skipped(name, "link to a folder: links are not followed"))
    elif not target.startswith(real_root + os.sep):
        listing.skipped.append(Skipped(name, "link out of the folder"))
    else:
        listing._take(name)


def _scan_archive(source: Path) -> Listing | None:
    """The listing of a zip or tar; None if it is neither."""
    listing = Listing(source, "")
    for kind, data in list_archive(source):
        if kind == archive_process.KIND:
            listing.kind = data.decode()
        elif kind == archive_process.MEMBERS:
            for name, reason in json.loads(data):
                if reason:
                    listing.skipped.append(Skipped(name, reason))
                else:
                    listing._take(name)
    return listing._sorted() if listing.kind else None


class UnreadableError(Exception):
    """A file that was listed and cannot be read; the message is the reason."""


class Reader:
    """Gives the bytes of listed pictures."""

    def read(self, name: str) -> bytes:
        """
        Raises:
            UnreadableError: gone, unreadable, or too large.
        """
        raise NotImplementedError


class _FolderReader(Reader):
    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)

    def read(self, name: str) -> bytes:
        # O_NONBLOCK: a FIFO in a file's place must not hang us before fstat() has looked at it.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(os.path.realpath(os.path.join(self.root, name)), flags)
        except OSError as exc:
            raise UnreadableError(os.strerror(exc.errno or 0).lower()) from exc
        with os.fdopen(fd, "rb") as file:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode):
                raise UnreadableError("no regular file")
            # Of the open file, since a link may have taken the name's place after the scan.
            if not os.readlink(f"/proc/self/fd/{fd}").startswith(os.path.join(self.root, "")):
                raise UnreadableError("link out of the folder")
            if about.st_size > MAX_FILE_BYTES:
                raise UnreadableError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
            try:
                return file.read()
            except OSError as exc:
                raise UnreadableError(os.strerror(exc.errno or 0).lower()) from exc


class _ZipReader(Reader):
    """Asks a process for members; if it dies twice over a member, that member is left out."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.deaths = 0
        self.child = self._begin()

    def _begin(self) -> ArchiveProcess:
        child = ArchiveProcess(self.source, "serve")
        try:
            for _ in child.frames():  # up to the word that the list of members is read
                pass
        except BaseException:
            child.close()
            raise
        return child

    def read(self, name: str) -> bytes:
        try:
            data = self._ask(name)
        except MemberError as exc:
            raise UnreadableError(str(exc)) from exc
        except DatasetError as exc:
            raise UnreadableError(f"broken in the archive: {exc.message}") from exc
        if len(data) > MAX_FILE_BYTES:
            raise UnreadableError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        return data

    def _ask(self, name: str) -> bytes:
        """Ask once more if the child died: it may have been for another reason than this member."""
        try:
            return self.child.ask(name)
        except (DatasetError, StorageError):
            self._replace()
        try:
            return self.child.ask(name)
        except DatasetError:
            self._replace()
            raise

    def _replace(self) -> None:
        self.child.close()
        self.deaths += 1
        if self.deaths > MOST_DEATHS:
            raise StorageError(
                f"{self.source}: the process that reads it died {self.deaths} times", hint=PACK_AGAIN
            )
        self.child = self._begin()

    def close(self) -> None:
        self.child.close()


class _UnpackedReader(Reader):
    """A tar can only be read in its own order, so its pictures are unpacked first, under numbers."""

    def __init__(self, listing: Listing, folder: Path) -> None:
        self.folder = folder
        self.wanted = {name: number for number, name in enumerate(listing.names)}
        with ArchiveProcess(listing.source, "unpack") as child:
            left = child.size * MAX_RATIO + RATIO_FREE_BYTES
            file: IO[bytes] | None = None
            try:
                for kind, data in child.frames():
                    left -= len(data)
                    if left < 0:
                        raise DatasetError(
                            f"{listing.source} unpacks to more than {MAX_RATIO} times its size",
                            hint="is it a bomb?",
                        )
                    if kind == archive_process.BEGIN:
                        number = self.wanted.get(json.loads(data))
                        file = None if number is None else open(folder / str(number), "wb")  # noqa: SIM115
                    elif file is not None and kind == archive_process.DATA:
                        file.write(data)
                    elif file is not None and kind == archive_process.END:
                        file.close()
            except OSError as exc:
                raise_storage_error(exc, folder)
            finally:
                if file is not None:
                    with suppress(OSError):
                        file.close()

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / str(self.wanted[name])).read_bytes()
        except OSError as exc:
            raise UnreadableError("missing in the archive, or too large") from exc


@contextmanager
def open_reader(listing: Listing, scratch: Path) -> Iterator[Reader]:
    """
    Args:
        scratch: an existing folder with room for an unpacked tar.
    """
    if listing.kind == "folder":
        yield _FolderReader(listing.source)
    elif listing.kind == "zip":
        try:
            reader = _ZipReader(listing.source)
        except OSError as exc:
            raise DatasetError(f"{listing.source} cannot be read: {exc}", hint="is it still there?") from exc
        with closing(reader):
            yield reader
    else:
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=scratch) as folder:
            yield _UnpackedReader(listing, Path(folder))
