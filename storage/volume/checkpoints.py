"""
Checkpoint folders: their files, and how they are written and read.

    state.safetensors      what resuming needs
    generator.safetensors  what generation needs: EMA generator and discriminator
    state.json             facts that rebuild the networks and counters
    MANIFEST.json          SHA-256 of each file; its own SHA-256 is stored in the job table
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from jobs.context import Snapshot
from jobs.errors import CheckpointCorruptError
from storage.volume.durable import (
    MANIFEST,
    TEMP_MARK,
    fsync_folder,
    link_or_copy,
    make_folder,
    raise_storage_error,
    read_verified,
    sha256_file,
    sync_filesystem,
    write_folder,
)
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST_ROOM = 64 * 1024
"""Upper limit of the bytes of state.json and MANIFEST.json."""

STATE, GENERATOR, FACTS = "state.safetensors", "generator.safetensors", "state.json"


class Pointer(Protocol):
    """The columns of a checkpoint that reading it needs."""

    @property
    def job_id(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def manifest_sha256(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def step(self) -> int: ...


def write_checkpoint(
    target: Path,
    *,
    generator: "Mapping[str, Tensor]",
    meta: Mapping[str, Any],
    state: "Mapping[str, Tensor] | None" = None,
    inside: Path | None = None,
) -> tuple[str, int]:
    """
    Write a checkpoint folder atomically and durably.

    Args:
        inside: as for make_folder().

    Returns:
        (SHA-256 of its manifest, bytes).

    Raises:
        DiskFullError, VolumeError, StorageError: no file remains.
    """

    def facts(path: Path) -> None:
        path.write_text(json.dumps(dict(meta), indent=1, sort_keys=True), encoding="utf-8")

    files = {
        GENERATOR: lambda path: _save(generator, path),
        FACTS: facts,
    }
    if state is not None:
        whole = state
        files = {STATE: lambda path: _save(whole, path), **files}
    needed = sum(one.nbytes for part in (generator, state or {}) for one in part.values())
    return write_folder(target, files, inside=inside, needed=needed + MANIFEST_ROOM)


def _save(tensors: "Mapping[str, Tensor]", path: Path) -> None:
    """
    Save tensors to a file.

    Raises:
        OSError: also for the operating system's errors that safetensors (written in Rust) raises as its own
            class, so that a full disk is not taken for an internal error.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()  # the umask decides who may read it; safetensors alone makes files for their owner only
    mode = path.stat().st_mode
    try:
        # safetensors accepts contiguous memory only; a training can have another layout.
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        path.chmod(mode & 0o777)
    except SafetensorError as exc:
        said = re.search(r"\(os error (\d+)\)", str(exc))
        if said is None:
            raise
        raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from exc


@dataclass(frozen=True)
class Unregistered:
    """A complete checkpoint on the volume that is not in the job table."""

    folder: Path
    manifest_sha256: str
    bytes: int
    facts: dict[str, Any]
    written_at: float


def find_unregistered(volume: Volume, job_id: int, known: Collection[str]) -> list[Unregistered]:
    """
    Find the complete checkpoints of a job that are not in the job table, in the order of writing.

    Args:
        known: paths of those in the job table, relative to the volume.
    """
    found = []
    for manifest in volume.job(job_id).glob(f"a*/checkpoints/*/{MANIFEST}"):
        folder = manifest.parent
        if TEMP_MARK in folder.name or volume.relative(folder) in known:
            continue
        with suppress(OSError, ValueError, KeyError, TypeError, CheckpointCorruptError):
            listed = manifest.read_bytes()
            digest = hashlib.sha256(listed).hexdigest()
            entries = json.loads(listed)["files"]
            if any(sha256_file(folder / one["name"]) != one["sha256"] for one in entries):
                continue
            facts = json.loads(read_verified(folder, FACTS, digest))
            size = sum(one["bytes"] for one in entries)
            found.append(Unregistered(folder, digest, size, facts, manifest.stat().st_mtime))
    return sorted(found, key=lambda one: one.written_at)


def adopt_checkpoint(one: Unregistered, target: Path, *, inside: Path) -> None:
    """
    Copy an unregistered checkpoint atomically and durably into the folder of another attempt.

    Args:
        inside: that folder; as for make_folder().

    Raises:
        DiskFullError, VolumeError, StorageError: no file remains.
    """
    temp = target.with_name(f"{target.name}{TEMP_MARK}{secrets.token_hex(4)}")
    make_folder(target.parent, inside=inside)
    try:
        shutil.copytree(one.folder, temp, copy_function=link_or_copy)
        sync_filesystem(temp)
        temp.rename(target)
        fsync_folder(target.parent)
    except OSError as exc:
        shutil.rmtree(temp, ignore_errors=True)
        raise_storage_error(exc, target, needed=one.bytes)


def read_checkpoint(volume: Volume, one: Pointer, part: Literal["state", "generator"]) -> Snapshot:
    """
    Read and verify one part of a checkpoint.

    Raises:
        CheckpointCorruptError: it is missing, incomplete or changed.
    """
    from safetensors.torch import load

    folder = volume.absolute(one.path)
    data = read_verified(folder, STATE if part == "state" else GENERATOR, one.manifest_sha256)
    meta = json.loads(read_verified(folder, FACTS, one.manifest_sha256))
    return Snapshot(
        step=one.step,
        epoch=one.epoch,
        tensors=load(data),
        meta=meta,
        sha256=one.manifest_sha256,
        job_id=one.job_id,
    )
