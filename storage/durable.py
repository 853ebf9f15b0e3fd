"""
Files that are there whole or not at all, also after a power cut.

The order is always: temp file beside the target, write, flush, fsync, rename,
fsync the folder. rename() alone gives readers a whole file but promises neither
the data nor the name after a power cut (PostgreSQL's durable_rename, 606e0f98).
After a failed fsync the temp file is thrown away and never synced again: the
kernel reports a lost page once (fsync(2), Linux ≥ 4.13).
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from jobs.errors import CheckpointCorruptError, DiskFullError, StorageError, VolumeError
from jobs.failpoints import failpoint, guard

MANIFEST = "MANIFEST.json"
TEMP_MARK = ".tmp-"


def raise_storage_error(exc: OSError, path: Path) -> NoReturn:
    """Turn an OSError on the volume into the error that says what to do about it."""
    # os.path.isdir(), because Path.is_dir() itself raises where the folder above may not be entered.
    folder = path if os.path.isdir(path) else path.parent
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = "unknown"
        with suppress(OSError):
            free = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB"
        raise DiskFullError(
            f"no room left at {folder} (free: {free})",
            hint="make room, or point GANQ_VOLUME at a larger disk; the job goes on by itself",
        ) from exc
    if exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        raise VolumeError(
            f"cannot write at {folder}: {os.strerror(exc.errno or 0).lower()}",
            hint="make it writable for this user, or point GANQ_VOLUME at another place",
        ) from exc
    raise StorageError(f"{folder}: {(exc.strerror or str(exc)).lower()}", hint="see ganq doctor") from exc


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable; a file's own fsync does not do that."""
    if not guard("fsync"):
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_path(path: Path) -> None:
    if not guard("fsync"):
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def durable_file(path: Path) -> Iterator[IO[bytes]]:
    """
    Open a file that appears at `path`, whole and synced, when the block ends well.

    Raises:
        DiskFullError, VolumeError, StorageError: the old file, if any, is untouched.
    """
    temp = path.with_name(f"{path.name}{TEMP_MARK}{secrets.token_hex(4)}")
    try:
        with open(temp, "xb") as file:
            yield file
            file.flush()
            if guard("fsync"):
                os.fsync(file.fileno())
        failpoint("file.synced")
        os.rename(temp, path)
        failpoint("file.renamed")
        fsync_folder(path.parent)
    except OSError as exc:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise_storage_error(exc, path)
    except BaseException:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> str:
    """Write a whole file durably; returns its sha-256 in hex."""
    with durable_file(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any) -> str:
    """Write JSON durably; returns the file's sha-256 in hex."""
    return write_bytes(path, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")


def make_folder(folder: Path) -> None:
    """Create a folder with its parents, each name durable."""
    missing = []
    here = folder
    while not os.path.isdir(here) and here != here.parent:
        missing.append(here)
        here = here.parent
    try:
        for new in reversed(missing):
            with suppress(FileExistsError):
                new.mkdir()
            fsync_folder(new.parent)
    except OSError as exc:
        raise_storage_error(exc, folder)


def sha256_file(path: Path) -> str:
    """sha-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(target: Path, writers: Mapping[str, Callable[[Path], None]]) -> tuple[str, int]:
    """
    Write several files as one folder that appears whole, with MANIFEST.json last.

    Args:
        target: the folder; must not exist yet.
        writers: file name → function that writes that path.

    Returns:
        (sha-256 of MANIFEST.json in hex, bytes in all). The manifest holds the
        sha-256 of every file, so its own value stands for the whole folder.

    Raises:
        DiskFullError, VolumeError, StorageError: nothing is left behind.
    """
    make_folder(target.parent)
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
        digest = write_json(temp / MANIFEST, {"files": entries})  # syncs the folder's names, too
        failpoint("folder.written")
        os.rename(temp, target)
        failpoint("folder.renamed")
        fsync_folder(target.parent)
    except OSError as exc:
        shutil.rmtree(temp, ignore_errors=True)
        raise_storage_error(exc, target)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    return digest, total


def read_verified(folder: Path, name: str, manifest_sha256: str) -> bytes:
    """
    The bytes of one file of a folder, checked against the manifest's sha-256 in the table.

    The bytes that were hashed are the bytes that are returned: nothing is read twice.

    Raises:
        CheckpointCorruptError: missing, torn, or changed since it was registered.
    """

    def corrupt(what: str) -> CheckpointCorruptError:
        return CheckpointCorruptError(
            f"{folder.name}: {what}",
            hint="an older checkpoint may be whole: ganq checkpoints JOB",
            folder=folder,
        )

    try:
        manifest = (folder / MANIFEST).read_bytes()
        if hashlib.sha256(manifest).hexdigest() != manifest_sha256:
            raise corrupt("its manifest is not the one that was registered")
        listed = {entry["name"]: entry["sha256"] for entry in json.loads(manifest)["files"]}
        if name not in listed:
            raise corrupt(f"its manifest does not list {name}")
        data = (folder / name).read_bytes()
    except OSError as exc:
        raise corrupt((exc.strerror or str(exc)).lower()) from exc
    if hashlib.sha256(data).hexdigest() != listed[name]:
        raise corrupt(f"{name} has changed since it was written")
    return data
