"""
Data sets on the volume: pictures decoded once into uint8, found again by their fingerprint.

    <volume>/datasets/<fingerprint>/images.u8    N×3×H×W, memory-mapped
                                    index.json   names, classes, labels, source
                                    report.json  what was left out, and why

The fingerprint is the sha-256 of names, contents and size. A folder is written
beside, synced and renamed: it is there whole or not at all, and never changes.
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
from jobs.errors import DatasetError, DiskFullError
from storage.dataset_pool import Decoded, decode_all
from storage.dataset_scan import (
    Listing,
    Reader,
    Skipped,
    UnreadableError,
    open_reader,
    scan,
)
from storage.durable import TEMP_MARK, fsync_folder, make_folder, raise_storage_error, write_json
from storage.unarchive import is_picture_name
from storage.volume import FINGERPRINT, Volume

if TYPE_CHECKING:
    from typing import BinaryIO

FORMAT = 1
"""Goes into the fingerprint: a change of how pixels are made must make new caches."""
IMAGES, INDEX, REPORT = "images.u8", "index.json", "report.json"
RESERVE_BYTES = 64 << 20
UNREADABLE = "cannot be read"

Progress = Callable[[int, int], None]


def _quiet(done: int, total: int) -> None:
    pass


def open_images(
    volume: Volume,
    data: str,
    size: int,
    *,
    max_skip: float = 0.05,
    workers: int = 4,
    progress: Progress = _quiet,
) -> Images:
    """
    The pictures at `data` as size×size pixels: from the cache, or decoded now.

    Args:
        data: path of a folder, zip or tar.
        max_skip: share of picture files that may be unusable.
        workers: decoding processes; no more than there are cores.
        progress: called with (pictures decoded, pictures).

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
        cached = open_cached(volume, fingerprint)
        if cached is not None:
            # Another job may have made it, and been content with fewer pictures.
            with suppress(OSError):
                report = json.loads((volume.dataset(fingerprint) / REPORT).read_text())
                # What the scan left out is this source's; what would not decode is the same
                # for every source of this fingerprint.
                left_out = [Skipped(**one) for one in report["skipped"] if one["name"] in listing.names]
                _require_enough(listing, report["used"], [*listing.skipped, *left_out], max_skip)
            return cached
        _build(volume, listing, reader, digests, fingerprint, size, max_skip, workers, progress)
    built = open_cached(volume, fingerprint)
    if built is None:
        raise DatasetError(f"the cache of {data} was removed while it was made", hint="try again")
    return built


def open_cached(volume: Volume, fingerprint: str) -> Images | None:
    """A data set that was decoded before; None if it is not there, or not whole."""
    import numpy as np

    folder = volume.dataset(fingerprint)
    index = _whole(folder)
    if index is None:
        return None
    shape = (index["count"], 3, index["size"], index["size"])
    pictures = np.memmap(folder / IMAGES, dtype=np.uint8, mode="r", shape=shape)
    labels = np.asarray(index["labels"], dtype=np.int64) if index["classes"] else None
    return Images(pictures, fingerprint, tuple(index["classes"]), labels)


def _whole(folder: Path) -> dict[str, Any] | None:
    """The index of a cache that has all its keys and bytes, else None."""
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
    index = _whole(volume.dataset(fingerprint))
    return None if index is None else list(index["classes"])


def list_datasets(volume: Volume) -> list[dict[str, Any]]:
    """All decoded data sets: fingerprint, source, count, size, bytes, when."""
    keys = ("source", "count", "size", "classes", "created_at")
    found = []
    for path in sorted(volume.datasets.glob(f"*/{INDEX}")):
        index = _whole(path.parent)
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
                _keep(answer, listing, file, used, skipped)
                progress(answer.number + 1, total)
            file.flush()
            os.fsync(file.fileno())
        _require_enough(listing, len(used), [*listing.skipped, *skipped], max_skip)
        write_json(temp / REPORT, _report(listing, used, skipped))
        write_json(temp / INDEX, _index(listing, used, size))
        fsync_folder(temp)
        _publish(temp, target)
    except OSError as exc:
        raise_storage_error(exc, volume.datasets)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _keep(
    answer: Decoded, listing: Listing, file: "BinaryIO", used: list[int], skipped: list[Skipped]
) -> None:
    if answer.reason is not None:
        name = listing.names[answer.number]
        skipped.append(Skipped(name, answer.reason, answer.facts.get("detail", "")))
        return
    file.write(answer.pixels)
    used.append(answer.number)


def _publish(temp: Path, target: Path) -> None:
    """Rename into place; a folder that is there already holds the same pixels, or is broken."""
    try:
        os.rename(temp, target)
    except OSError as exc:
        if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        broken = target.with_name(f"{target.name}{TEMP_MARK}old-{secrets.token_hex(4)}")
        if _whole(target) is not None:
            return
        os.rename(target, broken)
        os.rename(temp, target)
        shutil.rmtree(broken, ignore_errors=True)
    fsync_folder(target.parent)


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
    meant = [one for one in skipped if is_picture_name(one.name)]
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
    meant = len(listing.names) + sum(is_picture_name(one.name) for one in listing.skipped)
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
