"""
Orphaned folders: a restored or new job table assigns ids again whose folders exist.

They are renamed (quarantined), and never read or deleted by any command: decision 12.
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

QUARANTINE_MARK = ".of-another-table-"


def recorded_spec(volume: Volume, job_id: int) -> dict[str, Any] | None:
    """Return the content of a job's spec.json; None if it is missing or cannot be read."""
    path = volume.job(job_id) / "spec.json"
    with suppress(OSError, ValueError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else None
    return None


def is_of(
    recorded: dict[str, Any], job_id: int, submitted_at: float, spec: Callable[[], dict[str, Any]]
) -> bool:
    """
    Return whether a spec.json belongs to a job of this table.

    Args:
        recorded: content of the file.
        spec: returns the job's spec; called only for files of 0.1, which lack the time of the submit.
    """
    if recorded.get("job") != job_id:
        return False
    if "submitted_at" in recorded:
        return bool(recorded["submitted_at"] == submitted_at)
    found = recorded.get("spec")
    return isinstance(found, dict) and renamed(found) == spec()


def quarantine_if_orphaned(
    volume: Volume, job_id: int, attempt: int, submitted_at: float, spec: dict[str, Any]
) -> Path | None:
    """
    Quarantine the folder of a job before an attempt starts, if the folder belongs to another table's job.

    Before the first attempt the job has no folder, so that a folder without spec.json is orphaned.

    Returns:
        The new path; None if nothing was renamed.

    Raises:
        VolumeError, StorageError: it cannot be renamed.
    """
    recorded = recorded_spec(volume, job_id)
    if recorded is None:
        mine = attempt > 1 or not volume.job(job_id).exists()
    else:
        mine = is_of(recorded, job_id, submitted_at, lambda: spec)
    return None if mine else quarantine(volume, job_id)


def quarantine(volume: Volume, job_id: int) -> Path:
    """
    Rename a job's folder without changing its contents.

    Raises:
        VolumeError, StorageError: it cannot be renamed.
    """
    folder = volume.job(job_id)
    aside = folder.with_name(f"{folder.name}{QUARANTINE_MARK}{secrets.token_hex(4)}")
    try:
        folder.rename(aside)
    except OSError as exc:
        raise_storage_error(exc, folder)
    return aside


def quarantined(volume: Volume) -> list[Path]:
    """Return the quarantined folders."""
    with suppress(OSError):
        return sorted(one for one in volume.jobs.iterdir() if QUARANTINE_MARK in one.name)
    return []
