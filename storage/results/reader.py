"""Read, verify and copy published results of generation jobs."""

import errno
import filecmp
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.context import ShardFiles, StoredImage
from jobs.errors import StorageError
from jobs.failpoints import failpoint
from storage.results.formats import GRIDS, IMAGES, MANIFEST, MANIFESTS, RESULT, bytes_of, pixels_of
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
COPIES_PER_SYNC = 64
"""Archives that are synced together: a copy that is interrupted begins again behind them."""

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def read_manifest(
    folder: Path, manifest_sha256: str, *, wanted: Container[int] | None = None
) -> Iterator[StoredImage]:
    """
    Yield the images of a published result in order, reading one line at a time.

    Args:
        wanted: indices of the images; None: all.

    Raises:
        StorageError: the manifest differs from the registered one.
    """
    path = folder / MANIFEST
    try:
        if sha256_file(path) != manifest_sha256:
            raise StorageError(f"{path} has changed since it was published")
        for line in manifest_lines(folder, wanted=wanted):
            if "index" in line and (wanted is None or line["index"] in wanted):
                yield _made(folder, line)
    except OSError as exc:
        raise_storage_error(exc, path)


@dataclass(frozen=True)
class PublishedImages:
    """The images of a published result; each iteration reads the manifest as read_manifest() does."""

    folder: Path
    manifest_sha256: str

    def __iter__(self) -> Iterator[StoredImage]:
        return read_manifest(self.folder, self.manifest_sha256)


def manifest_lines(
    folder: Path, manifest: Path | None = None, *, wanted: Container[int] | None = None
) -> Iterator[dict[str, Any]]:
    """
    Yield the lines of a manifest: images with their index in the whole result, archives, and shards.

    The line of a shard is followed by the lines of its own manifest.

    Args:
        folder: of the result.
        manifest: of the result, if it is elsewhere.
        wanted: indices of the images; lines of shards about others may be left out.

    Raises:
        OSError
        StorageError: the manifest of a shard differs from what the line of the shard says.
    """
    with open(manifest or folder / MANIFEST, encoding="utf-8") as lines:
        for text in lines:
            line = json.loads(text)
            yield line
            if "shard" in line:
                yield from _shard_lines(folder, line, wanted)


def _shard_lines(
    folder: Path, shard: dict[str, Any], wanted: Container[int] | None
) -> Iterator[dict[str, Any]]:
    path = folder / shard["manifest"]
    if sha256_file(path) != shard["sha256"]:
        raise StorageError(f"{path} has changed since it was published")
    first, images = shard["first"], shard["images"]
    build = {"build": shard["build"]} if "build" in shard else {}
    with open(path, encoding="utf-8") as lines:
        for place, text in enumerate(lines):
            if place >= images:  # an archive
                yield json.loads(text)
            elif wanted is None or first + place in wanted:
                yield {**json.loads(text), **build, "index": first + place}


def count_images(folder: Path, manifest_sha256: str) -> int:
    """
    Return the number of images of a published result.

    Raises:
        StorageError: the manifest differs from the registered one.
    """
    path, count = folder / MANIFEST, 0
    try:
        if sha256_file(path) != manifest_sha256:
            raise StorageError(f"{path} has changed since it was published")
        with open(path, encoding="utf-8") as lines:
            for text in lines:
                line = json.loads(text)
                count += line["images"] if "shard" in line else "index" in line
    except OSError as exc:
        raise_storage_error(exc, path)
    return count


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
        for line in manifest_lines(folder):
            if "archive" in line:
                named[line["archive"]] = line["bytes"]
            elif "index" in line and "offset" not in line:
                named[line["file"]] = line["bytes"]
    except OSError as exc:
        if exc.errno in GONE:
            return False
        raise_storage_error(exc, folder)
    return _has_sizes(folder, named)


def are_there(shard: ShardFiles) -> bool:
    """
    Return whether the manifest and the archives of a shard exist, by their names and sizes.

    Raises:
        StorageError: the volume is not available.
    """
    named = {one["archive"]: one["bytes"] for one in shard.archives}
    return _has_sizes(shard.folder, {MANIFEST: shard.manifest_bytes, **named})


def _has_sizes(folder: Path, named: dict[str, int]) -> bool:
    try:
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
    count = count_images(folder, manifest_sha256)
    wanted = {place * count // most for place in range(most)} if count > most else None
    for made in read_manifest(folder, manifest_sha256, wanted=wanted):
        try:
            yield pixels_of(made)
        except (OSError, ValueError) as exc:
            raise StorageError(f"{made.path} is missing or broken: {exc}") from exc


def verify_lines(folder: Path, lines: Iterator[dict[str, Any]]) -> int:
    """
    Compare a result with its manifest: indices 0…N−1, hashes, and no other images.

    Memory does not grow with the number of images.

    Returns:
        The number of images.

    Raises:
        StorageError: the first difference.
    """
    count = 0
    named, archives = _Names(), _Names()
    for line in lines:
        if "shard" in line:  # its manifest was read from there
            archives.add(line["manifest"])
            continue
        if "archive" in line:
            _verify_archive(folder / line["archive"], line)
            archives.add(line["archive"])
            continue
        if line["index"] != count:
            raise StorageError(f"{folder / MANIFEST} does not hold the indices from 0 on: {count} is missing")
        made = _made(folder, line)
        if not made.path.is_file() or hashlib.sha256(bytes_of(made)).hexdigest() != line["sha256"]:
            raise StorageError(f"{made.path} is missing or has changed")
        if line["file"].startswith(f"{IMAGES}/"):
            named.add(line["file"])
        count += 1
    there, archives_there = _Names(), _Names()
    for path in _files_below(folder / IMAGES):
        there.add(path.relative_to(folder).as_posix())
    for path in _files_below(folder / MANIFESTS):
        archives_there.add(path.relative_to(folder).as_posix())
    for name in names_of_result(folder):
        if Path(name).suffix in (".tar", ".npz"):
            archives_there.add(name)
    if named.sum != there.sum or archives.sum != archives_there.sum:
        raise StorageError(f"{folder} holds images that the manifest does not name, or lacks some")
    return count


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield all entries of a folder and of the folders in it; none if it does not exist."""
    if not folder.is_dir():
        return
    for one in os.scandir(folder):
        if one.is_dir(follow_symlinks=False):
            yield from _files_below(Path(one.path))
        else:
            yield Path(one.path)


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
        images = [name for name in names if name != MANIFEST]
        batches = [images[at : at + COPIES_PER_SYNC] for at in range(0, len(images), COPIES_PER_SYNC)]
        for some in (*batches, [MANIFEST] if MANIFEST in names else []):
            if MANIFEST in some:
                _check_copy(folder, target)
            _copy_whole([(folder / name, target / name) for name in some], mark=_mark(folder))
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


def _copy_whole(copies: Sequence[tuple[Path, Path]], *, mark: str) -> None:
    """
    Copy files or folders of one folder that do not exist yet, so that each appears complete and durable.

    Args:
        copies: (source, target) of each.

    Raises:
        OSError: no temporary file remains.
    """
    temps = {
        target: target.with_name(f".{target.name}{TEMP_MARK}{mark}")
        for _, target in copies
        if not target.exists()
    }
    if not temps:
        return
    folder = next(iter(temps)).parent
    try:
        for source, target in copies:
            if target in temps:
                if source.is_dir():
                    shutil.copytree(source, temps[target], copy_function=_copy_file)
                else:
                    shutil.copy2(source, temps[target])
        sync_filesystem(folder)
        for target, temp in temps.items():
            if not target.exists():  # another attempt may have been faster
                temp.rename(target)
        fsync_folder(folder)
    except OSError:
        if not all(target.exists() for target in temps):
            raise
    finally:
        for temp in temps.values():
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
    verify_lines(target, manifest_lines(target, folder / MANIFEST))
    if (folder / GRIDS).is_dir() and not _same(folder / GRIDS, target / GRIDS):
        raise StorageError(f"{target / GRIDS} holds other files")


def _same(one: Path, other: Path) -> bool:
    """Return whether two files, or two folders of files, are equal."""
    if one.is_dir() != other.is_dir():
        return False
    if not one.is_dir():
        return filecmp.cmp(one, other, shallow=False)
    names = sorted(path.relative_to(one).as_posix() for path in _files_below(one))
    if names != sorted(path.relative_to(other).as_posix() for path in _files_below(other)):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])
