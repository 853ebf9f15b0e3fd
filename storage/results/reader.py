"""Read, verify and copy published results of generation jobs."""

import errno
import filecmp
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jobs.context import StoredImage
from jobs.errors import StorageError
from jobs.failpoints import failpoint
from storage.results.formats import GRIDS, IMAGES, MANIFEST, RESULT, bytes_of, pixels_of
from storage.volume.durable import (
    TEMP_MARK,
    fsync_folder,
    raise_storage_error,
    remove,
    sha256_file,
    sync_filesystem,
)

GONE = (errno.ENOENT, errno.ENOTDIR)
"""Errors of a missing file on a volume that is available."""

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def read_manifest(folder: Path, manifest_sha256: str) -> Iterator[StoredImage]:
    """
    Yield the images of a published result in order, reading one line at a time.

    Raises:
        StorageError: the manifest differs from the registered one.
    """
    path = folder / MANIFEST
    try:
        if sha256_file(path) != manifest_sha256:
            raise StorageError(f"{path} has changed since it was published")
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if "index" in record:  # the last lines list archives
                    yield _made(folder, record)
    except OSError as exc:
        raise_storage_error(exc, path)


def is_there(folder: Path, manifest_sha256: str) -> bool:
    """
    Return whether all files of a published result exist, by their names and sizes.

    Their contents are not read, which would take as long as copying them.

    Raises:
        StorageError: the volume is not available.
    """
    named: dict[str, int] = {}
    try:
        if sha256_file(folder / MANIFEST) != manifest_sha256:
            return False
        with open(folder / MANIFEST) as lines:
            for text in lines:
                line = json.loads(text)
                if "archive" in line:
                    named[line["archive"]] = line["bytes"]
                elif "offset" not in line:
                    named[line["file"]] = line["bytes"]
        return all((folder / name).stat().st_size == size for name, size in named.items())
    except OSError as exc:
        if exc.errno in GONE:
            return False
        raise_storage_error(exc, folder)


def _made(folder: Path, line: dict[str, Any]) -> StoredImage:
    where = ("index", "file", "member", "offset")
    record = {name: value for name, value in line.items() if name not in where}
    return StoredImage(folder / line["file"], record, offset=line.get("offset", 0))


def read_images(folder: Path, manifest_sha256: str, most: int) -> "Iterator[NDArray[np.uint8]]":
    """
    Yield up to `most` images of a published result, uint8 (H, W, 3), evenly spread over all.

    Raises:
        StorageError: the manifest or an image differs from what was registered.
    """
    count = sum(1 for _ in read_manifest(folder, manifest_sha256))
    wanted = {place * count // most for place in range(most)} if count > most else None
    for place, made in enumerate(read_manifest(folder, manifest_sha256)):
        if wanted is None or place in wanted:
            try:
                yield pixels_of(made)
            except (OSError, ValueError) as exc:
                raise StorageError(f"{made.path} is missing or broken: {exc}") from exc


def verify_lines(folder: Path, lines: IO[str]) -> int:
    """
    Compare a result with the lines of its manifest: indices 0…N−1, hashes, and no other images.

    Memory does not grow with the number of images.

    Returns:
        The number of images.

    Raises:
        StorageError: the first difference.
    """
    count = 0
    named, archives = _Names(), _Names()
    for text in lines:
        line = json.loads(text)
        if "archive" in line:
            _verify_archive(folder / line["archive"], line)
            archives.add(line["archive"])
            continue
        if line["index"] != count:
            raise StorageError(f"{folder / MANIFEST} does not hold the indices from 0 on: {count} is missing")
        made = _made(folder, line)
        if not made.path.is_file() or hashlib.sha256(bytes_of(made)).hexdigest() != line["sha256"]:
            raise StorageError(f"{made.path} is missing or has changed")
        if (file := Path(line["file"])).parent.name == IMAGES:
            named.add(file.name)
        count += 1
    there, archives_there = _Names(), _Names()
    if (folder / IMAGES).is_dir():
        for one in os.scandir(folder / IMAGES):
            there.add(one.name)
    for name in names_of_result(folder):
        if Path(name).suffix in (".tar", ".npz"):
            archives_there.add(name)
    if named.sum != there.sum or archives.sum != archives_there.sum:
        raise StorageError(f"{folder} holds images that the manifest does not name, or lacks some")
    return count


def _verify_archive(path: Path, line: dict[str, Any]) -> None:
    if path.stat().st_size != line["bytes"] or sha256_file(path) != line["sha256"]:
        raise StorageError(f"{path} has changed since it was published")


class _Names:
    """A set of names that is compared by the sum of their hashes, without storing them."""

    def __init__(self) -> None:
        self.sum = 0

    def add(self, name: str) -> None:
        self.sum += int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest())


def names_of_result(folder: Path) -> list[str]:
    """Return the names of a published result in a folder; the manifest comes last."""
    if not folder.is_dir():
        return []
    found = sorted(name for name in os.listdir(folder) if RESULT.fullmatch(name))
    return sorted(found, key=lambda name: name == MANIFEST)


def occupied(folder: Path) -> str | None:
    """Return a name in a folder that a copied result would overwrite; None if there is none."""
    return next(iter(names_of_result(folder)), None)


def copy_out(folder: Path, out: str) -> dict[str, Any]:
    """
    Copy a published result into the user's folder (--out), completely or not at all.

    If an attempt is killed here, the next one has the same bytes, keeps equal files and copies the rest. An
    attempt that has lost its lease may still be copying, so each uses its own temporary names. The copy
    is checked against the manifest before the manifest itself is copied.

    Returns:
        {'out': folder}, or {'out_error': reason}; the published result is not affected.
    """
    target = Path(out)
    names = names_of_result(folder)
    try:
        taken = next((n for n in names if (target / n).exists() and not _same(folder / n, target / n)), None)
        if taken is not None:
            return {"out_error": f"{target} already holds {taken}: nothing there was touched"}
        target.mkdir(parents=True, exist_ok=True)
        _remove_older(target, folder)
        for name in names:
            if name == MANIFEST:
                _check_copy(folder, target)
            _copy_whole(folder / name, target / name, mark=_mark(folder))
            failpoint("images.copied")
    except StorageError as exc:
        return {"out_error": f"{target} does not hold the whole result: {exc.message}"}
    except OSError as exc:
        with suppress(OSError):
            if not any(target.iterdir()):
                target.rmdir()
        return {"out_error": f"{target}: {(exc.strerror or str(exc)).lower()}"}
    return {"out": str(target)}


def _mark(folder: Path) -> str:
    """Return what marks the temporary names of one attempt: job, attempt, and a random number."""
    return f"{folder.parent.name}-{folder.name}-{secrets.token_hex(4)}"


def _remove_older(target: Path, folder: Path) -> None:
    """Delete temporary files of earlier attempts of the job; an attempt that is still copying fails."""
    job, own = folder.parent.name, int(folder.name.removeprefix("a"))
    ours = re.compile(rf"\.(.+){re.escape(TEMP_MARK)}{job}(?:-a(\d+)-[0-9a-f]+)?")
    for path in list(target.iterdir()):
        found = ours.fullmatch(path.name)
        if found is None or not RESULT.fullmatch(found[1]) or int(found[2] or 0) >= own:
            continue
        # Rename first, so that it disappears at once for a process that writes to it.
        going = path.with_name(f".{found[1]}{TEMP_MARK}{_mark(folder)}")
        with suppress(OSError):
            path.rename(going)
            remove(going)


def _copy_whole(source: Path, target: Path, *, mark: str) -> None:
    """
    Copy a file or a folder that does not exist yet, so that it appears complete and durable.

    Raises:
        OSError: nothing remains.
    """
    if target.exists():
        return
    temp = target.with_name(f".{target.name}{TEMP_MARK}{mark}")
    try:
        if source.is_dir():
            shutil.copytree(source, temp, copy_function=_copy_file)
        else:
            shutil.copy2(source, temp)
        sync_filesystem(target.parent)
        if not target.exists():  # another attempt may have been faster
            temp.rename(target)
        fsync_folder(target.parent)
    except OSError:
        if not target.exists():
            raise
    finally:
        remove(temp)


def _copy_file(source: str, target: str) -> None:
    failpoint("images.copying")
    shutil.copy2(source, target)


def _check_copy(folder: Path, target: Path) -> None:
    """
    Compare a copy with the manifest.

    Raises:
        StorageError: it differs.
    """
    with open(folder / MANIFEST) as lines:
        verify_lines(target, lines)
    if (folder / GRIDS).is_dir() and not _same(folder / GRIDS, target / GRIDS):
        raise StorageError(f"{target / GRIDS} holds other files")


def _same(one: Path, other: Path) -> bool:
    """Return whether two files, or two folders of files, are equal."""
    if one.is_dir() != other.is_dir():
        return False
    if not one.is_dir():
        return filecmp.cmp(one, other, shallow=False)
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])
