"""
Data sets on the volume: images decoded once into uint8, found again by their fingerprint.

    <volume>/datasets/<fingerprint>/images.u8    N×3×H×W, memory-mapped
                                    index.json   names, classes, labels, source
                                    report.json  what was left out or converted, and why

The fingerprint is the SHA-256 of names, contents and size. Where the reader of ganq 0.1 and 0.2 would have
made other pixels or labels of the same files, the version of the reader is part of it, so that both caches
can exist side by side. A folder is written beside, synced and renamed: it is there whole or not at all, and
its images never change. The index holds checksums of the images and of itself. They are compared when a
process opens the data set for the first time; one that is damaged is decoded again.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.context import Images
from jobs.errors import DatasetError, DiskFullError, GanqError
from storage.datasets.checksums import (
    CHECKSUMS,
    BlockChecksums,
    damage,
    read_checksums,
    with_checksums,
)
from storage.datasets.decode_pool import Decoded, decode_all
from storage.datasets.sources import Listing, Reader, Reading, Skipped, UnreadableError, open_reader, scan
from storage.datasets.summary import Summary, no_images, require_enough
from storage.volume.durable import (
    TEMP_MARK,
    fsync_folder,
    make_folder,
    raise_storage_error,
    write_json,
)
from storage.volume.layout import FINGERPRINT, Volume

if TYPE_CHECKING:
    from typing import IO

FORMAT = 1
"""Part of the fingerprint."""
IMAGES, INDEX, REPORT = "images.u8", "index.json", "report.json"
RESERVE_BYTES = 64 << 20
UNREADABLE = "cannot be read"

Progress = Callable[[int, int], None]
Report = Callable[[str], None]

_intact: set[tuple[int, ...]] = set()
"""Files that this process has compared with their checksums: device, inode, size and time of each."""


def _quiet(done: int, total: int) -> None:
    pass


def _ignore(what: object) -> None:
    pass


def open_images(
    volume: Volume,
    data: str,
    size: int,
    *,
    reading: Reading | None = None,
    max_skip: float = 0.05,
    workers: int = 4,
    progress: Progress = _quiet,
    damaged: Report = _ignore,
    found: Callable[[Summary], None] = _ignore,
) -> Images:
    """
    Return the images at `data` as size×size pixels: from the cache, or decoded now.

    Args:
        data: path of a folder, zip or tar.
        reading: how it is read.
        max_skip: share of image files that may be unusable.
        workers: decoding processes; no more than there are cores.
        progress: called with (images decoded, images).
        damaged: called with what is damaged in the cache, before the images are decoded again.
        found: called with what was found in the data set.

    Raises:
        NotFoundError: nothing is there.
        DatasetError: no images, too many unusable ones, or changed while they were read.
        DiskFullError, VolumeError: nothing is left behind.
    """
    reading = reading or Reading()
    listing = scan(Path(data), reading)
    if not listing.names:
        raise no_images(listing)
    make_folder(volume.datasets)
    with open_reader(listing, volume.datasets, reading) as reader:
        source = _Source(listing, reader, reading, size, progress)
        cached = source.cached(volume, progress, damaged)
        if cached is not None:
            # Another job may have made it, and been content with fewer images. What the scan left
            # out is this source's; what would not decode is the same for every source of this fingerprint.
            there = set(listing.names)
            undecoded = [one for one in left_out(volume, cached.fingerprint) if one.name in there]
            require_enough(listing, len(cached), [*listing.skipped, *undecoded], max_skip)
        else:
            fingerprint = _build(volume, source, max_skip, workers, progress)
            cached = open_cached(volume, fingerprint, progress=lambda _, total: progress(total, total))
    if cached is None:
        raise DatasetError(f"the cache of {data} was removed while it was made", hint="try again")
    found(source.summary(volume, cached))
    return cached


def open_cached(
    volume: Volume, fingerprint: str, *, progress: Progress = _quiet, damaged: Report = _ignore
) -> Images | None:
    """
    Open a data set that was decoded before.

    Args:
        progress: called while its checksums are compared, with (0, images).
        damaged: called with what is not as it was written.

    Returns:
        None if it is not there, not whole, or damaged.
    """
    import numpy as np

    folder = volume.dataset(fingerprint)
    index = read_index(folder)
    if index is None:
        return None
    shape = (index["count"], 3, index["size"], index["size"])
    try:
        with open(folder / IMAGES, "rb") as file:
            # Map the file that was compared: another may have been renamed into its place.
            what = _find_damage(folder, index, file, progress)
            images = None if what else np.memmap(file, dtype=np.uint8, mode="r", shape=shape)
    except FileNotFoundError:  # another process is replacing it
        return None
    except OSError as exc:
        what, images = f"{IMAGES} cannot be read: {os.strerror(exc.errno or 0).lower()}", None
    if images is None:
        damaged(f"the decoded data set {folder} is damaged: {what}")
        return None
    labels = np.asarray(index["labels"], dtype=np.int64) if index["classes"] else None
    return Images(images, fingerprint, tuple(index["classes"]), labels)


def _find_damage(folder: Path, index: dict[str, Any], file: "IO[bytes]", progress: Progress) -> str | None:
    """Return what find_damage() finds, unless this process has found these very files to be intact."""
    images, about = os.fstat(file.fileno()), (folder / INDEX).stat()
    key = tuple(value for s in (images, about) for value in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns))
    if key in _intact:
        return None
    what = find_damage(folder, index, file, progress)
    if what is None:
        _intact.add(key)
    return what


def find_damage(
    folder: Path, index: dict[str, Any], file: "IO[bytes]", progress: Progress = _quiet
) -> str | None:
    """
    Compare a decoded data set with its checksums.

    One without checksums was written by ganq 0.1.0 or older, and gets them now.

    Args:
        file: its images.

    Returns:
        What differs from what was written; None if nothing does.

    Raises:
        OSError: it cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        crc32 = read_checksums(file.fileno(), size, lambda done, blocks: progress(0, index["count"]))
        if CHECKSUMS in index:
            return damage(index, crc32)
    except (KeyError, TypeError, ValueError):
        return "its checksums are not those that were written"
    # Not worth an error: a volume may be read-only. Nor if another has taken its place meanwhile.
    with suppress(GanqError, OSError):
        if os.path.samestat(os.fstat(file.fileno()), (folder / IMAGES).stat()):
            write_json(folder / INDEX, with_checksums(index, crc32))
    return None


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return the index of a decoded data set; None unless it has all its keys and all its bytes."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        expected = index["count"] * 3 * index["size"] ** 2
        labelled = len(index["labels"]) == (index["count"] if index["classes"] else 0)
        whole = (folder / IMAGES).stat().st_size == expected and labelled
        return index if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def left_out(volume: Volume, fingerprint: str) -> list[Skipped]:
    """Return the files that a decoded data set does without, and why."""
    try:
        report = json.loads((volume.dataset(fingerprint) / REPORT).read_text())
        return [Skipped(**one) for one in report["skipped"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def classes_of(volume: Volume, fingerprint: str) -> list[str] | None:
    """Return the classes of a decoded data set; None if it is not there, or not whole."""
    index = read_index(volume.dataset(fingerprint))
    return None if index is None else list(index["classes"])


def list_datasets(volume: Volume) -> list[dict[str, Any]]:
    """Return all decoded data sets: fingerprint, source, count, size, bytes, when."""
    keys = ("source", "count", "size", "classes", "created_at")
    found = []
    for path in sorted(volume.datasets.glob(f"*/{INDEX}")):
        index = read_index(path.parent)
        if index is not None and FINGERPRINT.fullmatch(path.parent.name):
            bytes_ = index["count"] * 3 * index["size"] ** 2
            about = {key: index.get(key) for key in keys}
            found.append({"fingerprint": path.parent.name, "bytes": bytes_, **about})
    return sorted(found, key=lambda one: float(one["created_at"] or 0))


# --- one source -------------------------------------------------------------------------------


class _Source:
    """
    The images of a source that are used, and the fingerprints that their cache may have.

    Args:
        size: side of the images, in pixels.
    """

    def __init__(
        self, listing: Listing, reader: Reader, reading: Reading, size: int, progress: Progress
    ) -> None:
        self.listing, self.reader, self.reading, self.size = listing, reader, reading, size
        self.digests = self._digest(progress)
        self.copies = {} if reading.keep_duplicates else find_copies(self.digests)
        self.used = [number for number in range(len(listing.names)) if number not in self.copies]
        self.names = [listing.names[number] for number in self.used]
        pairs = [(listing.names[number], self.digests[number]) for number in self.used]
        self.classes = listing.classes()
        labels = [listing.class_of(name) for name in self.names] if self.classes else []
        self.plain = _sha256([FORMAT, size, pairs])
        """The fingerprint where version 1 of the reader makes the same of these files."""
        self.marked = self.plain
        self.relabelled = False
        if reading.reader > 1:
            by_1 = Listing(listing.source, listing.kind, self.names, reader=1)
            classes_1 = by_1.classes()
            labels_1 = [by_1.class_of(name) for name in self.names] if classes_1 else []
            self.relabelled = (classes_1, labels_1) != (self.classes, labels)
            about: dict[str, Any] = {"reader": reading.reader, "white_level": reading.white_level}
            if reading.fit != "crop":
                about["fit"] = reading.fit
            if self.relabelled:
                about |= {"classes": self.classes, "labels": labels}
            self.marked = _sha256([FORMAT, size, pairs, about])

    def _digest(self, progress: Progress) -> list[str]:
        """Return the SHA-256 of every image file, '' for one that cannot be read."""
        digests = []
        for name in self.listing.names:
            progress(
                0, len(self.listing.names)
            )  # a job that reports nothing for ten minutes is taken as hung
            try:
                digests.append(hashlib.sha256(self.reader.read(name)).hexdigest())
            except UnreadableError:
                digests.append("")
        return digests

    def cached(self, volume: Volume, progress: Progress, damaged: Report) -> Images | None:
        """Return the images from the cache, if they are there as this reader makes them."""
        for fingerprint in dict.fromkeys((self.marked, self.plain)):
            index = read_index(volume.dataset(fingerprint))
            if index is None:
                continue
            # Another white level or fit makes other pixels, which the plain fingerprint does not include.
            mine = fingerprint == self.marked or (
                not (self.relabelled or self.reading.changes_pixels)
                and index.get("reader", 1) >= self.reading.reader
            )
            if mine:
                cached = open_cached(volume, fingerprint, progress=progress, damaged=damaged)
                if cached is not None:
                    return cached
        return None

    def contents(self, skipped: list[Skipped]) -> Iterator[tuple[int, bytes]]:
        """
        Yield the images that can be read.

        Raises:
            DatasetError: one is not what it was when it was hashed.
        """
        for number, data in _contents(self.listing, self.reader, skipped, self.used):
            if hashlib.sha256(data).hexdigest() != self.digests[number]:
                raise self._changed(number)
            yield number, data
        # One that could be read before and is left out now is in the fingerprint all the same: two
        # caches of one name would differ.
        unreadable = {one.name for one in skipped if one.reason.startswith(UNREADABLE)}
        for number in self.used:
            if self.listing.names[number] in unreadable and self.digests[number]:
                raise self._changed(number)

    def _changed(self, number: int) -> DatasetError:
        return DatasetError(
            f"{self.listing.names[number]} changed while the images were read",
            hint="let nothing write there, and try again",
        )

    def index(self, used: list[int]) -> dict[str, Any]:
        listing = self.listing
        names = [listing.names[number] for number in used]
        place = {name: i for i, name in enumerate(self.classes)}
        return {
            "format": FORMAT,
            "count": len(names),
            "size": self.size,
            "source": str(listing.source),
            "names": [name.encode("utf-8", "replace").decode() for name in names],
            "classes": list(self.classes),
            "labels": [place[listing.class_of(name)] for name in names] if self.classes else [],
            "created_at": time.time(),
            "reader": self.reading.reader,
        }

    def summary(self, volume: Volume, images: Images) -> Summary:
        """Return what was found: by the scan of this source, and by the job that decoded it."""
        try:
            report = json.loads((volume.dataset(images.fingerprint) / REPORT).read_text())
            found = Summary.from_json(report.get("found", {}))
        except (OSError, ValueError, TypeError, AttributeError):
            found = Summary()
        there = set(self.listing.names)
        undecoded = [one for one in left_out(volume, images.fingerprint) if one.name in there]
        names = {one.name for one in undecoded}
        copied = sum(self.listing.names[number] in names for number in self.copies)
        found.images, found.copies, found.reasons = len(images), len(self.copies) - copied, Counter()
        found.leave_out([*self.listing.skipped, *undecoded])
        if images.labels_N is not None:
            count = Counter(images.labels_N.tolist())
            found.classes = {name: count[place] for place, name in enumerate(images.classes)}
        return found


def find_copies(digests: list[str]) -> dict[int, int]:
    """Return the files that have the bytes of an earlier one: number to number."""
    first: dict[str, int] = {}
    copies = {}
    for number, digest in enumerate(digests):
        if digest and (of := first.setdefault(digest, number)) != number:
            copies[number] = of
    return copies


def _sha256(about: list[Any]) -> str:
    return hashlib.sha256(json.dumps(about).encode("utf-8", "surrogateescape")).hexdigest()


def _contents(
    listing: Listing, reader: Reader, skipped: list[Skipped], numbers: Iterable[int]
) -> Iterator[tuple[int, bytes]]:
    for number in numbers:
        name = listing.names[number]
        try:
            yield number, reader.read(name)
        except UnreadableError as exc:
            skipped.append(Skipped(name, f"{UNREADABLE}: {exc}"))


# --- building ---------------------------------------------------------------------------------


def _build(volume: Volume, source: _Source, max_skip: float, workers: int, progress: Progress) -> str:
    """Decode the images of a source into the cache, and return their fingerprint."""
    listing, size = source.listing, source.size
    total = len(source.used)
    temp = volume.datasets / f"{source.marked}{TEMP_MARK}{secrets.token_hex(4)}"
    _require_room(volume.datasets, total * 3 * size * size)
    skipped: list[Skipped] = []
    used: list[int] = []
    checksums = BlockChecksums()
    found, changed = Summary(), source.relabelled or source.reading.changes_pixels
    try:
        temp.mkdir()
        with open(temp / IMAGES, "xb") as file:
            answers = decode_all(
                source.contents(skipped), size=size, workers=_cores(workers), reading=source.reading
            )
            for done, answer in enumerate(answers, 1):
                progress(done, total)
                if answer.reason is not None:
                    skipped.append(_undecoded(listing, answer))
                    continue
                file.write(answer.pixels)
                checksums.update(answer.pixels)
                used.append(answer.number)
                found.use(answer.facts)
                changed |= bool(answer.facts.get("changed"))
            file.flush()
            os.fsync(file.fileno())
        failed = {one.name: one for one in skipped}
        for number, of in source.copies.items():
            if (one := failed.get(listing.names[of])) is not None:
                skipped.append(replace(one, name=listing.names[number]))
        require_enough(listing, len(used), [*listing.skipped, *skipped], max_skip)
        write_json(temp / REPORT, _report(source, used, skipped, found))
        write_json(temp / INDEX, with_checksums(source.index(used), checksums.crc32))
        fsync_folder(temp)
        if not changed and _reuse_cache(volume.dataset(source.plain), temp, source.reading):
            return source.plain
        fingerprint = source.marked if changed else source.plain
        _publish(temp, volume.dataset(fingerprint))
        return fingerprint
    except OSError as exc:
        raise_storage_error(exc, volume.datasets)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _undecoded(listing: Listing, answer: Decoded) -> Skipped:
    assert answer.reason is not None
    return Skipped(listing.names[answer.number], answer.reason, answer.facts.get("detail", ""))


def _reuse_cache(target: Path, temp: Path, reading: Reading) -> bool:
    """Mark the cache of reader 1 as right for this version if both are equal; return whether they are."""
    index, mine = read_index(target), read_index(temp)
    if index is None or mine is None or index.get("reader", 1) >= reading.reader or not _is_intact(target):
        return False
    same = all(index[key] == mine[key] for key in ("count", "classes", "labels"))
    crc32 = mine[CHECKSUMS]["crc32"]
    if not same or index.get(CHECKSUMS, {}).get("crc32", crc32) != crc32:
        return False
    index = {key: value for key, value in index.items() if key != CHECKSUMS}
    with suppress(GanqError):  # a volume may be read-only
        write_json(target / REPORT, json.loads((temp / REPORT).read_text()))
        write_json(target / INDEX, with_checksums({**index, "reader": reading.reader}, crc32))
    return True


def _publish(temp: Path, target: Path) -> None:
    """Rename into place; a folder that is there already holds the same pixels, or is damaged."""
    try:
        os.rename(temp, target)
    except OSError as exc:
        if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        broken = target.with_name(f"{target.name}{TEMP_MARK}old-{secrets.token_hex(4)}")
        if _is_intact(target):
            return
        # A process that opens it between the two renames finds nothing, and decodes it, too.
        os.rename(target, broken)
        os.rename(temp, target)
        shutil.rmtree(broken, ignore_errors=True)
    fsync_folder(target.parent)


def _is_intact(folder: Path) -> bool:
    index = read_index(folder)
    if index is None:
        return False
    try:
        with open(folder / IMAGES, "rb") as file:
            return _find_damage(folder, index, file, _quiet) is None
    except OSError:
        return False


def _report(source: _Source, used: list[int], skipped: list[Skipped], found: Summary) -> dict[str, Any]:
    listing = source.listing
    return {
        "source": str(listing.source),
        "used": len(used),
        "skipped": [vars(one) for one in (*listing.skipped, *skipped)],
        "ignored": listing.ignored,
        "copies": [[listing.names[number], listing.names[of]] for number, of in source.copies.items()],
        "found": found.to_json(),
    }


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + RESERVE_BYTES:
        raise DiskFullError(
            f"the decoded images need {(needed + RESERVE_BYTES) / 1e6:.0f} MB with the reserve, "
            f"and {folder} has {free / 1e6:.0f} MB free",
            hint="make room (ganq gc --dry-run), or point GANQ_VOLUME at a larger disk; "
            "the job then continues",
        )


def _cores(workers: int) -> int:
    return max(1, min(workers, len(os.sched_getaffinity(0))))


# --- looking before training ------------------------------------------------------------------


@dataclass
class Check(Summary):
    """Findings of `ganq dataset check`."""

    source: str = ""
    kind: str = ""
    image_count: int = 0
    """Images by their names, including copies and those that are left out."""
    usable: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)
    copy_of: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        plain = {
            key: dict(value.most_common()) if isinstance(value, Counter) else value
            for key, value in vars(self).items()
            if key != "reasons"
        }
        plain["pictures"] = self.image_count  # ganq 0.2
        return {**plain, "skipped": [vars(one) for one in self.skipped]}


def check(
    data: Path,
    *,
    reading: Reading | None = None,
    workers: int = 4,
    scratch: Path | None = None,
    progress: Progress = _quiet,
) -> Check:
    """
    Open every image and report what training would find.

    Raises:
        NotFoundError, DatasetError: there is nothing to look at.
    """
    import tempfile

    reading = reading or Reading()
    listing = scan(data, reading)
    if not listing.names:
        raise no_images(listing)
    meant = len(listing.names) + sum(one.images for one in listing.skipped)
    found = Check(source=str(data), kind=listing.kind, image_count=meant, ignored=listing.ignored)
    found.skipped.extend(listing.skipped)
    classes = listing.classes()
    found.classes = dict.fromkeys(classes, 0)
    with open_reader(listing, scratch or Path(tempfile.gettempdir()), reading) as reader:
        first: dict[bytes, int] = {}
        copies: dict[int, int] = {}

        def probed() -> Iterator[tuple[int, bytes]]:
            for number, data in _contents(listing, reader, found.skipped, range(len(listing.names))):
                digest = hashlib.blake2b(data, digest_size=16).digest()
                if (of := first.setdefault(digest, number)) != number:
                    copies[number] = of
                yield number, data

        for answer in decode_all(probed(), size=0, workers=_cores(workers), reading=reading):
            name, facts = listing.names[answer.number], answer.facts
            progress(answer.number + 1, len(listing.names))
            if answer.reason is not None:
                found.skipped.append(_undecoded(listing, answer))
                continue
            found.usable += 1
            if answer.number in copies:
                found.copies += 1
                found.copy_of[name] = listing.names[copies[answer.number]]
                if not reading.keep_duplicates:
                    continue
            found.use(facts)
            found.sizes[f"{facts['width']}×{facts['height']}"] += 1
            found.modes[facts["mode"]] += 1
            found.formats[facts["format"]] += 1
            if classes:
                found.classes[listing.class_of(name)] += 1
    found.leave_out(found.skipped)
    return found
