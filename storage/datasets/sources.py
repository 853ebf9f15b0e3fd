"""
The images of a folder, a zip or a tar: their names in a fixed order, and their bytes.

Archives are read by a process that can be killed (storage/datasets/archives.py). Nothing is extracted to a
name that came from outside. What leaves the folder or is not a regular file is left out, with the reason.
storage/datasets/names.py has the rules for names.
"""

import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from jobs.errors import DatasetError, NotFoundError, StorageError
from storage.datasets import archive_process, names
from storage.datasets.archive_process import MAX_FILE_BYTES, MAX_LABELS_BYTES, MAX_RATIO, UNPACK_HINT
from storage.datasets.archives import ArchiveProcess, MemberError, list_archive
from storage.results.formats import GRIDS, IMAGES, MANIFEST, NPZ
from storage.volume.durable import raise_storage_error

READER = names.READER
MAX_FILES = 5_000_000
MAX_COUNTED = 100_000
"""Files in a folder outside of the data set that a link leads to; more are not counted."""
BESIDE = "(beside images/)"
"""Key of Listing.ignored: images in the folder of a generation, of which only images/ is read."""
MAX_DECODER_CRASHES = 5
"""Deaths of the process that reads a zip, before the zip is refused."""


@dataclass(frozen=True)
class Reading:
    """
    How a data set is read; a job's spec holds these as fields of the same names.

    Args:
        reader: version of the rules for names and pixels.
        keep_duplicates: use files with equal bytes more than once.
        white_level: value that becomes white in images of 16 bits or floats; 0: the largest of 16 bits.
        max_unpacked_gb: what an archive may unpack to.
        fit: how an image becomes a square: 'crop' (its centre), 'pad' (black bars) or 'stretch'.
    """

    reader: int = READER
    keep_duplicates: bool = False
    white_level: float = 0.0
    max_unpacked_gb: float = 100.0
    fit: str = "crop"

    @classmethod
    def of_spec(cls, spec: Mapping[str, Any]) -> "Reading":
        """Return how a job reads; a spec of ganq 0.1 or 0.2 has none of the fields."""
        of_old = {"reader": 1, "keep_duplicates": True}
        return cls(**{name: spec.get(name, of_old.get(name, getattr(cls, name))) for name in FIELDS})

    @property
    def changes_pixels(self) -> bool:
        """Return whether an option makes other pixels of the images than the default."""
        return self.white_level > 0 or self.fit != "crop"

    @property
    def most_bytes(self) -> int:
        return int(self.max_unpacked_gb * 1e9)


FIELDS = tuple(Reading.__dataclass_fields__)


@dataclass(frozen=True)
class Skipped:
    """
    What is not used, and why.

    Args:
        images: how many images are lost by it.
    """

    name: str
    reason: str
    detail: str = ""
    images: int = 1


@dataclass
class Listing:
    """The image files of a source, sorted by the bytes of their names."""

    source: Path
    kind: str  # folder, zip, tar
    names: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)  # suffix → files that are no images
    reader: int = READER
    labels: dict[str, str] | None = None
    """The class of each image, of those that a dataset.json names; empty: it says that there are none."""
    _raw: dict[str, str] = field(default_factory=dict)
    """The file's own name, where it differs from that in `names`."""
    _changed: dict[str, str] = field(default_factory=dict)
    """Files whose names the rules change, until _sorted()."""
    _depth: int | None = -1
    _wrapper: str = ""

    def raw(self, name: str) -> str:
        """Return the name of the file, or of the member of the archive."""
        return self._raw.get(name, name)

    def classes(self) -> tuple[str, ...]:
        """Return the classes: of a dataset.json, or the folders of the images; () if there are none."""
        if self.reader == 1:
            return self._classes_1()
        if self.labels is not None:
            if not self.labels or self.unlabelled():
                return ()
            return tuple(sorted({self.labels[name] for name in self.names}, key=_by_number))
        if self._depth == -1:
            self._depth = names.class_depth(self.names) if self.names else None
        return () if self._depth is None else tuple(sorted({self.class_of(name) for name in self.names}))

    def class_of(self, name: str) -> str:
        """Return the class of an image; only after classes() found some."""
        if self.reader == 1:
            return name.removeprefix(self._wrapper).split("/", 1)[0]
        if self.labels is not None:
            return self.labels[name]
        assert self._depth is not None
        return name.split("/")[self._depth]

    def unlabelled(self) -> int:
        """Return how many images have no label in a dataset.json that labels others."""
        return sum(name not in self.labels for name in self.names) if self.labels else 0

    def _classes_1(self) -> tuple[str, ...]:
        """Return the first-level folders; one folder around everything in an archive is its packaging."""
        self._wrapper = ""
        tops = self._top_folders()
        if self.kind != "folder" and len(tops) == 1 and None not in tops:
            self._wrapper = f"{tops.pop()}/"
            tops = self._top_folders()
        if None in tops or len(tops) < 2:
            return ()
        return tuple(sorted(top for top in tops if top is not None))

    def _top_folders(self) -> set[str | None]:
        inside = (name.removeprefix(self._wrapper) for name in self.names)
        return {name.split("/", 1)[0] if "/" in name else None for name in inside}

    def _take(self, raw: str, reason: str | None = None) -> None:
        """Sort a file by its name, and by the reason for which it cannot be used."""
        name = names.canonical(raw, self.reader)
        if (self.reader > 1 or self.kind != "folder") and names.is_hidden(name, self.reader):
            if self.reader > 1:
                self._ignore("(hidden)")
            return
        kind = names.UNSUPPORTED_SUFFIXES.get(names.suffix(name)) if self.reader > 1 else None
        if reason is None and kind is not None:
            reason = f"{kind} is not read"
        if reason is not None:
            self.skipped.append(Skipped(name, reason, images=int(names.is_image(name, self.reader))))
        elif name == names.ATTRIBUTION:
            pass
        elif not names.is_image_name(name, self.reader):
            self._ignore(names.suffix(name) or "(none)")
        elif (plain := names.canonical(raw, 1)) != name:
            self._changed[raw] = name
        else:
            self._add(plain, raw)

    def _add(self, name: str, raw: str) -> None:
        self.names.append(name)
        self._raw.pop(name, None)
        if raw != name:
            self._raw[name] = raw
        if len(self.names) > MAX_FILES:
            raise DatasetError(f"{self.source} holds more than {MAX_FILES} images", hint="split it")

    def _ignore(self, what: str) -> None:
        self.ignored[what] = self.ignored.get(what, 0) + 1

    def _sorted(self) -> "Listing":
        if self._changed:
            # Two names may differ in separators or the form of characters alone; both files are used.
            taken = set(self.names)
            for raw, name in sorted(self._changed.items()):
                chosen = names.canonical(raw, 1) if name in taken else name
                taken.add(chosen)
                self._add(chosen, raw)
        # An archive may name a member twice; the last one counts, as when it is unpacked.
        self.names = sorted(set(self.names), key=os.fsencode)
        return self

    def _label(self, found: list[tuple[str, str]]) -> None:
        """
        Take over the labels of a dataset.json.

        Args:
            found: name and text of each file that is called so.
        """
        for name, text in sorted(found, key=lambda one: one[0].count("/")):
            folder, _, file = names.canonical(name).rpartition("/")
            inside = f"{folder}/" if folder else ""
            if file == names.LABELS and all(one.startswith(inside) for one in self.names):
                self.labels = _labels(text, inside)
                if self.labels is not None:
                    return


def _by_number(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdecimal() else (0, label)


def _labels(text: str, inside: str) -> dict[str, str] | None:
    """Return the labels of StyleGAN's dataset.json by name of image; None if it is another file."""
    try:
        told = json.loads(text)["labels"]
        if told is None:
            return {}
        labels = {names.canonical(inside + name): _class_number(label) for name, label in told}
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return None
    # Numbers that are not classes, such as the angles of a camera.
    return {} if None in labels.values() else {name: str(label) for name, label in labels.items()}


def _class_number(label: Any) -> int | None:
    """Return a class by its number, or by its place in a vector of zeros and one 1."""
    if isinstance(label, int):
        return int(label)
    hot = [place for place, value in enumerate(label) if value]
    return hot[0] if len(hot) == 1 and label[hot[0]] == 1 else None


def scan(source: Path, reading: Reading | None = None) -> Listing:
    """
    List a folder (flat or a tree), a zip or a tar. Cheap: no image is opened.

    List the images in a folder of `ganq submit generate`, without its grids.

    Raises:
        NotFoundError: it does not exist.
        DatasetError: it is none of these, or cannot be read.
    """
    reading = reading or Reading()
    given, source = source, _images_of(source)
    try:
        if source.is_dir():
            found = _FolderScan(source, reading.reader).listing
            if source.name == IMAGES and _is_result(source.parent) and found.labels is None:
                found.labels = {}  # its folders are no classes
            if source != given:
                beside = sum(names.is_image_name(name, reading.reader) for name in os.listdir(given))
                found.ignored |= {BESIDE: beside} if beside else {}
            return found
        if not source.exists():
            raise NotFoundError(
                f"there is no data set at {source}", hint="give a folder of images, a zip or a tar"
            )
        if source.is_file() and (listing := _scan_archive(source, reading)) is not None:
            return listing
    except OSError as exc:
        raise DatasetError(f"{source} cannot be read: {exc}", hint="check its permissions") from exc
    raise DatasetError(
        f"{source} is not a folder, zip or tar", hint="give a folder of images, a zip or a tar"
    )


def _images_of(source: Path) -> Path:
    """
    Return the path of a generation's images; any other source unchanged.

    Raises:
        DatasetError: they lie in something that is no data set.
    """
    if not _is_result(source):
        return source
    places = [source / IMAGES, *sorted(source.glob("shard-*.tar")), source / NPZ]
    there = [one for one in places if one.exists()]
    if len(there) == 1 and there[0].name != NPZ:
        return there[0]
    raise DatasetError(
        f"the images in {source} lie in {'several tars' if len(there) > 1 else NPZ}",
        hint="give one of the tars, or generate them with --format png; ganq submit evaluate JOB reads all",
    )


def _is_result(folder: Path) -> bool:
    """Return whether a generation has made a folder."""
    return (folder / MANIFEST).is_file() and (folder / GRIDS).is_dir()


class _FolderScan:
    """One walk over a folder; links are followed as long as they stay in it."""

    def __init__(self, root: Path, reader: int) -> None:
        self.root, self.real_root = root, os.path.realpath(root)
        self.listing = Listing(root, "folder", reader=reader)
        self._followed: set[str] = set()
        # Each folder with the real paths of the folders that lead to it.
        self._pending: list[tuple[str, tuple[str, ...]]] = [("", (self.real_root,))]
        while self._pending:
            self._scan(*self._pending.pop())
        self.listing._sorted()
        if reader > 1:
            self.listing._label(list(self._labels()))

    def _scan(self, here: str, way: tuple[str, ...]) -> None:
        listing = self.listing
        try:
            # By name, so that of two links to one folder the same is followed each time.
            entries = sorted(os.scandir(os.path.join(self.root, here)), key=lambda entry: entry.name)
        except OSError as exc:
            why = os.strerror(exc.errno or 0)
            if listing.reader > 1:
                raise DatasetError(
                    f"the folder {os.path.join(self.root, here)} cannot be read: {why.lower()}",
                    hint="make it readable, or move it out of the data set",
                ) from exc
            listing.skipped.append(Skipped(here or ".", "folder cannot be read", why, images=0))
            return
        for entry in entries:
            name = f"{here}/{entry.name}" if here else entry.name
            if entry.name.startswith(".") or (listing.reader > 1 and names.is_hidden(entry.name)):
                if listing.reader > 1:
                    listing._ignore("(hidden)")
            elif entry.is_dir(follow_symlinks=False):
                self._pending.append((name, (*way, f"{way[-1]}/{entry.name}")))
            elif entry.is_file(follow_symlinks=False):
                listing._take(name)
            elif entry.is_symlink():
                self._scan_link(entry, name, way)
            else:
                listing._take(name, "no regular file")

    def _scan_link(self, entry: "os.DirEntry[str]", name: str, way: tuple[str, ...]) -> None:
        listing, target = self.listing, os.path.realpath(entry.path)
        inside = target.startswith(self.real_root + os.sep)
        if not os.path.exists(target):
            listing._take(name, "link to nowhere")
        elif not os.path.isdir(target):
            listing._take(name, None if inside else "link out of the folder")
        elif listing.reader == 1:
            listing.skipped.append(Skipped(name, "link to a folder: links are not followed", images=0))
        elif target in way or target in self._followed or self._is_walked(target):
            listing.skipped.append(Skipped(name, "link to a folder that is read already", images=0))
        elif inside:
            self._followed.add(target)
            self._pending.append((name, (*way, target)))
        else:
            lost = _count_images(target)
            listing.skipped.append(Skipped(name, "link out of the folder", f"to {target}", images=lost))

    def _is_walked(self, target: str) -> bool:
        """Return whether the walk reads this folder under its own name, as all but hidden ones."""
        inside = os.path.relpath(target, self.real_root)
        return inside.split(os.sep, 1)[0] != ".." and not names.is_hidden(inside)

    def _labels(self) -> Iterator[tuple[str, str]]:
        """Yield the dataset.json at the root, and that in a single folder there."""
        tops = {name.split("/", 1)[0] for name in self.listing.names}
        for name in (names.LABELS, *(f"{top}/{names.LABELS}" for top in tops if len(tops) == 1)):
            path = os.path.join(self.root, name)
            with suppress(OSError):
                if os.path.isfile(path) and os.path.getsize(path) <= MAX_LABELS_BYTES:
                    yield name, Path(path).read_text(errors="replace")


def _count_images(folder: str) -> int:
    """Return how many images a folder holds by their names, hidden ones not counted."""
    found = seen = 0
    for _, _, files in os.walk(folder):
        found += sum(names.is_image(name) and not names.is_hidden(name) for name in files)
        seen += len(files)
        if seen > MAX_COUNTED:
            break
    return found


def _scan_archive(source: Path, reading: Reading) -> Listing | None:
    """Return the listing of a zip or tar; None if it is neither."""
    listing = Listing(source, "", reader=reading.reader)
    labels: list[tuple[str, str]] = []
    for kind, data in list_archive(source, reader=reading.reader, most_bytes=reading.most_bytes):
        if kind == archive_process.KIND:
            listing.kind = data.decode()
        elif kind == archive_process.LABELS:
            labels.append(json.loads(data))
        elif kind == archive_process.MEMBERS:
            for name, reason in json.loads(data):
                if not name.endswith(("/", "\\")):
                    listing._take(name, reason)
    listing._sorted()
    listing._label(labels)
    return listing if listing.kind else None


class UnreadableError(Exception):
    """A file that was listed and cannot be read; the message is the reason."""


class Reader:
    """Reads the bytes of listed images."""

    def read(self, name: str) -> bytes:
        """
        Return the bytes of one image file.

        Raises:
            UnreadableError: gone, unreadable, or too large.
        """
        raise NotImplementedError


class _FolderReader(Reader):
    def __init__(self, listing: Listing) -> None:
        self.root, self.raw = os.path.realpath(listing.source), listing.raw

    def read(self, name: str) -> bytes:
        # O_NONBLOCK: opening a FIFO would block before fstat() can refuse it.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(os.path.realpath(os.path.join(self.root, self.raw(name))), flags)
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
    """Requests members from a process; a member at which it dies twice is left out."""

    def __init__(self, listing: Listing, reading: Reading) -> None:
        self.source, self.raw, self.reading = listing.source, listing.raw, reading
        self.deaths = 0
        self.child = self._begin()

    def _begin(self) -> ArchiveProcess:
        child = ArchiveProcess(
            self.source, "serve", reader=self.reading.reader, most_bytes=self.reading.most_bytes
        )
        try:
            for _ in child.frames():  # until the list of members is read
                pass
        except BaseException:
            child.close()
            raise
        return child

    def read(self, name: str) -> bytes:
        try:
            data = self._ask(self.raw(name))
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
        if self.deaths > MAX_DECODER_CRASHES:
            raise StorageError(
                f"{self.source}: the process that reads it died {self.deaths} times", hint=UNPACK_HINT
            )
        self.child = self._begin()

    def close(self) -> None:
        self.child.close()


class _UnpackedReader(Reader):
    """Unpacks the images of a tar into numbered files: a tar can only be read in its own order."""

    def __init__(self, listing: Listing, reading: Reading, folder: Path) -> None:
        self.folder = folder
        self.wanted = {listing.raw(name): number for number, name in enumerate(listing.names)}
        self.raw = listing.raw
        most_bytes = reading.most_bytes
        with ArchiveProcess(listing.source, "unpack", reader=reading.reader, most_bytes=most_bytes) as child:
            left = child.size * MAX_RATIO + (1 << 20) if reading.reader == 1 else most_bytes
            file: IO[bytes] | None = None
            try:
                for kind, data in child.frames():
                    left -= len(data)
                    if left < 0:
                        raise DatasetError(
                            f"{listing.source} unpacks to more than its members say", hint=UNPACK_HINT
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
            return (self.folder / str(self.wanted[self.raw(name)])).read_bytes()
        except OSError as exc:
            raise UnreadableError("missing in the archive, or too large") from exc


@contextmanager
def open_reader(listing: Listing, scratch: Path, reading: Reading | None = None) -> Iterator[Reader]:
    """
    Open a source to read its images.

    Args:
        scratch: an existing folder with room for an unpacked tar.
        reading: as scan() was given.
    """
    reading = reading or Reading()
    if listing.kind == "folder":
        yield _FolderReader(listing)
    elif listing.kind == "zip":
        try:
            reader = _ZipReader(listing, reading)
        except OSError as exc:
            raise DatasetError(f"{listing.source} cannot be read: {exc}", hint="is it still there?") from exc
        with closing(reader):
            yield reader
    else:
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=scratch) as folder:
            yield _UnpackedReader(listing, reading, Path(folder))
