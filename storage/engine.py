"""
Engines and transactions for the job table: SQLite on one machine, Postgres on several.

A write transaction on SQLite is BEGIN IMMEDIATE: a deferred one that reads first
fails at once with SQLITE_BUSY_SNAPSHOT, whatever the busy timeout says.
synchronous=FULL because NORMAL lost 50 of 50 acknowledged commits in a power cut.
"""

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import QueuePool

from jobs.errors import ConfigError, DatabaseUnavailableError, SchemaMismatchError
from storage.settings import Settings, redact

SCHEMA_REVISION = "0002"
"""Newest migration that this code knows; workers and commands refuse any other."""

# Of these, several writers may meet a defect in how a WAL is reset (fixed in 3.51.3):
# then one process alone moves the WAL into the database, see checkpoint_wal().
WAL_RESET_FIXED = (3, 51, 3)
NETWORK_FILESYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "ceph", "glusterfs", "beegfs")
HOPELESS = ("does not exist", "authentication failed", "no password supplied", "no pg_hba.conf entry")
"""What Postgres says, without a code, to a connection that no waiting will mend."""
RETRY_SQLSTATES = ("40001", "40P01", "57P01", "57P02", "57P03", "53300", "55P03")

T = TypeVar("T")


class Database:
    """Opens transactions; write() and read() retry what a moment's wait mends."""

    def __init__(self, settings: Settings) -> None:
        self.url = settings.database_url
        self.is_sqlite = settings.is_sqlite
        self.engine = _sqlite_engine(self.url) if self.is_sqlite else _postgres_engine(self.url)
        self._readers = self.engine.execution_options(ganq_read=True)
        self.answered_at = time.monotonic()
        """When the database last answered any thread of this process (monotonic)."""

    def write(self, work: Callable[[Connection], T], *, patience_s: float = 30.0) -> T:
        """
        Run `work` in one write transaction, again if the connection or a conflict broke it.

        `work` must be safe to run again after a commit whose answer was lost: it
        re-reads, and recognises what it has already done.

        Raises:
            DatabaseUnavailableError: after patience_s seconds.
        """
        return self._run(self.engine, work, patience_s)

    def read(self, work: Callable[[Connection], T], *, patience_s: float = 5.0) -> T:
        """Run `work` in one read transaction; see write()."""
        return self._run(self._readers, work, patience_s)

    def _run(self, engine: Engine, work: Callable[[Connection], T], patience_s: float) -> T:
        deadline = time.monotonic() + patience_s
        pause = 0.05
        while True:
            try:
                with engine.begin() as conn:
                    found = work(conn)
                self.answered_at = time.monotonic()
                return found
            except DBAPIError as exc:
                if not _passing(exc) or time.monotonic() + pause > deadline:
                    explained = _explained(exc, self.url)
                    if explained is exc:
                        raise
                    raise explained from exc
                time.sleep(pause)
                pause = min(pause * 2, 2.0)

    def revision(self) -> str | None:
        """The schema's migration, or None for an empty database."""

        def ask(conn: Connection) -> str | None:
            found = conn.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return str(found) if found is not None else None

        try:
            return self.read(ask)
        except MissingTableError:
            return None

    def require_schema(self) -> None:
        """
        Raises:
            SchemaMismatchError: empty, older or newer; the hint names the command.
        """
        found = self.revision()
        if found == SCHEMA_REVISION:
            return
        if found is None:
            raise SchemaMismatchError("the database has no tables yet", hint="run: ganq db upgrade")
        if found < SCHEMA_REVISION:
            raise SchemaMismatchError(
                f"the database is older (schema {found}) than this ganq (schema {SCHEMA_REVISION})",
                hint="run: ganq db upgrade",
            )
        raise SchemaMismatchError(
            f"the database is newer (schema {found}) than this ganq (schema {SCHEMA_REVISION})",
            hint="install the ganq that made it, or a newer one",
        )

    def checkpoint_wal(self) -> None:
        """Move SQLite's WAL into the database; the caller holds the machine's lock for it."""
        if self.is_sqlite:
            with self.engine.connect() as conn:
                raw = conn.connection.dbapi_connection
                assert raw is not None
                raw.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def dispose(self) -> None:
        self.engine.dispose()


class MissingTableError(SchemaMismatchError):
    """The table that was asked for does not exist: the database is empty."""


def _sqlite_engine(url: str) -> Engine:
    path = Path(url.removeprefix("sqlite:///"))
    if not path.is_absolute():
        raise ConfigError(f"{url} is a relative path", hint="use four slashes: sqlite:////absolute/path")
    kind = filesystem_type(path.parent)
    if kind in NETWORK_FILESYSTEMS or kind.startswith("fuse."):
        raise ConfigError(
            f"SQLite cannot be kept on {kind} ({path.parent}): its locks do not hold there",
            hint="put GANQ_DATABASE_URL on a local disk, or use Postgres for several machines",
        )
    # A pooled connection must not cross a fork, which is why only processes that never
    # fork keep a Database.
    engine = create_engine(
        URL.create("sqlite", database=str(path)),  # as it is: '?' in a folder's name begins no options
        poolclass=QueuePool,
        pool_size=4,
        max_overflow=8,
        connect_args={"timeout": 30.0, "check_same_thread": False, "isolation_level": None},
    )

    @event.listens_for(engine, "connect")
    def _pragmas(raw: Any, record: Any) -> None:
        raw.execute("PRAGMA busy_timeout = 30000")
        raw.execute("PRAGMA journal_mode = WAL")
        raw.execute("PRAGMA synchronous = FULL")
        raw.execute("PRAGMA foreign_keys = ON")
        one_checkpointer = sqlite3.sqlite_version_info < WAL_RESET_FIXED
        raw.execute(f"PRAGMA wal_autocheckpoint = {0 if one_checkpointer else 1000}")

    @event.listens_for(engine, "begin")
    def _begin(conn: Connection) -> None:
        reading = conn.get_execution_options().get("ganq_read", False)
        conn.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def _postgres_engine(url: str) -> Engine:
    return create_engine(
        url,
        pool_pre_ping=True,
        pool_size=4,
        max_overflow=8,
        connect_args={
            "connect_timeout": 5,
            "application_name": "ganq",
            "tcp_user_timeout": 20_000,
            "options": "-c lock_timeout=5s -c statement_timeout=30s"
            " -c idle_in_transaction_session_timeout=30s",
        },
    )


def _passing(exc: DBAPIError) -> bool:
    if exc.connection_invalidated:
        return True
    state = getattr(exc.orig, "sqlstate", None)
    if state is not None:
        return state in RETRY_SQLSTATES or state.startswith("08")
    if isinstance(exc.orig, sqlite3.OperationalError):
        return "locked" in str(exc.orig) or "busy" in str(exc.orig)
    return isinstance(exc, OperationalError) and not any(word in str(exc.orig) for word in HOPELESS)


def _explained(exc: DBAPIError, url: str) -> Exception:
    shown = redact(url)
    said = redact(str(exc.orig).strip().splitlines()[0]) if str(exc.orig).strip() else type(exc.orig).__name__
    sqlstate = getattr(exc.orig, "sqlstate", None)
    if sqlstate == "42P01" or "no such table" in said:
        return MissingTableError("the database has no tables yet", hint="run: ganq db upgrade")
    if "is not a database" in said or "malformed" in said:
        return DatabaseUnavailableError(
            f"{shown} is not a SQLite database, or it is damaged", hint="move it away, or restore a backup"
        )
    if "invalid connection option" in said or "invalid URI" in said:
        return ConfigError(f"GANQ_DATABASE_URL: {said}", hint="see the PostgreSQL manual, connection URIs")
    if "readonly database" in said:
        return DatabaseUnavailableError(
            f"the job table cannot be written by this user ({shown})",
            hint="check the permissions of the file and its folder",
        )
    wrong_sql = getattr(exc.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
    if isinstance(exc, OperationalError) and not wrong_sql:
        return DatabaseUnavailableError(
            f"the job table cannot be reached: {said} ({shown})",
            hint="check GANQ_DATABASE_URL and that the database runs: ganq doctor",
        )
    return exc


def filesystem_type(folder: Path) -> str:
    """The type of the file system that holds a folder, '' where the system does not say."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    real = os.path.realpath(folder)
    best, kind = "", ""
    for line in mounts:
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind
