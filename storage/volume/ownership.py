"""
Folders that another job table has left: one that was restored, or made anew, gives out the same ids again.

Nothing of them is touched or read as this table's; they are set aside under a name of their own, where a
person finds them, and no command deletes them.
"""

import json
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.renamed import renamed
from storage.volume.durable import raise_storage_error
from storage.volume.layout import Volume

ASIDE = ".of-another-table-"


def recorded_spec(volume: Volume, job_id: int) -> dict[str, Any] | None:
    """What an attempt has written of its job into spec.json; None if there is none that can be read."""
    path = volume.job(job_id) / "spec.json"
    with suppress(OSError, ValueError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        said = json.loads(path.read_text())
        return said if isinstance(said, dict) else None
    return None


def is_of(said: dict[str, Any], job_id: int, submitted_at: float, spec: Callable[[], dict[str, Any]]) -> bool:
    """
    Whether a spec.json is that of a job of this table.

    Args:
        said: what stands in it.
        spec: gives the job's own; asked only for a file of 0.1, which does not say when it was submitted.
    """
    if said.get("job") != job_id:
        return False
    if "submitted_at" in said:
        return bool(said["submitted_at"] == submitted_at)
    spec_there = said.get("spec")
    return isinstance(spec_there, dict) and renamed(spec_there) == spec()


def quarantine_if_orphaned(
    volume: Volume, job_id: int, attempt: int, submitted_at: float, spec: dict[str, Any]
) -> Path | None:
    """
    Before an attempt begins: make way for it, if the folder of its job is another job's.

    Before the first one there is no folder of this job, so one that does not say whose it is is another's.

    Returns:
        Where that lies now.

    Raises:
        VolumeError, StorageError: it cannot be renamed.
    """
    said = recorded_spec(volume, job_id)
    if said is None:
        mine = attempt > 1 or not volume.job(job_id).exists()
    else:
        mine = is_of(said, job_id, submitted_at, lambda: spec)
    return None if mine else quarantine(volume, job_id)


def quarantine(volume: Volume, job_id: int) -> Path:
    """
    Rename a job's folder. Whatever lies in it stays as it is.

    Raises:
        VolumeError, StorageError: it cannot be renamed.
    """
    folder = volume.job(job_id)
    aside = folder.with_name(f"{folder.name}{ASIDE}{secrets.token_hex(4)}")
    try:
        folder.rename(aside)
    except OSError as exc:
        raise_storage_error(exc, folder)
    return aside


def aside(volume: Volume) -> list[Path]:
    """The folders that have been set aside so far."""
    with suppress(OSError):
        return sorted(one for one in volume.jobs.iterdir() if ASIDE in one.name)
    return []
