"""
Files that are there whole or not at all, also after a power cut.

The order is always: temp file beside the target, write, flush, fsync, rename,
fsync the folder (for some names later, but before a row points there: sync_way()).
rename() alone gives readers a whole file but promises neither the data nor the name
after a power cut (PostgreSQL's durable_rename, 606e0f98). After a failed fsync the
temp file is thrown away and never synced again: the kernel reports a lost page once
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

from jobs.errors import CheckpointCorruptError, DiskFullError, StorageError, VolumeError
from jobs.failpoints import failpoint

MANIFEST = "MANIFEST.json"
TEMP_MARK = ".tmp-"
BROKEN_FILE = (errno.EIO, errno.ESTALE)
"""The file is lost, the disk perhaps not: a new file may succeed where this one never will again."""
LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)
"""What is said of the files, not of the volume that holds them: it is the same after any wait."""

NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that makes no hard links."""

T = TypeVar("T")
fsync = os.fsync


def raise_storage_error(exc: OSError, path: Path, *, needed: int | None = None) -> NoReturn:
    """
    Turn an OSError on the volume into the error that says what to do about it.

    Args:
        needed: bytes that were to be written, where that is known.
    """
    # os.path.isdir(), because Path.is_dir() itself raises where the folder above may not be entered.
    folder = path if os.path.isdir(path) else path.parent
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise _disk_full(folder, needed) from exc
    if exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        raise VolumeError(
            f"cannot write at {folder}: {os.strerror(exc.errno or 0).lower()}",
            hint="make it writable for this user, or point GANQ_VOLUME at another place",
        ) from exc
    error = StorageError if exc.errno in LASTING else VolumeError
    raise error(f"{folder}: {(exc.strerror or str(exc)).lower()}", hint="see ganq doctor") from exc


def _disk_full(folder: Path, needed: int | None) -> DiskFullError:
    free = free_bytes(folder)
    sizes = [] if needed is None else [f"needed: {_in_words(needed)}"]
    sizes.append(f"free: {'unknown' if free is None else _in_words(free)}")
    return DiskFullError(
        f"no room left at {folder} ({', '.join(sizes)})",
        hint="make room (ganq gc --dry-run shows what can go), or point GANQ_VOLUME at a larger disk; "
        "the job goes on by itself",
        needed=needed,
        free=free,
    )


def _in_words(size: int) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size} bytes"


def free_bytes(folder: Path) -> int | None:
    """Bytes that this user may still write at a folder; None where the file system does not say."""
    try:
        about = os.statvfs(folder)
    except OSError:
        return None
    if about.f_blocks == 0:
        return None
    blocks = about.f_bfree if os.geteuid() == 0 else about.f_bavail  # some are kept back for root
    return blocks * about.f_frsize


def require_room(folder: Path, needed: int) -> None:
    """
    Refuse to begin what would fill the disk and fail: others write there, too.

    Raises:
        DiskFullError: with the bytes needed and free.
    """
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise _disk_full(folder, needed)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable; a file's own fsync does not do that."""
    _fsync_path(folder)


def _fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def _rename(temp: Path, target: Path) -> None:
    """
    rename(2), whose failure means little on NFS: the server may have done it and its answer was lost.

    The temp name is nobody else's. If it is gone and the target is there, it was renamed.
    """
    try:
        os.rename(temp, target)
    except OSError:
        if os.path.lexists(temp) or not os.path.lexists(target):
            raise


def _once_more_if_broken(work: Callable[[], T]) -> T:
    """Run `work`, which begins with a file of its own, and again if that file broke (BROKEN_FILE)."""
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
    Open a file that appears at `path`, whole and synced, when the block ends well.

    Args:
        needed: bytes that will be written, to tell of them where there is no room.
        named: make its name durable, too. Without, a power cut leaves the whole file or none; see sync_way().

    Raises:
        DiskFullError, VolumeError, StorageError: the old file, if any, is untouched.
    """
    temp = path.with_name(f"{path.name}{TEMP_MARK}{secrets.token_hex(4)}")
    try:
        with open(temp, "xb") as file:
            yield file
            file.flush()
            fsync(file.fileno())
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
    """Write a whole file durably, with a second file if the first broke; returns its sha-256 in hex."""

    def write() -> None:
        with durable_file(path, needed=len(data), named=named) as file:
            file.write(data)

    _once_more_if_broken(write)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any, *, named: bool = True) -> str:
    """Write JSON durably (`named`: see durable_file()); returns the file's sha-256 in hex."""
    return write_bytes(path, _as_json(value), named=named)


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def make_folder(folder: Path, *, named: bool = True) -> None:
    """
    Create a folder with its parents.

    Args:
        named: make each new name durable. Without, sync_way() does it later.
    """
    missing = []
    here = folder
    while not os.path.isdir(here) and here != here.parent:
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


def sync_way(folder: Path, top: Path) -> None:
    """
    Make the names on the way from `top` down to a folder durable, whoever made them.

    Before something in it is registered: a folder that is there may be the work of a process that
    was killed before it synced the name.
    """
    if top not in folder.parents:
        raise ValueError(f"{top} is not above {folder}")
    for here in folder.parents:
        try:
            fsync_folder(here)
        except OSError as exc:
            raise_storage_error(exc, here)
        if here == top:
            break


def sha256_file(path: Path) -> str:
    """sha-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(
    target: Path, writers: Mapping[str, Callable[[Path], None]], *, needed: int | None = None
) -> tuple[str, int]:
    """
    Write several files as one folder that appears whole, with MANIFEST.json last.

    Args:
        target: the folder; must not exist yet.
        writers: file name → function that writes that path; called again, with another
            path, if the first file broke.
        needed: bytes in all, about; nothing is begun if there is no room for them.

    Returns:
        (sha-256 of MANIFEST.json in hex, bytes in all). The manifest holds the
        sha-256 of every file, so its own value stands for the whole folder.

    Raises:
        DiskFullError, VolumeError, StorageError: nothing is left behind.
    """
    make_folder(target.parent)
    if needed is not None:
        require_room(target.parent, needed)
    return _once_more_if_broken(lambda: _write_folder(target, writers, needed))


def _write_folder(
    target: Path, writers: Mapping[str, Callable[[Path], None]], needed: int | None
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
        # Syncs the folder's names, too. Once: a folder whose sync failed may lie when it is asked
        # again, as a file may, so that a second try begins with a folder of its own.
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
    The bytes of one file of a folder, checked against the manifest's sha-256 in the table.

    The bytes that were hashed are the bytes that are returned: nothing is read twice.

    Raises:
        CheckpointCorruptError: missing, torn, or changed since it was registered.
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
    except OSError as exc:
        raise corrupt((exc.strerror or str(exc)).lower()) from exc
    if hashlib.sha256(data).hexdigest() != listed[name]:
        raise corrupt(f"{name} has changed since it was written")
    return data


def _read(path: Path) -> bytes:
    """A file's bytes; opened once more if an NFS server has forgotten the first handle."""
    try:
        return path.read_bytes()
    except OSError as exc:
        if exc.errno != errno.ESTALE:
            raise
    return path.read_bytes()


def sync_filesystem(folder: Path) -> None:
    """
    Make everything that was written below a folder durable, names included.

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
