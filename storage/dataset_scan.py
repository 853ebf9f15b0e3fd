"""
What pictures there are in a folder, a zip or a tar: names in a fixed order, and their bytes.

Nothing is extracted to a name that came from outside. What leaves the folder, is no
regular file, or grows without measure when unpacked is left out, with the reason.
"""

import lzma
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from jobs.errors import DatasetError, NotFoundError
from storage.containers import GRIDS, IMAGES, MANIFEST, NPZ
from storage.durable import raise_storage_error

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_FILE_BYTES = 512 << 20
MAX_FILES = 5_000_000
MAX_RATIO = 100
"""Unpacked to packed bytes: pictures hardly shrink, bombs do."""
RATIO_FREE_BYTES = 1 << 20
"""Below this a large ratio is a small file, not a bomb."""
MAX_HEADER_BYTES = 1 << 20
"""A tar's long names and pax headers; tarfile reads them into memory whole."""
BROKEN = (
    EOFError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What the archive modules raise on broken archives, besides OSError."""


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
        if is_picture_name(name):
            self.names.append(name)
        else:
            self.ignored[suffix or "(none)"] = self.ignored.get(suffix or "(none)", 0) + 1
        if len(self.names) > MAX_FILES:
            raise DatasetError(f"{self.source} holds more than {MAX_FILES} pictures", hint="split it")

    def _sorted(self) -> "Listing":
        # An archive may name a member twice; the last one counts, as when it is unpacked.
        self.names = sorted(set(self.names), key=os.fsencode)
        return self


def is_picture_name(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


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
        if source.is_file() and zipfile.is_zipfile(source):
            return _scan_zip(source)
        if source.is_file() and _is_tar(source):
            return _scan_tar(source)
    except OSError as exc:
        raise DatasetError(f"{source} cannot be read: {exc}", hint="check its permissions") from exc
    except BROKEN as exc:
        raise _broken(source, exc) from exc
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


def _is_tar(source: Path) -> bool:
    try:
        tarfile.open(source, tarinfo=_BoundedInfo).close()
    except tarfile.TarError:
        return False
    return True


def _broken(source: Path, exc: Exception) -> DatasetError:
    return DatasetError(f"{source} is a broken archive: {exc}", hint="pack or download it again")


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


def _scan_zip(source: Path) -> Listing:
    listing = Listing(source, "zip")
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            if member.is_dir() or _hidden(member.filename):
                continue
            kind = stat.S_IFMT(member.external_attr >> 16)
            reason = _unsafe_name(member.filename)
            if kind not in (0, stat.S_IFREG):
                reason = "no regular file"
            elif member.flag_bits & 1:
                reason = "encrypted"
            elif _too_dense(member.file_size, member.compress_size):
                reason = f"unpacks to more than {MAX_RATIO} times its size"
            if reason:
                listing.skipped.append(Skipped(member.filename[:200], reason))
            else:
                listing._take(_plain(member.filename))
    return listing._sorted()


def _scan_tar(source: Path) -> Listing:
    listing = Listing(source, "tar")
    budget = source.stat().st_size * MAX_RATIO + RATIO_FREE_BYTES
    with tarfile.open(source, tarinfo=_BoundedInfo) as archive:
        for member in archive:
            budget -= member.size
            if budget < 0:
                raise DatasetError(
                    f"{source} unpacks to more than {MAX_RATIO} times its size", hint="is it a bomb?"
                )
            if member.isdir() or _hidden(member.name):
                continue
            reason = _unsafe_name(member.name) or (None if member.isreg() else "no regular file")
            if reason:
                listing.skipped.append(Skipped(member.name[:200], reason))
            else:
                listing._take(_plain(member.name))
    return listing._sorted()


class _BoundedInfo(tarfile.TarInfo):
    """Refuses a header that would fill the memory before its member is even seen."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        members = (*tarfile.REGULAR_TYPES, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)
        if self.type not in members and self.size > MAX_HEADER_BYTES:
            # A DatasetError passes through tarfile, which takes its own errors for other formats.
            raise DatasetError(
                f"the archive has a header of {self.size} bytes", hint="is it a bomb? unpack it yourself"
            )
        info: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # not in typeshed
        return info


def _plain(name: str) -> str:
    """`tar -C faces .` writes ./001.png; that is the picture 001.png."""
    return str(PurePosixPath(name))


def _hidden(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "__MACOSX" or any(one.startswith(".") and one not in (".", "..") for one in parts)


def _unsafe_name(name: str) -> str | None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name:
        return "name leaves the archive"
    return None


def _too_dense(unpacked: int, packed: int) -> bool:
    return unpacked > RATIO_FREE_BYTES and unpacked > MAX_RATIO * max(packed, 1)


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
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.members = {_plain(one.filename): one for one in archive.infolist()}

    def read(self, name: str) -> bytes:
        try:
            with self.archive.open(self.members[name]) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except (OSError, *BROKEN) as exc:
            raise UnreadableError(f"broken in the archive: {exc}") from exc
        if len(data) > MAX_FILE_BYTES:
            raise UnreadableError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        return data


class _UnpackedReader(Reader):
    """A tar can only be read in its own order, so its pictures are unpacked first, under numbers."""

    def __init__(self, listing: Listing, folder: Path) -> None:
        wanted = {name: number for number, name in enumerate(listing.names)}
        self.folder = folder
        self.wanted = wanted
        for number, data in self._members(listing.source):
            try:
                (folder / str(number)).write_bytes(data)
            except OSError as exc:
                raise_storage_error(exc, folder)

    def _members(self, source: Path) -> Iterator[tuple[int, bytes]]:
        try:
            with tarfile.open(source, tarinfo=_BoundedInfo) as archive:
                for member in archive:
                    number = self.wanted.get(_plain(member.name))
                    if number is None or not member.isreg() or member.size > MAX_FILE_BYTES:
                        continue
                    file = archive.extractfile(member)
                    if file is not None:
                        yield number, file.read()
        except (OSError, *BROKEN) as exc:
            raise _broken(source, exc) from exc

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
        with zipfile.ZipFile(listing.source) as archive:
            yield _ZipReader(archive)
    else:
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=scratch) as folder:
            yield _UnpackedReader(listing, Path(folder))
