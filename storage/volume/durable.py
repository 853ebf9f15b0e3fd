"""
Durable writes: after a power cut a file is complete or does not exist.

The order is always: temporary file beside the target, write, flush, fsync, rename, fsync the folder (for
some names later, but before a row points there: sync_parents()). rename() alone gives readers a complete
file, but neither data nor name are durable (PostgreSQL's durable_rename, 606e0f98). After a failed fsync
the temporary file is deleted and never synced again, because the kernel reports a lost page only once
(fsync(2), Linux ≥ 4.13).
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from jobs.errors import CheckpointCorruptError, DirectoryFullError, DiskFullError, StorageError, VolumeError
from jobs.failpoints import failpoint
from storage.volume.permissions import SHARE_HINT, denied

MANIFEST = "MANIFEST.json"
TEMP_MARK = ".tmp-"
BROKEN_FILE = (errno.EIO, errno.ESTALE)
"""Errors that concern one file: a new file may succeed."""
PERMANENT = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)
"""Errors that concern files, not their volume: waiting does not help."""

FULL_FOLDER = (errno.ENOSPC, errno.EMLINK)
"""Errors of a folder that can hold no more entries."""
ROOM_FOR_NAMES = 1 << 20
"""Free bytes with which a disk has space for names."""
NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system without hard links."""

T = TypeVar("T")


def raise_storage_error(exc: OSError, path: Path, *, needed: int | None = None) -> NoReturn:
    """
    Raise the StorageError for an OSError on the volume.

    Args:
        needed: bytes that were to be written, if known.
    """
    # os.path.isdir(), because Path.is_dir() itself raises if the parent folder may not be entered.
    folder = path if os.path.isdir(path) else path.parent
    raise_if_folder_full(exc, folder)
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise _disk_full(folder, needed) from exc
    if exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        hint = "mount it for writing" if exc.errno == errno.EROFS else SHARE_HINT
        raise VolumeError(
            f"cannot write at {folder}: {os.strerror(exc.errno or 0).lower()}",
            hint=f"{hint}; or point GANQ_VOLUME at another place",
        ) from exc
    if exc.errno == errno.ENOENT and not os.path.isdir(folder):
        raise gone(folder) from exc
    error = StorageError if exc.errno in PERMANENT else VolumeError
    raise error(f"{folder}: {(exc.strerror or str(exc)).lower()}", hint="see ganq doctor") from exc


def raise_if_folder_full(exc: OSError, folder: Path) -> None:
    """
    Raise the error for a folder that can hold no more entries, if that is the reason for an OSError.

    ext4 reports such a folder as a full disk (ENOSPC), other file systems as EMLINK. It is full if the volume
    has space, the name that failed fails again, and another can be created in the parent folder. (In an index
    of ext4 that is full, other names may still fit.)

    Args:
        folder: where to look if the error names no path.

    Raises:
        DirectoryFullError
    """
    if exc.errno not in FULL_FOLDER or _lacks_inodes(folder):
        return
    if exc.errno == errno.ENOSPC and (free_bytes(folder) or 0) < ROOM_FOR_NAMES:
        return
    name = exc.filename2 or exc.filename
    failed = Path(name) if isinstance(name, str) and os.path.isabs(name) else _unused_name(folder)
    folder = failed.parent
    refused = _create(failed, exc.errno) in FULL_FOLDER
    if refused and _create(_unused_name(folder.parent), exc.errno) == 0:
        raise DirectoryFullError(
            f"the folder {folder} is full: its file system allows no further entries in it",
            hint="write images as archives (--format tar), delete old jobs (ganq gc), or let an ext4 have "
            "larger folders: tune2fs -O large_dir DEVICE",
        ) from exc


def _unused_name(folder: Path) -> Path:
    return folder / f"{TEMP_MARK}{secrets.token_hex(4)}"


def _create(path: Path, failed: int) -> int:
    """Create and delete a file, or a folder where that failed (EMLINK); return the errno, or 0."""
    try:
        if failed == errno.EMLINK:
            path.mkdir()
            path.rmdir()
        else:
            path.open("xb").close()
            path.unlink()
    except OSError as exc:
        return exc.errno or errno.EIO
    return 0


def gone(folder: Path) -> VolumeError:
    """Return the error for a folder of a volume that was there before, as when the volume is unmounted."""
    return VolumeError(f"{folder} no longer exists", hint="is the volume still mounted there?")


def _disk_full(folder: Path, needed: int | None) -> DiskFullError:
    free = free_bytes(folder)
    sizes = [] if needed is None else [f"needed: {_in_words(needed)}"]
    sizes.append(f"free: {'unknown' if free is None else _in_words(free)}")
    if _lacks_inodes(folder):
        sizes.append("free inodes: 0, so that no further file can be created")
    return DiskFullError(
        f"no room left at {folder} ({', '.join(sizes)})",
        hint="make room (ganq gc --dry-run), or point GANQ_VOLUME at a larger disk; "
        "the job then continues, an upload when you repeat it",
        needed=needed,
        free=free,
    )


def _lacks_inodes(folder: Path) -> bool:
    with suppress(OSError):
        about = os.statvfs(folder)
        return about.f_files > 0 and about.f_favail == 0
    return False


def _in_words(size: int) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size} bytes"


def free_bytes(folder: Path) -> int | None:
    """Return the bytes that this user may write at a folder; None if the file system does not report them."""
    try:
        about = os.statvfs(folder)
    except OSError:
        return None
    if about.f_blocks == 0:
        return None
    blocks = about.f_bfree if os.geteuid() == 0 else about.f_bavail  # some are reserved for root
    return blocks * about.f_frsize


def require_room(folder: Path, needed: int) -> None:
    """
    Check that there is space for `needed` bytes.

    Raises:
        DiskFullError: with the bytes needed and free.
    """
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise _disk_full(folder, needed)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Create a hard link, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError as exc:
        if exc.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable; fsync of a file does not."""
    _fsync_path(folder)


def _fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename(temp: Path, target: Path) -> None:
    """
    Call rename(2), and ignore an error if the file was renamed all the same.

    On NFS the answer of the server may be lost. Temporary names are unique: if the temporary file is
    missing and the target exists, it was renamed.
    """
    try:
        os.rename(temp, target)
    except OSError:
        if os.path.lexists(temp) or not os.path.lexists(target):
            raise


def _retry_if_broken(work: Callable[[], T]) -> T:
    """Run `work`, which starts with a new file; run it again if that file broke (BROKEN_FILE)."""
    try:
        return work()
    except StorageError as exc:
        cause = exc.__cause__
        if not isinstance(cause, OSError) or cause.errno not in BROKEN_FILE:
            raise
    return work()


@contextmanager
def durable_file(path: Path, *, needed: int | None = None, named: bool = True) -> Iterator[IO[bytes]]:
    """
    Open a file that appears at `path`, complete and synced, when the block succeeds.

    Args:
        needed: bytes that will be written, for the message of a full disk.
        named: make its name durable, too. Without, a power cut leaves the complete file or none; see
            sync_parents().

    Raises:
        DiskFullError, VolumeError, StorageError: an existing file is unchanged.
    """
    temp = path.with_name(f"{path.name}{TEMP_MARK}{secrets.token_hex(4)}")
    try:
        with open(temp, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        failpoint("file.synced")
        failpoint(f"file.synced.{path.name}")
        _rename(temp, path)
        failpoint("file.renamed")
        failpoint(f"file.renamed.{path.name}")
        if named:
            fsync_folder(path.parent)
    except OSError as exc:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise_storage_error(exc, path, needed=needed)
    except BaseException:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes, *, named: bool = True) -> str:
    """Write a file durably, a second time if the first file broke; return its SHA-256 in hex."""

    def write() -> None:
        with durable_file(path, needed=len(data), named=named) as file:
            file.write(data)

    _retry_if_broken(write)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any, *, named: bool = True) -> str:
    """Write JSON durably (`named`: see durable_file()); return the SHA-256 of the file in hex."""
    return write_bytes(path, _as_json(value), named=named)


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def make_folder(folder: Path, *, inside: Path | None = None, named: bool = True) -> None:
    """
    Create a folder with its parents.

    Args:
        inside: a parent that must exist. Created again after its volume was unmounted, it would be on the
            disk below the mount point, and hidden once the volume is back.
        named: make each new name durable. Without, sync_parents() does it later.

    Raises:
        VolumeError: `inside` is gone.
        DiskFullError, VolumeError, StorageError: it cannot be created.
    """
    missing = []
    here = folder
    while not os.path.isdir(here) and here != here.parent:
        if here == inside:
            raise gone(inside)
        missing.append(here)
        here = here.parent
    try:
        for new in reversed(missing):
            with suppress(FileExistsError):
                new.mkdir()
            if named:
                fsync_folder(new.parent)
    except OSError as exc:
        raise_storage_error(exc, folder)


def sync_parents(folder: Path, top: Path) -> None:
    """
    Make the names of a folder and of its parents up to `top` durable.

    Called before something in the folder is registered: it may have been created by a process that was killed
    before it synced the name.
    """
    if top not in folder.parents:
        raise ValueError(f"{top} is not above {folder}")
    for here in folder.parents:
        try:
            fsync_folder(here)
        except FileNotFoundError as exc:
            raise gone(here) from exc
        except OSError as exc:
            raise_storage_error(exc, here)
        if here == top:
            break


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(
    target: Path,
    writers: Mapping[str, Callable[[Path], object]],
    *,
    inside: Path | None = None,
    needed: int | None = None,
) -> tuple[str, int]:
    """
    Write several files as one folder that appears complete, with MANIFEST.json last.

    Args:
        target: the folder; must not exist. Its parents are created.
        writers: file name → function that writes that path; called again with another path if the first
            file broke.
        inside: as for make_folder().
        needed: approximate total of bytes; nothing is written if there is no space for them.

    Returns:
        (SHA-256 of MANIFEST.json in hex, total of bytes). The manifest contains the SHA-256 of each file.

    Raises:
        DiskFullError, VolumeError, StorageError: no file remains.
    """
    make_folder(target.parent, inside=inside)
    if needed is not None:
        require_room(target.parent, needed)
    return _retry_if_broken(lambda: _write_folder(target, writers, needed))


def _write_folder(
    target: Path, writers: Mapping[str, Callable[[Path], object]], needed: int | None
) -> tuple[str, int]:
    temp = target.with_name(f"{target.name}{TEMP_MARK}{secrets.token_hex(4)}")
    try:
        temp.mkdir()
        failpoint("folder.begun")
        entries = []
        total = 0
        for name, write in writers.items():
            path = temp / name
            write(path)
            failpoint("folder.file_written")
            _fsync_path(path)
            size = path.stat().st_size
            total += size
            entries.append({"name": name, "bytes": size, "sha256": sha256_file(path)})
        manifest = _as_json({"files": entries})
        # This syncs the folder's names, too. A folder whose sync failed may report success the next time, as
        # a file may, so that a second try starts with a new folder.
        with durable_file(temp / MANIFEST, needed=needed) as file:
            file.write(manifest)
        failpoint("folder.written")
        _rename(temp, target)
        failpoint("folder.renamed")
        fsync_folder(target.parent)
    except OSError as exc:
        shutil.rmtree(temp, ignore_errors=True)
        raise_storage_error(exc, target, needed=needed)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    return hashlib.sha256(manifest).hexdigest(), total


def read_verified(folder: Path, name: str, manifest_sha256: str) -> bytes:
    """
    Return the bytes of one file of a folder, after checking the SHA-256 of file and manifest.

    Raises:
        CheckpointCorruptError: it is missing, incomplete, or changed since it was registered.
        StorageError: this account may not read it.
    """

    def corrupt(what: str) -> CheckpointCorruptError:
        job = re.search(r"jobs/0*(\d+)/", folder.as_posix())
        return CheckpointCorruptError(
            f"{f'job {job[1]}, ' if job else ''}{folder.name}: {what}",
            hint=f"an older one may be whole: ganq checkpoints {job[1] if job else 'JOB'}",
            folder=folder,
        )

    try:
        manifest = _read(folder / MANIFEST)
        if hashlib.sha256(manifest).hexdigest() != manifest_sha256:
            raise corrupt("its manifest is not the one that was registered")
        listed = {entry["name"]: entry["sha256"] for entry in json.loads(manifest)["files"]}
        if name not in listed:
            raise corrupt(f"its manifest does not list {name}")
        data = _read(folder / name)
    except PermissionError as exc:
        raise StorageError(denied(folder / name), hint=SHARE_HINT) from exc
    except OSError as exc:
        raise corrupt((exc.strerror or str(exc)).lower()) from exc
    if hashlib.sha256(data).hexdigest() != listed[name]:
        raise corrupt(f"{name} has changed since it was written")
    return data


def _read(path: Path) -> bytes:
    """Return a file's bytes; open it again if an NFS server has forgotten the first handle."""
    try:
        return path.read_bytes()
    except OSError as exc:
        if exc.errno != errno.ESTALE:
            raise
    return path.read_bytes()


def sync_filesystem(folder: Path) -> None:
    """
    Make all files of a folder's file system durable, including names.

    syncfs(2) reports lost pages since Linux 5.8.

    Raises:
        OSError: the disk is full or broken.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(folder))
    finally:
        os.close(fd)
