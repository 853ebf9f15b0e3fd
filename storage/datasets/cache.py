"""
Data sets on the volume: pictures decoded once into uint8, found again by their fingerprint.

    <volume>/datasets/<fingerprint>/images.u8    N×3×H×W, memory-mapped
                                    index.json   names, classes, labels, source
                                    report.json  what was left out, and why

The fingerprint is the sha-256 of names, contents and size. A folder is written
beside, synced and renamed: it is there whole or not at all, and never changes. The index holds
checksums of the images and of itself. They are compared when a process opens the data set for
the first time; one that is damaged is decoded again.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.context import Images
from jobs.errors import DatasetError, DiskFullError, GanqError
from storage.datasets.archive_process import is_image_name
from storage.datasets.checksums import (
    CHECKSUMS,
    BlockChecksums,
    damage,
    read_checksums,
    with_checksums,
)
from storage.datasets.decode_pool import Decoded, decode_all
from storage.datasets.sources import Listing, Reader, Skipped, UnreadableError, open_reader, scan
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
"""Goes into the fingerprint: a change of how pixels are made must make new caches."""
IMAGES, INDEX, REPORT = "images.u8", "index.json", "report.json"
RESERVE_BYTES = 64 << 20
UNREADABLE = "cannot be read"

Progress = Callable[[int, int], None]
Report = Callable[[str], None]

_intact: set[tuple[int, ...]] = set()
"""The files that this process has compared with their checksums: device, inode, size and time of each."""


def _quiet(done: int, total: int) -> None:
    pass


def _unsaid(damage: str) -> None:
    pass


def open_images(
    volume: Volume,
    data: str,
    size: int,
    *,
    max_skip: float = 0.05,
    workers: int = 4,
    progress: Progress = _quiet,
    damaged: Report = _unsaid,
) -> Images:
    """
    The pictures at `data` as size×size pixels: from the cache, or decoded now.

    Args:
        data: path of a folder, zip or tar.
        max_skip: share of picture files that may be unusable.
        workers: decoding processes; no more than there are cores.
        progress: called with (pictures decoded, pictures).
        damaged: called with what is damaged in the cache, before the pictures are decoded again.

    Raises:
        NotFoundError: nothing is there.
        DatasetError: no pictures, too many unusable ones, or changed while they were read.
        DiskFullError, VolumeError: nothing is left behind.
    """
    listing = scan(Path(data))
    if not listing.names:
        raise no_pictures(listing)
    make_folder(volume.datasets)
    with open_reader(listing, volume.datasets) as reader:
        digests = _digests(listing, reader, progress)
        fingerprint = _fingerprint(listing, digests, size)
        cached = open_cached(volume, fingerprint, progress=progress, damaged=damaged)
        if cached is not None:
            # Another job may have made it, and been content with fewer pictures. What the scan left
            # out is this source's; what would not decode is the same for every source of this fingerprint.
            undecoded = [one for one in left_out(volume, fingerprint) if one.name in listing.names]
            _require_enough(listing, len(cached), [*listing.skipped, *undecoded], max_skip)
            return cached
        _build(volume, listing, reader, digests, fingerprint, size, max_skip, workers, progress)
    built = open_cached(volume, fingerprint, progress=lambda _, total: progress(total, total))
    if built is None:
        raise DatasetError(f"the cache of {data} was removed while it was made", hint="try again")
    return built


def open_cached(
    volume: Volume, fingerprint: str, *, progress: Progress = _quiet, damaged: Report = _unsaid
) -> Images | None:
    """
    Open a data set that was decoded before.

    Args:
        progress: called while its checksums are compared, with (0, pictures).
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
            # The file that was compared is the one that is mapped, whatever takes its name meanwhile.
            what = _damage_once(folder, index, file, progress)
            pictures = None if what else np.memmap(file, dtype=np.uint8, mode="r", shape=shape)
    except FileNotFoundError:  # another process is replacing it
        return None
    except OSError as exc:
        what, pictures = f"{IMAGES} cannot be read: {os.strerror(exc.errno or 0).lower()}", None
    if pictures is None:
        damaged(f"the decoded data set {folder} is damaged: {what}")
        return None
    labels = np.asarray(index["labels"], dtype=np.int64) if index["classes"] else None
    return Images(pictures, fingerprint, tuple(index["classes"]), labels)


def _damage_once(folder: Path, index: dict[str, Any], file: "IO[bytes]", progress: Progress) -> str | None:
    """What find_damage() says, unless this process has found these very files to be intact."""
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
        What is not as it was written; None if all is.

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
    """The index of a decoded data set that has all its keys and as many bytes as it should; else None."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        expected = index["count"] * 3 * index["size"] ** 2
        labelled = len(index["labels"]) == (index["count"] if index["classes"] else 0)
        whole = (folder / IMAGES).stat().st_size == expected and labelled
        return index if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def left_out(volume: Volume, fingerprint: str) -> list[Skipped]:
    """The files that a decoded data set does without, and why."""
    try:
        report = json.loads((volume.dataset(fingerprint) / REPORT).read_text())
        return [Skipped(**one) for one in report["skipped"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def classes_of(volume: Volume, fingerprint: str) -> list[str] | None:
    """The classes of a decoded data set; None if it is not there, or not whole."""
    index = read_index(volume.dataset(fingerprint))
    return None if index is None else list(index["classes"])


def list_datasets(volume: Volume) -> list[dict[str, Any]]:
    """All decoded data sets: fingerprint, source, count, size, bytes, when."""
    keys = ("source", "count", "size", "classes", "created_at")
    found = []
    for path in sorted(volume.datasets.glob(f"*/{INDEX}")):
        index = read_index(path.parent)
        if index is not None and FINGERPRINT.fullmatch(path.parent.name):
            bytes_ = index["count"] * 3 * index["size"] ** 2
            about = {key: index.get(key) for key in keys}
            found.append({"fingerprint": path.parent.name, "bytes": bytes_, **about})
    return sorted(found, key=lambda one: float(one["created_at"] or 0))


def no_pictures(listing: Listing) -> DatasetError:
    """The error of a source without a single picture file."""
    others = sum(listing.ignored.values())
    return DatasetError(
        f"there are no pictures in {listing.source}"
        + (f" ({others} other files)" if others else "")
        + (f"; left out: {_most(listing.skipped)}" if listing.skipped else ""),
        hint="give a folder with PNG, JPEG or WEBP files, or draw some: ganq dataset make DIR",
    )


# --- building ---------------------------------------------------------------------------------


def _digests(listing: Listing, reader: Reader, progress: Progress) -> list[str]:
    """sha-256 of every picture file, '' for one that cannot be read."""
    digests = []
    for name in listing.names:
        progress(0, len(listing.names))  # a job that says nothing for ten minutes is taken as hung
        try:
            digests.append(hashlib.sha256(reader.read(name)).hexdigest())
        except UnreadableError:
            digests.append("")
    return digests


def _fingerprint(listing: Listing, digests: list[str], size: int) -> str:
    about = json.dumps([FORMAT, size, list(zip(listing.names, digests, strict=True))])
    return hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()


def _contents(listing: Listing, reader: Reader, skipped: list[Skipped]) -> Iterator[tuple[int, bytes]]:
    for number, name in enumerate(listing.names):
        try:
            yield number, reader.read(name)
        except UnreadableError as exc:
            skipped.append(Skipped(name, f"{UNREADABLE}: {exc}"))


def _build(
    volume: Volume,
    listing: Listing,
    reader: Reader,
    digests: list[str],
    fingerprint: str,
    size: int,
    max_skip: float,
    workers: int,
    progress: Progress,
) -> None:
    total = len(listing.names)
    target = volume.dataset(fingerprint)
    temp = target.with_name(f"{fingerprint}{TEMP_MARK}{secrets.token_hex(4)}")
    _require_room(volume.datasets, total * 3 * size * size)
    skipped: list[Skipped] = []
    used: list[int] = []
    checksums = BlockChecksums()

    def changed(number: int) -> DatasetError:
        return DatasetError(
            f"{listing.names[number]} changed while the pictures were read",
            hint="let nothing write there, and try again",
        )

    def checked() -> Iterator[tuple[int, bytes]]:
        for number, data in _contents(listing, reader, skipped):
            if hashlib.sha256(data).hexdigest() != digests[number]:
                raise changed(number)
            yield number, data
        # One that could be read before and is left out now stands in the fingerprint all
        # the same: two caches of one name would differ.
        missing = {one.name for one in skipped if one.reason.startswith(UNREADABLE)}
        for number, name in enumerate(listing.names):
            if name in missing and digests[number]:
                raise changed(number)

    try:
        temp.mkdir()
        with open(temp / IMAGES, "xb") as file:
            for answer in decode_all(checked(), size=size, workers=_cores(workers)):
                _keep(answer, listing, file, checksums, used, skipped)
                progress(answer.number + 1, total)
            file.flush()
            os.fsync(file.fileno())
        _require_enough(listing, len(used), [*listing.skipped, *skipped], max_skip)
        write_json(temp / REPORT, _report(listing, used, skipped))
        write_json(temp / INDEX, with_checksums(_index(listing, used, size), checksums.crc32))
        fsync_folder(temp)
        _publish(temp, target)
    except OSError as exc:
        raise_storage_error(exc, volume.datasets)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _keep(
    answer: Decoded,
    listing: Listing,
    file: "IO[bytes]",
    checksums: BlockChecksums,
    used: list[int],
    skipped: list[Skipped],
) -> None:
    if answer.reason is not None:
        name = listing.names[answer.number]
        skipped.append(Skipped(name, answer.reason, answer.facts.get("detail", "")))
        return
    file.write(answer.pixels)
    checksums.update(answer.pixels)
    used.append(answer.number)


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
        # Whoever opens it between the two finds nothing, and makes it, too; never half of one.
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
            return _damage_once(folder, index, file, _quiet) is None
    except OSError:
        return False


def _index(listing: Listing, used: list[int], size: int) -> dict[str, Any]:
    names = [listing.names[number] for number in used]
    classes = listing.classes()
    place = {name: i for i, name in enumerate(classes)}
    return {
        "format": FORMAT,
        "count": len(names),
        "size": size,
        "source": str(listing.source),
        "names": [name.encode("utf-8", "replace").decode() for name in names],
        "classes": list(classes),
        "labels": [place[listing.class_of(name)] for name in names] if classes else [],
        "created_at": time.time(),
    }


def _report(listing: Listing, used: list[int], skipped: list[Skipped]) -> dict[str, Any]:
    return {
        "source": str(listing.source),
        "used": len(used),
        "skipped": [vars(one) for one in (*listing.skipped, *skipped)],
        "ignored": listing.ignored,
    }


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + RESERVE_BYTES:
        raise DiskFullError(
            f"the decoded pictures need {(needed + RESERVE_BYTES) / 1e6:.0f} MB with the reserve, "
            f"and {folder} has {free / 1e6:.0f} MB free",
            hint="make room (ganq gc --dry-run shows what can go), or point GANQ_VOLUME at a larger disk; "
            "the job goes on by itself",
        )


def _require_enough(listing: Listing, used: int, skipped: list[Skipped], max_skip: float) -> None:
    meant = [one for one in skipped if is_image_name(one.name)]
    bad, total = len(meant), used + len(meant)
    if used and bad <= max_skip * total:
        return
    raise DatasetError(
        f"{bad} of {total} pictures in {listing.source} cannot be used: {_most(meant)}",
        hint=f"ganq dataset check {listing.source} lists them"
        + (f"; --max-skip {min(bad / total + 0.01, 1):.2f} goes on without them" if used else ""),
    )


def _most(skipped: list[Skipped]) -> str:
    reasons = Counter(one.reason for one in skipped).most_common(3)
    return ", ".join(f"{count} × {reason}" for reason, count in reasons)


def _cores(workers: int) -> int:
    return max(1, min(workers, len(os.sched_getaffinity(0))))


# --- looking before training ------------------------------------------------------------------


@dataclass
class Check:
    """What `ganq dataset check` found; counts by what was seen."""

    source: str
    kind: str
    pictures: int = 0
    usable: int = 0
    copies: int = 0
    """Files with the very bytes of one before them."""
    sizes: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    classes: dict[str, int] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        plain = {
            key: dict(value.most_common()) if isinstance(value, Counter) else value
            for key, value in vars(self).items()
        }
        return {**plain, "skipped": [vars(one) for one in self.skipped]}


def check(data: Path, *, workers: int = 4, scratch: Path | None = None, progress: Progress = _quiet) -> Check:
    """
    Open every picture and say what training would find.

    Raises:
        NotFoundError, DatasetError: there is nothing to look at.
    """
    import tempfile

    listing = scan(data)
    meant = len(listing.names) + sum(is_image_name(one.name) for one in listing.skipped)
    found = Check(str(data), listing.kind, pictures=meant, ignored=listing.ignored)
    found.skipped.extend(listing.skipped)
    classes = listing.classes()
    found.classes = dict.fromkeys(classes, 0)
    if not listing.names:
        raise no_pictures(listing)
    with open_reader(listing, scratch or Path(tempfile.gettempdir())) as reader:
        seen: set[bytes] = set()
        copies: set[int] = set()

        def looked_at() -> Iterator[tuple[int, bytes]]:
            for number, data in _contents(listing, reader, found.skipped):
                digest = hashlib.blake2b(data, digest_size=16).digest()
                if digest in seen:
                    copies.add(number)
                seen.add(digest)
                yield number, data

        for answer in decode_all(looked_at(), size=0, workers=_cores(workers)):
            name, facts = listing.names[answer.number], answer.facts
            progress(answer.number + 1, len(listing.names))
            if answer.reason is not None:
                found.skipped.append(Skipped(name, answer.reason, facts.get("detail", "")))
                continue
            found.usable += 1
            found.copies += answer.number in copies
            found.sizes[f"{facts['width']}×{facts['height']}"] += 1
            found.modes[facts["mode"]] += 1
            found.formats[facts["format"]] += 1
            found.notes.update(facts["notes"])
            if classes:
                found.classes[listing.class_of(name)] += 1
    return found
