"""
Checks of `ganq doctor`: the job table itself, its database, durability, schema and clock.

They change nothing.
"""

import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url

from jobs.errors import SchemaMismatchError, StorageError
from storage.db.engine import SCHEMA_REVISION, WAL_RESET_FIXED, Database
from storage.db.queries import Queries
from storage.settings import Settings
from storage.volume.filesystems import mount_of
from worker.doctor.check import Finding, error, ok, warn
from worker.doctor.facts import Facts
from worker.doctor.jobs import check_jobs_and_workers
from worker.doctor.webhooks import check_webhooks

CLOCK_S = 5.0
"""A larger difference makes displayed ages wrong; leases do not depend on it."""
LARGE_WAL_BYTES = 500_000_000
EMPTY_BYTES = 200_000_000
LOCKED_S = 5.0
"""No healthy worker holds the write lock for longer."""
OLDEST_POSTGRES = 14
"""Older versions are no longer maintained (postgresql.org/support/versioning)."""
CONNECTIONS_PER_WORKER = 2
MOUNT_IN_MEMORY = ("tmpfs", "ramfs")


def check_job_table(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Check the database, its schema and clock, then the workers and jobs in its rows."""
    if settings.is_sqlite:
        path = sqlite_file(settings)
        if not path.exists():
            yield warn(
                "database",
                f"there is no job table at {path} yet",
                "ganq up or the first ganq submit creates it",
            )
            return
        yield from check_sqlite_file(path)
    database = Database(settings)  # refuses SQLite on a network file system
    try:
        yield from _check_opened(settings, database)
        facts.database = database
        yield check_clock(Queries(database))
        yield from check_jobs_and_workers(settings, facts)
        yield from check_webhooks(database)
    except SchemaMismatchError as exc:
        yield error("schema", exc.message, exc.hint)
    finally:
        if facts.database is None:
            database.dispose()


def _check_opened(settings: Settings, database: Database) -> Iterator[Finding]:
    if settings.is_sqlite:
        yield from check_sqlite(sqlite_file(settings))
    else:
        yield from check_postgres(settings, database)
    database.require_schema()
    yield _schema(database)


def _schema(database: Database) -> Finding:
    found = database.revision()
    if found == SCHEMA_REVISION:
        return ok("schema", f"{found}, as this ganq requires")
    return warn(
        "schema",
        f"{found} is newer than this ganq ({SCHEMA_REVISION}), which can still use it",
        "install the newer ganq here, too",
    )


# --- SQLite -------------------------------------------------------------------------------


def sqlite_file(settings: Settings) -> Path:
    return Path(settings.database_url.removeprefix("sqlite:///"))


def check_sqlite_file(path: Path) -> Iterator[Finding]:
    """Check a database file before it is opened: permissions, file system and free space."""
    about = path.stat()
    if about.st_mode & stat.S_IWOTH:
        yield error(
            "database", f"{path} is writable by all users, who then control ganq", f"chmod o-w {path}"
        )
    mount = mount_of(path.parent)
    if mount is not None and mount.kind in MOUNT_IN_MEMORY:
        yield warn("database", f"{path} is in memory and lost at the next boot", "set GANQ_HOME to a disk")
    elif mount is not None and mount.kind == "overlay":
        yield warn(
            "database",
            f"{path} is in the container itself and is deleted with it",
            "mount a volume there, or use Postgres",
        )
    room = os.statvfs(path.parent)
    free = room.f_bavail * room.f_frsize
    if free < EMPTY_BYTES:
        yield error(
            "database",
            f"the disk of {path} has {free / 1e6:,.0f} MB free: soon no job can be accepted",
            f"free space on {mount.point if mount else path.parent}",
        )


def check_sqlite(path: Path) -> Iterator[Finding]:
    """Check that the database can be opened and written, and that its WAL is safe."""
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        yield error("database", f"{path} cannot be written by this user", f"check the owner of {path.parent}")
    yield _lock(path)
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info >= WAL_RESET_FIXED:
        yield ok("sqlite", f"{version}, without the WAL-reset defect")
    else:
        yield _wal_guard(path, version)
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size > LARGE_WAL_BYTES:
        yield warn(
            "sqlite",
            f"its WAL has grown to {wal.stat().st_size / 1e6:,.0f} MB",
            "a running worker empties it: ganq up; a reader that never ends prevents that (see lsof)",
        )


def _lock(path: Path) -> Finding:
    """
    Acquire and release the write lock: a process that holds it for long stops every worker.

    Raises:
        StorageError: the file is not a database.
    """
    began = time.monotonic()
    try:
        with closing(
            sqlite3.connect(
                f"file:{quote(str(path))}?mode=rw", uri=True, timeout=LOCKED_S, isolation_level=None
            )
        ) as raw:
            raw.execute("SELECT count(*) FROM sqlite_master").fetchone()
            raw.execute("BEGIN IMMEDIATE")
            raw.execute("ROLLBACK")
    except sqlite3.OperationalError as exc:
        if "locked" in str(exc):
            return error(
                "database",
                f"a process has held the lock of {path} for {LOCKED_S:.0f} s: no worker can write",
                f"fuser -v {path} names it; it may be a backup or a shell that was left open",
            )
        if "readonly" in str(exc) or "unable to open" in str(exc):
            return error("database", f"{path}: {exc}", f"check the owner of {path.parent}")
        raise
    except sqlite3.DatabaseError as exc:
        raise StorageError(
            f"{path} is not a SQLite database, or it is damaged: {exc}",
            hint="move it away, or restore a backup",
        ) from exc
    mount = mount_of(path.parent)
    where = f", on {mount.kind}" if mount else ""
    took_ms = 1000 * (time.monotonic() - began)
    return ok("database", f"SQLite at {path}{where}, opened and locked in {took_ms:.0f} ms")


def _wal_guard(path: Path, version: str) -> Finding:
    """Check that ganq's connections leave the WAL to the guarded checkpoint (WAL-reset defect)."""
    from storage.db.sqlite import sqlite_engine

    fixed = ".".join(map(str, WAL_RESET_FIXED))
    # As a reader, because the database may be locked just now.
    engine = sqlite_engine(path).execution_options(ganq_read=True)
    try:
        with engine.connect() as conn:
            automatic = conn.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar_one()
    finally:
        engine.dispose()
    if automatic:
        return error(
            "sqlite",
            f"{version} has the WAL-reset defect, and checkpoints by itself every {automatic} pages",
            f"install SQLite {fixed} or newer",
        )
    return ok(
        "sqlite",
        f"{version}; the WAL-reset defect (fixed in {fixed}) is avoided:"
        " one process at a time checkpoints, while no other can commit",
    )


# --- Postgres -----------------------------------------------------------------------------

PARAMETERS = (
    *("server_version", "server_version_num", "fsync", "synchronous_commit", "full_page_writes"),
    *("max_connections", "superuser_reserved_connections", "server_encoding"),
)
POSTGRES_RISKS = {
    "fsync": "a power cut may damage the whole database",
    "full_page_writes": "a power cut may damage the whole database",
    "synchronous_commit": "a power cut may lose jobs that were accepted",
}


def check_postgres(settings: Settings, database: Database) -> Iterator[Finding]:
    """Check the server's version, its durability settings and its free connections."""
    began = time.monotonic()
    facts = database.read(_postgres_facts)
    took_ms = 1000 * (time.monotonic() - began)
    version = facts["server_version"].split()[0]
    if int(facts["server_version_num"]) // 10_000 < OLDEST_POSTGRES:
        yield warn(
            "database",
            f"Postgres {version} is no longer maintained",
            f"upgrade to {OLDEST_POSTGRES} or newer: pg_upgrade",
        )
    else:
        yield ok("database", f"Postgres {version} answers in {took_ms:.0f} ms")
    if facts["standby"] == "True":
        yield error("database", "this server is a read-only standby", "set GANQ_DATABASE_URL to the primary")
    for name, risk in POSTGRES_RISKS.items():
        if facts[name] == "off":
            yield warn("database", f"{name} is off: {risk}", f"set {name} = on in postgresql.conf")
    if facts["server_encoding"] != "UTF8":
        yield warn(
            "database",
            f"its encoding is {facts['server_encoding']}: text may be refused",
            "create it again: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0",
        )
    if facts["ssl"] == "False" and not _is_local(settings.database_url):
        yield warn(
            "database",
            "the connection is not encrypted: passwords and jobs can be read and changed",
            "add ?sslmode=verify-full to GANQ_DATABASE_URL",
        )
    yield _connections(facts)


def _is_local(url: str) -> bool:
    host = make_url(url).host
    if not host or host == "localhost" or host.startswith("/"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _connections(facts: dict[str, str]) -> Finding:
    """Check that another worker can connect: limits of the server, of this user and of this database."""
    server = int(facts["max_connections"]) - int(facts["superuser_reserved_connections"])
    limits = {
        "": (int(facts["used"]), server),
        " of this user": (int(facts["used_by_role"]), int(facts["role_limit"])),
        " of this database": (int(facts["used_in_database"]), int(facts["database_limit"])),
    }
    limits = {scope: pair for scope, pair in limits.items() if pair[1] >= 0}  # -1: no limit of its own
    scope, (used, limit) = min(limits.items(), key=lambda one: one[1][1] - one[1][0])
    message = f"{used} of {limit} connections{scope} are in use"
    if limit - used < CONNECTIONS_PER_WORKER or used > 0.8 * limit:
        return warn(
            "database",
            f"{message}: further workers or commands may be refused",
            "raise max_connections (or that limit), or close idle connections: pg_stat_activity",
        )
    return ok("database", message)


def _postgres_facts(conn: Connection) -> dict[str, str]:
    found = {name: str(conn.execute(text(f"SHOW {name}")).scalar_one()) for name in PARAMETERS}
    row = conn.execute(
        text(
            "SELECT pg_is_in_recovery() AS standby,"
            " (SELECT sum(numbackends) FROM pg_stat_database) AS used,"
            " (SELECT count(*) FROM pg_stat_activity WHERE usename = current_user) AS used_by_role,"
            " (SELECT numbackends FROM pg_stat_database WHERE datname = current_database())"
            "  AS used_in_database,"
            " (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS role_limit,"
            " (SELECT datconnlimit FROM pg_database WHERE datname = current_database()) AS database_limit,"
            " (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()) AS ssl"
        )
    ).one()
    return {**found, **{name: str(value) for name, value in row._mapping.items()}}


# --- the clock ----------------------------------------------------------------------------


def check_clock(queries: Queries) -> Finding:
    """Compare this machine's clock with the database's."""
    before = time.time()
    database_s = queries.now()
    difference_s = database_s - (before + time.time()) / 2
    if abs(difference_s) > CLOCK_S:
        how = "behind" if difference_s > 0 else "ahead of"
        return warn(
            "clock",
            f"this machine's clock is {abs(difference_s):,.0f} s {how} the database's",
            "synchronise it by NTP; leases do not depend on it, but times in logs do",
        )
    return ok("clock", f"differs from the database's by at most {max(abs(difference_s), 0.1):.1f} s")
