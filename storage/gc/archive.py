"""
`ganq gc --rows`: move rows of old jobs from the job table to compressed files on the volume.

    archive/jobs-FIRST-LAST-XXXXXXXX.jsonl.gz   jobs with their attempts, events and prerequisites

A file is complete and durable before its rows are deleted, so that a kill in between leaves a job in both
places; the job table is right then. A row stays as long as something refers to it: its files, a queued or
running job, a retry.
"""

import gzip
import io
import re
import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from sqlalchemy import Connection, delete, exists, select
from sqlalchemy import event as sqlalchemy_event

from jobs.errors import StorageError
from jobs.failpoints import failpoint
from jobs.states import TERMINAL
from storage.db.engine import Database
from storage.db.row_files import insert_rows, write_rows
from storage.db.tables import attempt, checkpoint, dependency, end_dependency, event, job, label, utcnow
from storage.gc.delete import delete_tree, opened
from storage.gc.scan import belongs, job_facts, needed_jobs
from storage.settings import Settings
from storage.volume.durable import make_folder, write_bytes
from storage.volume.layout import Volume
from storage.volume.ownership import recorded_spec

BATCH_SIZE = 200
"""Jobs in one transaction and one file."""
NAME = re.compile(r"jobs-(\d+)-(\d+)-[0-9a-f]{8}\.jsonl\.gz")


@dataclass
class Archived:
    """Result of archive_rows()."""

    jobs: int = 0
    bytes: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    """Old jobs whose rows stay, by reason."""


def archive_rows(
    database: Database, volume: Volume, *, age_s: float, keep_named: bool = False, dry_run: bool = False
) -> Archived:
    """
    Move the rows of jobs that ended long ago to the archive, and delete the logs that they leave.

    Args:
        age_s: minimum time since their end.
        keep_named: keep the rows of jobs that have a name.
        dry_run: count only.

    Raises:
        DiskFullError, VolumeError, StorageError: the remaining rows stay in the job table.
        DatabaseUnavailableError: likewise.
    """
    done = Archived()
    before: int | None = None
    while True:
        # Newest first: a retry refers to the job that it repeats.
        ids, before, kept = database.read(
            partial(_candidates, before=before, age_s=age_s, keep_named=keep_named)
        )
        done.kept += kept
        if ids and dry_run:
            done.jobs += len(ids)
        elif ids:
            done.bytes += _archive(database, volume, ids)
            done.jobs += len(ids)
        if before is None:
            return done


def _candidates(
    conn: Connection, before: int | None, age_s: float, keep_named: bool
) -> tuple[list[int], int | None, Counter[str]]:
    """Return jobs of one batch with their shards, where the next batch begins (or None), and what stays."""
    query = (
        select(job, exists().where(checkpoint.c.job_id == job.c.id).label("has_checkpoint"))
        .where(job.c.state.in_(TERMINAL), job.c.finished_at < utcnow() - age_s, job.c.part_of.is_(None))
        .order_by(job.c.id.desc())
        .limit(BATCH_SIZE)
    )
    rows = conn.execute(query if before is None else query.where(job.c.id < before)).all()
    needed = needed_jobs(conn) if rows else {}
    going = []
    kept: Counter[str] = Counter()
    for row in rows:
        result = row.result or {}
        if row.id in needed:
            kept["needed by a queued or running job"] += 1
        elif row.kept:
            kept["marked by ganq keep"] += 1
        elif keep_named and row.name:
            kept["has a name"] += 1
        elif row.has_checkpoint or (row.state == "succeeded" and result and "deleted_at" not in result):
            kept["has results (--jobs deletes them)"] += 1
        else:
            going.append(row.id)
    shards = select(job.c.id, job.c.part_of, job.c.state).where(job.c.part_of.in_(going))
    family: dict[int, list[int]] = {one: [one] for one in going}
    unfinished = set()
    for row in conn.execute(shards):
        family[row.part_of].append(row.id)
        if row.state not in TERMINAL:
            unfinished.add(row.part_of)
    for one in unfinished:
        kept["has a shard that has not ended"] += 1
        del family[one]
    ids = [one for members in family.values() for one in members]
    retried = select(job.c.retry_of).where(job.c.retry_of.in_(ids), job.c.id.not_in(ids))
    for one in {row.retry_of for row in conn.execute(retried)}:
        kept["was retried by a job that stays"] += 1
        ids = [each for each in ids if each not in family.get(one, [one])]
    return sorted(ids), rows[-1].id if len(rows) == BATCH_SIZE else None, kept


def _archive(database: Database, volume: Volume, ids: Sequence[int]) -> int:
    """Write one file, delete its rows, then the folders; return the size of the file."""
    tables = {
        job: job.c.id.in_(ids),
        attempt: attempt.c.job_id.in_(ids),
        event: event.c.job_id.in_(ids),
        dependency: dependency.c.job_id.in_(ids),
        end_dependency: end_dependency.c.job_id.in_(ids),
        label: label.c.job_id.in_(ids),
    }

    def rows(conn: Connection) -> bytes:
        raw = io.BytesIO()
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
            for table, where in tables.items():
                write_rows(conn, file, table, where)
        return raw.getvalue()

    data = database.read(rows)
    folder = volume.root / "archive"
    make_folder(folder, inside=volume.root)
    write_bytes(folder / f"jobs-{ids[0]}-{ids[-1]}-{secrets.token_hex(4)}.jsonl.gz", data)
    failpoint("archive.written")

    def remove(conn: Connection) -> None:
        unchanged = (job.c.id.in_(ids), job.c.state.in_(TERMINAL), job.c.kept == 0)
        still = [row.id for row in conn.execute(select(job.c.id).where(*unchanged).with_for_update())]
        needed = needed_jobs(conn)
        retried = {
            row.retry_of
            for row in conn.execute(
                select(job.c.retry_of).where(job.c.retry_of.in_(still), job.c.id.not_in(still))
            )
        }
        _delete(conn, [one for one in still if one not in needed and one not in retried])

    foreign = _of_another_table(database, volume, ids)
    database.write(remove)
    failpoint("archive.rows_deleted")
    left = database.read(partial(_present, ids=ids))
    for one in ids:
        if one not in left and one not in foreign:
            _delete_folder(volume, one)
    return len(data)


def _of_another_table(database: Database, volume: Volume, ids: Sequence[int]) -> set[int]:
    """Return the jobs whose folder was written for a job of another job table with the same id."""
    recorded = {one: spec for one in ids if (spec := recorded_spec(volume, one)) is not None}

    def compare(conn: Connection) -> set[int]:
        found = job_facts(conn, list(recorded))
        return {one for one, spec in recorded.items() if one in found and not belongs(conn, found[one], spec)}

    return database.read(compare)


def _delete_folder(volume: Volume, job_id: int) -> None:
    path = PurePosixPath(volume.relative(volume.job(job_id)))
    try:
        with opened(volume.root, path.parent) as parent:
            delete_tree(parent, path.name)
    except OSError:
        return  # without a row it is a folder without a job, for the next gc


def archives(volume: Volume) -> list[Path]:
    """Return the files of the archive, oldest jobs first."""
    try:
        found = [one for one in (volume.root / "archive").iterdir() if NAME.fullmatch(one.name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda one: [int(number) for number in one.name.split("-")[1:3]])


def archived_ids(volume: Volume) -> set[int]:
    """Return the ids of all archived jobs; those of files that cannot be read are missing."""
    found: set[int] = set()
    for path in archives(volume):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                next(file)
                for line in file:
                    if line.startswith("{"):
                        break
                    found.add(int(line[1 : line.index(",")]))
        except (OSError, EOFError, ValueError, StopIteration):
            continue
    return found


def read_archive(
    settings: Settings, volume: Volume, live: Database, folder: Path
) -> tuple[Database, list[str]]:
    """
    Return a job table with the archived jobs alone, and notes on files that cannot be read.

    Args:
        live: a job that is still in this table, after an interrupted gc, is left out.
        folder: where it is made.

    Raises:
        StorageError: nothing was archived yet.
    """
    from storage.db.schema import upgrade

    paths = archives(volume)
    if not paths:
        raise StorageError(
            f"there is no archive at {volume.root}", hint="ganq gc --rows --older-than 90d makes one"
        )
    database = Database(replace(settings, database_url=f"sqlite:///{folder / 'archive.db'}"))
    sqlalchemy_event.listen(database.engine, "connect", _without_foreign_keys)
    upgrade(database)
    notes = []
    for path in paths:
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                database.write(partial(insert_rows, lines=file.readlines(), skip_present=True))
        except (OSError, EOFError, ValueError, KeyError) as exc:
            notes.append(f"{path} cannot be read and is left out: {exc}")
    ids = sorted(database.read(lambda conn: conn.execute(select(job.c.id)).scalars().all()))
    for start in range(0, len(ids), BATCH_SIZE):
        if there := live.read(partial(_present, ids=ids[start : start + BATCH_SIZE])):
            database.write(partial(_forget, ids=there))
    return database, notes


def _present(conn: Connection, ids: Sequence[int]) -> set[int]:
    return set(conn.execute(select(job.c.id).where(job.c.id.in_(ids))).scalars())


def _without_foreign_keys(raw: Any, _: Any) -> None:
    raw.execute("PRAGMA foreign_keys = OFF")  # a prerequisite may still be in the job table


def _forget(conn: Connection, ids: Collection[int]) -> None:
    for table in (event, attempt, dependency, end_dependency, label):
        conn.execute(delete(table).where(table.c.job_id.in_(ids)))
    _delete(conn, ids)


def _delete(conn: Connection, ids: Iterable[int]) -> None:
    conn.execute(delete(job).where(job.c.id.in_(ids)))
