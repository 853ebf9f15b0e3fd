"""
Uploaded files and data sets (web/api/uploads.py) that nothing needs any longer.

A data set is a folder of hard links to blobs. It is read under its own path, so that no job can be given it
again once the folder is gone. A blob without a link belongs to an upload that was never completed.
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Connection, String, cast, select

from storage.db.tables import job, utcnow
from storage.gc.policy import TRASHED, Policy, Reason
from storage.gc.scan import entries, is_folder, measure
from storage.volume.layout import Volume

DATASET = re.compile(r"[0-9a-f]{32}")
UNFINISHED_SET = re.compile(r"\.[0-9a-f]{32}-[0-9a-f]{8}")
BLOB = re.compile(r"[0-9a-f]{64}")
UNFINISHED_BLOB = re.compile(r"[0-9a-f]{64}\.part|\.[0-9a-f]{64}-[0-9a-f]{8}")
BLOBS = "uploads/blobs/"
NAMED = re.compile(r"uploads/datasets/([0-9a-f]{32})")

Deletion = tuple[str, Reason, int | None]


def unneeded(volume: Volume, readers: Collection[str], now: float, policy: Policy) -> Iterator[Deletion]:
    """
    Yield what may be deleted below uploads/.

    Args:
        readers: ids of the data sets that jobs need; see needed_sets().
        now: time of the volume's clock.
    """
    for entry in entries(volume.uploads / "datasets"):
        path = Path(entry.path)
        with suppress(OSError):
            if TRASHED.fullmatch(entry.name):
                yield volume.relative(path), Reason.TRASH, None
            elif UNFINISHED_SET.fullmatch(entry.name):
                if now - measure(path)[1] >= policy.temp_s:
                    yield volume.relative(path), Reason.UNFINISHED, None
            elif (
                DATASET.fullmatch(entry.name)
                and is_folder(entry)
                and entry.name not in readers
                and policy.datasets_s is not None
                and now - entry.stat().st_mtime >= policy.datasets_s
            ):
                yield volume.relative(path), Reason.UPLOAD, None
    for shelf in entries(volume.uploads / "blobs"):
        for entry in entries(Path(shelf.path)):
            with suppress(OSError):
                about = entry.stat(follow_symlinks=False)
                old = now - about.st_mtime >= policy.uploads_s
                if TRASHED.fullmatch(entry.name):
                    yield volume.relative(Path(entry.path)), Reason.TRASH, None
                elif old and (
                    UNFINISHED_BLOB.fullmatch(entry.name)
                    or (BLOB.fullmatch(entry.name) and about.st_nlink == 1)
                ):
                    yield volume.relative(Path(entry.path)), Reason.UNFINISHED, None


def needed_sets(conn: Connection, age_s: float) -> set[str]:
    """
    Return the ids of the uploaded data sets of jobs that have not ended, or are kept.

    Args:
        age_s: also of jobs that ended within this time.
    """
    ended = (utcnow() - job.c.finished_at).label("ended_age_s")
    query = select(job.c.spec, job.c.kept, ended).where(cast(job.c.spec, String).like("%uploads/datasets/%"))
    found: set[str] = set()
    for row in conn.execute(query):
        if row.kept or row.ended_age_s is None or row.ended_age_s < age_s:
            for value in row.spec.values():
                found.update(NAMED.findall(value) if isinstance(value, str) else ())
    return found


def bytes_of(folder: Path) -> int:
    """Return the bytes that deleting a data set and the blobs of it alone frees."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            about = os.lstat(Path(parent) / name)
            size += about.st_size if about.st_nlink <= 2 else 0
    return size


def files_of(folder: int, name: str) -> set[int]:
    """Return the inodes of the files of a data set."""
    found: set[int] = set()
    for _, _, names, inside in os.fwalk(name, dir_fd=folder):
        found.update(os.stat(one, dir_fd=inside, follow_symlinks=False).st_ino for one in names)
    return found


def delete_blobs(volume: Volume, inodes: Collection[int]) -> None:
    """
    Delete the blobs of a deleted data set that no other one links to.

    A data set that links to one of them at this moment has the file by its own name.
    """
    for shelf in entries(volume.uploads / "blobs"):
        for entry in entries(Path(shelf.path)):
            with suppress(OSError):
                if entry.inode() in inodes and entry.stat(follow_symlinks=False).st_nlink == 1:
                    os.unlink(entry.path)
