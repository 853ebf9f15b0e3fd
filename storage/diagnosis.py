"""
What `ganq doctor` finds out about the job table and the volume, and what a finding is.

Nothing here changes anything: each check looks, and says what to do. A check that
cannot look says so in its finding instead of raising.
"""

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import Connection, func, select, text

from jobs.errors import GanqError
from jobs.states import JobState
from storage.engine import (
    NETWORK_FILESYSTEMS,
    SCHEMA_REVISION,
    WAL_RESET_FIXED,
    Database,
    filesystem_type,
)
from storage.jobs import Job, WorkerRow
from storage.models import CLAIMABLE, job
from storage.queries import Filter, Queries
from storage.settings import Settings, redact

CLOCK_S = 5.0
"""Clocks that differ by more make ages look wrong; leases are measured without them."""
LOW_BYTES = 5_000_000_000
EMPTY_BYTES = 200_000_000
LOW_INODES = 10_000
LARGE_WAL_BYTES = 500_000_000
LISTED = 5


class Verdict(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of `ganq doctor`: what was looked at, what was found, what to do."""

    check: str
    verdict: Verdict
    said: str
    hint: str | None = None


def ok(check: str, said: str) -> Finding:
    return Finding(check, Verdict.OK, said)


def warn(check: str, said: str, hint: str) -> Finding:
    return Finding(check, Verdict.WARN, said, hint)


def fail(check: str, said: str, hint: str | None) -> Finding:
    return Finding(check, Verdict.FAIL, said, hint)


# --- the job table ------------------------------------------------------------------------


def check_job_table(settings: Settings) -> Iterator[Finding]:
    """The database, its clock, and what its rows say of workers and jobs."""
    if settings.is_sqlite:
        path = Path(settings.database_url.removeprefix("sqlite:///"))
        if not path.exists():
            yield warn(
                "database",
                f"there is no job table at {path} yet",
                "ganq up or the first ganq submit makes it",
            )
            return
    try:
        database = Database(settings)
    except GanqError as exc:
        yield fail("database", exc.message, exc.hint)
        return
    try:
        yield from _check_database(database)
        database.require_schema()
        yield ok("schema", f"{SCHEMA_REVISION}, as this ganq needs")
        queries = Queries(database)
        yield check_clock(queries)
        workers = queries.workers()
        yield from check_workers(workers, settings)
        running = queries.page(Filter(states=(JobState.RUNNING,)), limit=1000)
        yield from check_running(running, workers, settings)
        yield from check_queued(queued_by_queue(database), workers, settings)
    except GanqError as exc:
        yield fail("database", exc.message, exc.hint)
    finally:
        database.dispose()


def _check_database(database: Database) -> Iterator[Finding]:
    began = time.monotonic()
    if not database.is_sqlite:
        facts = database.read(_postgres_facts)
        took_ms = 1000 * (time.monotonic() - began)
        yield ok("database", f"Postgres {facts['server_version']} answers in {took_ms:.0f} ms")
        risky = [name for name in ("fsync", "synchronous_commit") if facts[name] == "off"]
        if risky:
            yield warn(
                "database",
                f"{' and '.join(risky)} off: a power cut may lose jobs that were accepted",
                f"set {risky[0]} = on in postgresql.conf",
            )
        return
    database.read(lambda conn: conn.execute(text("SELECT count(*) FROM sqlite_master")))
    path = Path(database.url.removeprefix("sqlite:///"))
    kind = filesystem_type(path.parent)
    yield ok("database", f"SQLite at {path}" + (f", on {kind}" if kind else ""))
    note = (
        ""
        if sqlite3.sqlite_version_info >= WAL_RESET_FIXED
        else f"; before {'.'.join(map(str, WAL_RESET_FIXED))} its WAL may be reset wrongly under several"
        " writers, so one worker alone resets it"
    )
    yield ok("sqlite", sqlite3.sqlite_version + note)
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        yield fail("database", f"{path} cannot be written by this user", f"check the owner of {path.parent}")
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size > LARGE_WAL_BYTES:
        yield warn(
            "sqlite",
            f"its WAL has grown to {wal.stat().st_size / 1e6:,.0f} MB",
            "a running worker empties it: ganq up",
        )


def _postgres_facts(conn: Connection) -> dict[str, str]:
    names = ("server_version", "fsync", "synchronous_commit")
    found = {name: str(conn.execute(text(f"SHOW {name}")).scalar_one()) for name in names}
    return {**found, "server_version": found["server_version"].split()[0]}


def check_clock(queries: Queries) -> Finding:
    """This machine's clock against the database's."""
    before = time.time()
    theirs = queries.now()
    apart = theirs - (before + time.time()) / 2
    if abs(apart) > CLOCK_S:
        how = "behind" if apart > 0 else "ahead of"
        return warn(
            "clock",
            f"this machine's clock is {abs(apart):,.0f} s {how} the database's",
            "set it by NTP; leases do not depend on it, but log times do",
        )
    return ok("clock", f"agrees with the database's to {max(abs(apart), 0.1):.1f} s")


# --- workers and jobs ---------------------------------------------------------------------


def alive(worker: WorkerRow, settings: Settings) -> bool:
    """Whether a worker has spoken lately and has not said goodbye."""
    return worker.state != "stopped" and worker.silent_s <= settings.lease_seconds


def check_workers(workers: Sequence[WorkerRow], settings: Settings) -> Iterator[Finding]:
    """Who is there, who has fallen silent, who runs another version."""
    from storage.version import version

    living = [one for one in workers if alive(one, settings)]
    silent = [one for one in workers if one.state != "stopped" and not alive(one, settings)]
    if living:
        hosts = len({one.host for one in living})
        busy = sum(one.state == "busy" for one in living)
        yield ok("workers", f"{len(living)} alive on {hosts} host{'s' * (hosts > 1)}, {busy} busy")
    else:
        yield warn("workers", "none is running", "ganq up, or ganq worker on each machine with a GPU")
    if silent:
        longest = max(one.silent_s for one in silent)
        yield warn(
            "workers",
            f"silent without having stopped: {_listed([one.name for one in silent])}, up to {longest:,.0f} s",
            "look at those machines; a worker that is gone for good is forgotten after a week",
        )
    others = [f"{one.name} ({one.version})" for one in living if one.version != version()]
    if others:
        yield warn(
            "workers",
            f"run another version than this ganq {version()}: {_listed(others)}",
            "install one version everywhere; a worker drains on SIGTERM and loses nothing",
        )


def check_running(
    running: Sequence[Job], workers: Sequence[WorkerRow], settings: Settings
) -> Iterator[Finding]:
    """Running jobs whose worker does not speak any more."""
    living = {one.name for one in workers if alive(one, settings)}
    orphans = [str(one.id) for one in running if one.worker not in living]
    if orphans and living:
        yield warn(
            "jobs",
            f"running on a worker that is silent: {_listed(orphans)}",
            f"nothing: a living worker takes them back after {settings.lease_seconds:.0f} s",
        )
    elif orphans:
        yield fail(
            "jobs",
            f"marked as running, and no worker is alive to take them back: {_listed(orphans)}",
            "ganq up or ganq worker: they go on from their last checkpoints",
        )
    elif running:
        yield ok("jobs", f"{len(running)} running, each on a worker that speaks")


def queued_by_queue(database: Database) -> dict[str, int]:
    """How many jobs each queue holds that a worker could take now or later."""
    query = select(job.c.queue, func.count()).where(text(CLAIMABLE)).group_by(job.c.queue)
    return database.read(lambda conn: {str(queue): int(n) for queue, n in conn.execute(query)})


def check_queued(
    queued: dict[str, int], workers: Sequence[WorkerRow], settings: Settings
) -> Iterator[Finding]:
    """Queued jobs that nobody will ever take."""
    takers = [one for one in workers if alive(one, settings) and one.state != "draining"]
    served = {queue for one in takers for queue in one.queues.split(",")}
    for queue, number in sorted(queued.items()):
        jobs = f"{number:,} queued job{'s' * (number != 1)}"
        if queue in served:
            yield ok("jobs", f"{jobs} in the queue {queue}")
        elif takers:
            yield fail(
                "jobs",
                f"{jobs} in the queue {queue}, which no living worker serves",
                f"ganq worker --queues {queue}",
            )
        else:
            yield warn(
                "jobs", f"{jobs} in the queue {queue}, and no worker is there", "ganq up, or ganq worker"
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return redact(", ".join(names[:LISTED]) + more)


# --- the volume ---------------------------------------------------------------------------


def check_volume(settings: Settings) -> Iterator[Finding]:
    """There, writable, on what kind of file system, with room."""
    root = settings.volume
    if not root.exists():
        yield warn(
            "volume", f"there is no folder {root} yet", "the first worker makes it; or set GANQ_VOLUME"
        )
        return
    if not root.is_dir():
        yield fail("volume", f"{root} is not a folder", "point GANQ_VOLUME at a folder")
        return
    reason = _cannot_write(root)
    if reason is not None:
        yield fail("volume", f"{root} cannot be written: {reason}", "check its owner and how it is mounted")
    kind = filesystem_type(root)
    about = os.statvfs(root)
    free = about.f_bavail * about.f_frsize
    room = f"{free / 1e9:,.1f} GB free"
    if free < EMPTY_BYTES:
        yield fail("volume", f"{root} is full: {room}", "delete what is not needed; waiting jobs then go on")
    elif free < LOW_BYTES:
        yield warn("volume", f"{root} has little room: {room}", "submit --dry-run says what a job will need")
    elif reason is None:
        shared = " (shared)" if kind in NETWORK_FILESYSTEMS else ""
        yield ok("volume", f"{root}, on {kind or 'an unknown file system'}{shared}, {room}")
    if about.f_files and about.f_favail < LOW_INODES:
        yield warn("volume", f"only {about.f_favail:,} more files can be made on it", "delete old pictures")
    if kind in ("tmpfs", "ramfs"):
        yield warn(
            "volume", f"{root} lies in memory and is gone at the next boot", "set GANQ_VOLUME to a disk"
        )


def _cannot_write(folder: Path) -> str | None:
    """Why a file cannot be made there; found out by making one, because root may all by its bits."""
    probe = folder / f".doctor-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as exc:
        return (exc.strerror or type(exc).__name__).lower()
    return None
