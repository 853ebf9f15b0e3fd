"""
Read from the volume and the job table what storage/gc/policy.py needs.

The volume is listed before the table is read: what exists before the table says that an attempt has ended was
written before its end. No link on the volume is followed.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select, update

from jobs.errors import VolumeError
from jobs.states import JobState
from storage.datasets.cache import list_datasets
from storage.db.rows import state_of
from storage.db.store.transitions import record_event
from storage.db.tables import attempt, checkpoint, dependency, end_dependency, job, utcnow
from storage.gc.policy import CHECKPOINTS, SAMPLES, AttemptSeen, Cache, JobFacts, JobSeen, Reader
from storage.volume.durable import raise_storage_error
from storage.volume.layout import Volume
from storage.volume.ownership import is_of

JOB_FOLDER = re.compile(r"\d{6,}")
ATTEMPT_FOLDER = re.compile(r"a([1-9]\d*)")
JOB_PATH = re.compile(r"jobs/0*(\d+)(?:/|$)")
LIVE = (JobState.QUEUED, JobState.RUNNING)


class MountedError(OSError):
    """Another file system is mounted below; it is never deleted."""


# --- the volume ---------------------------------------------------------------------------


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder; [] if it is missing, no folder, or a link."""
    try:
        if stat.S_ISLNK(os.lstat(folder).st_mode):
            return []
        with os.scandir(folder) as found:
            return sorted(found, key=lambda one: one.name)
    except OSError:
        return []


def is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def names(folder: Path) -> tuple[str, ...]:
    return tuple(one.name for one in entries(folder))


def job_folders(volume: Volume) -> dict[int, str]:
    """
    Return id → name of each job folder.

    Raises:
        VolumeError, StorageError: they cannot be listed.
    """
    found: dict[int, str] = {}
    root = volume.jobs
    try:
        os.listdir(root)
    except FileNotFoundError:
        return found
    except OSError as exc:
        raise_storage_error(exc, root)
    for entry in entries(root):
        if JOB_FOLDER.fullmatch(entry.name) and is_folder(entry):
            job_id = int(entry.name)
            if volume.job(job_id).name == entry.name:
                found[job_id] = entry.name
    return found


def see_job(volume: Volume, job_id: int) -> JobSeen:
    """Return the names in a job's folder."""
    folder = volume.job(job_id)
    others, attempts = [], []
    for entry in entries(folder):
        number = ATTEMPT_FOLDER.fullmatch(entry.name)
        if number is None or not is_folder(entry):
            others.append(entry.name)
            continue
        inside = folder / entry.name
        attempts.append(
            AttemptSeen(int(number[1]), names(inside), names(inside / CHECKPOINTS), names(inside / SAMPLES))
        )
    return JobSeen(f"jobs/{folder.name}", tuple(others), tuple(attempts))


def measure(path: Path) -> tuple[int, float]:
    """
    Return the bytes that deleting a path frees, and its newest modification time, by the volume's clock.

    Raises:
        MountedError: another file system is mounted below.
        OSError: it is missing, or cannot be read.
    """
    top = os.lstat(path)
    size, newest = 0, top.st_mtime
    if not stat.S_ISDIR(top.st_mode):
        return _freed(top), newest
    with os.scandir(path) as found:
        for entry in found:
            about = entry.stat(follow_symlinks=False)
            if about.st_dev != top.st_dev:
                raise MountedError(f"another file system is mounted at {entry.path}")
            if entry.is_dir(follow_symlinks=False):
                inner, changed = measure(Path(entry.path))
                size, newest = size + inner, max(newest, changed)
            else:
                size += _freed(about)
                newest = max(newest, about.st_mtime)
    return size, newest


def _freed(about: os.stat_result) -> int:
    """Return the bytes that deleting a file frees: none of a hard link that is not the last."""
    return about.st_size if stat.S_ISREG(about.st_mode) and about.st_nlink == 1 else 0


def volume_clock(volume: Volume) -> float:
    """
    Return the time of the volume's clock, which may differ from that of this machine.

    Raises:
        VolumeError: the volume is missing, or cannot be written.
    """
    if not volume.root.is_dir():
        raise VolumeError(
            f"there is no volume at {volume.root}", hint="the first worker creates it; or set GANQ_VOLUME"
        )
    probe = volume.root / f".probe-{secrets.token_hex(4)}"
    try:
        try:
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
        except OSError:  # no space even for a name: touch the folder itself
            os.utime(volume.root)
            now = volume.root.stat().st_mtime
        return now
    except OSError as exc:
        raise_storage_error(exc, volume.root)


def caches(volume: Volume, now: float) -> Iterator[Cache]:
    """Yield the decoded data sets; `now` is the time of the volume's clock."""
    if volume.datasets.is_symlink():
        return
    for one in list_datasets(volume):
        folder = volume.dataset(one["fingerprint"])
        with suppress(OSError):
            if not folder.is_symlink():
                age_s = now - measure(folder)[1]
                yield Cache(one["fingerprint"], str(one["source"]), int(one["size"]), age_s)


# --- the table ----------------------------------------------------------------------------


def known_jobs(conn: Connection) -> set[int]:
    return set(conn.execute(select(job.c.id)).scalars())


def job_facts(conn: Connection, ids: Sequence[int]) -> dict[int, JobFacts]:
    """Return the facts of these jobs; jobs without a row are left out."""
    attempts: dict[int, dict[int, float | None]] = {}
    for row in conn.execute(
        select(attempt.c.job_id, attempt.c.number, utcnow() - attempt.c.ended_at).where(
            attempt.c.job_id.in_(ids)
        )
    ):
        attempts.setdefault(row[0], {})[row[1]] = row[2]
    paths: dict[int, set[str]] = {}
    for row in conn.execute(
        select(checkpoint.c.job_id, checkpoint.c.path).where(checkpoint.c.job_id.in_(ids))
    ):
        paths.setdefault(row[0], set()).add(row[1])
    parent = job.alias("parent")
    of_parent = (
        parent.c.state.label("parent_state"),
        (utcnow() - parent.c.finished_at).label("parent_ended_age_s"),
    )
    columns = (
        job.c.id,
        job.c.kind,
        job.c.state,
        job.c.attempt,
        job.c.created_at,
        job.c.part_of,
        job.c.result,
        job.c.name,
        job.c.kept,
    )
    ended_age = (utcnow() - job.c.finished_at).label("ended_age_s")
    return {
        row.id: JobFacts(
            id=row.id,
            kind=row.kind,
            state=state_of(row.state, JobState.RUNNING),
            attempt=row.attempt,
            created_at=row.created_at,
            ended_age_s=row.ended_age_s,
            part_of=row.part_of,
            parent_ended_age_s=row.parent_ended_age_s,
            parent_published=row.parent_state == JobState.SUCCEEDED,
            results_deleted="deleted_at" in (row.result or {}),
            name=row.name,
            kept=bool(row.kept),
            attempts=attempts.get(row.id, {}),
            checkpoints=frozenset(paths.get(row.id, ())),
        )
        for row in conn.execute(
            select(*columns, *of_parent, ended_age)
            .outerjoin(parent, parent.c.id == job.c.part_of)
            .where(job.c.id.in_(ids))
        )
    }


def belongs(conn: Connection, facts: JobFacts, said: dict[str, Any]) -> bool:
    """Return whether a folder with this spec.json is that of the job with this row."""

    def spec() -> dict[str, Any]:
        found: dict[str, Any] = conn.execute(select(job.c.spec).where(job.c.id == facts.id)).scalar_one()
        return found

    return is_of(said, facts.id, facts.created_at, spec)


def needed_jobs(conn: Connection) -> dict[int, int]:
    """Return each job whose files a queued or running job may read → that job."""
    needed: dict[int, int] = {}
    live = select(job.c.id, job.c.spec, job.c.inputs).where(job.c.state.in_(LIVE))
    for row in conn.execute(live):
        spec, pinned = row.spec or {}, (row.inputs or {}).get("checkpoint") or {}
        for one in (spec.get("source"), spec.get("continue_from"), pinned.get("job_id")):
            if isinstance(one, int):
                needed.setdefault(one, row.id)
        for value in spec.values():  # a training on images or weights of another job
            if isinstance(value, str) and (path := JOB_PATH.search(value)):
                needed.setdefault(int(path[1]), row.id)
    for table in (dependency, end_dependency):
        waits = select(table.c.needs, table.c.job_id).join(job, job.c.id == table.c.job_id)
        for needs, waiting in conn.execute(waits.where(job.c.state.in_(LIVE))):
            needed.setdefault(needs, waiting)
    return needed


def dataset_readers(conn: Connection) -> list[Reader]:
    """Return all jobs whose spec names a data set."""
    columns = (job.c.id, job.c.spec, job.c.inputs, job.c.state)
    query = (
        select(
            *columns,
            (utcnow() - job.c.finished_at).label("ended_age_s"),
            (utcnow() - attempt.c.started_at).label("running_s"),
        )
        .outerjoin(attempt, (attempt.c.job_id == job.c.id) & attempt.c.ended_at.is_(None))
        .where(job.c.kind.not_in(("generate", "import")))
    )
    return [
        Reader(
            job_id=row.id,
            fingerprint=(row.inputs or {}).get("fingerprint"),
            data=str(row.spec.get("data")),
            size=row.spec.get("size", 0),
            running_s=row.running_s if row.state == JobState.RUNNING else None,
            ended_age_s=row.ended_age_s,
        )
        for row in conn.execute(query)
        if "data" in (row.spec or {})
    ]


def delete_results(conn: Connection, ids: Sequence[int], *, age_s: float) -> None:
    """
    Remove the results of old jobs from the table before their files are deleted; keep those that are needed.

    Args:
        ids: several jobs, because the needed ones are read once.
        age_s: minimum time since their end.
    """
    ended = (utcnow() - job.c.finished_at).label("ended_age_s")
    rows = conn.execute(
        # One order for all, so that two transactions cannot deadlock.
        select(job, ended).where(job.c.id.in_(ids)).order_by(job.c.id).with_for_update()
    ).all()
    needed = needed_jobs(conn)
    now = conn.execute(select(utcnow())).scalar_one()
    for row in rows:
        old = (
            state_of(row.state, JobState.RUNNING).terminal
            and row.ended_age_s is not None
            and row.ended_age_s >= age_s
        )
        if not old or row.kept or row.id in needed or "deleted_at" in (row.result or {}):
            continue
        conn.execute(checkpoint.delete().where(checkpoint.c.job_id == row.id))
        result = {**(row.result or {}), "deleted_at": now}
        conn.execute(update(job).where(job.c.id == row.id).values(result=result))
        record_event(conn, row.id, "results_deleted")


def sample(ids: Iterable[int], count: int) -> list[int]:
    """Return up to `count` of the ids, evenly spread."""
    ordered = sorted(ids)
    return ordered[:: max(1, -(-len(ordered) // count))]
