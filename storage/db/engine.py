"""
Transactions for the job table, on SQLite or Postgres.

Transient errors are retried: a lock, a conflict, a server that restarts. storage/db/errors.py lists them.
"""

import contextlib
import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFreeError

from jobs.errors import ConfigError, DatabaseUnavailableError, SchemaMismatchError
from storage.db.backoff import Backoffs
from storage.db.errors import MissingTableError as MissingTableError
from storage.db.errors import explained, is_transient, names_unknown_name, needs_new_connection
from storage.db.postgres import SpareConnection, postgres_engine
from storage.db.sqlite import WAL_RESET_FIXED as WAL_RESET_FIXED
from storage.db.sqlite import DataVersion, Wal, sqlite_engine
from storage.settings import Settings
from storage.volume.filesystems import NETWORK_FILESYSTEMS as NETWORK_FILESYSTEMS
from storage.volume.filesystems import filesystem_type as filesystem_type
from storage.volume.filesystems import is_network_filesystem

SCHEMA_REVISION = "0011"
"""Newest migration of this version; it also works on newer schemas that allow it, never on older ones."""

REVISION_AND_INSTALLATION = (
    "SELECT version_num, installation FROM alembic_version LEFT JOIN schema_info ON schema_info.id = 1"
)

T = TypeVar("T")


@dataclass(frozen=True)
class Requester:
    """Who asked for a change, for the events of the jobs."""

    user: str
    way: str
    """'cli', 'python', 'api' or 'page'."""
    expect: Callable[[Any], None] | None = None
    """Called with a job's row when a change has locked it; raises if the change must not be made."""


REQUESTER = "ganq_requester"
"""Execution option of the connections of Database.requested_by()."""


class Database:
    """Transactions; write() and read() retry transient errors."""

    def __init__(self, settings: Settings, *, connections: int | None = None) -> None:
        """
        Args:
            connections: to Postgres; see postgres_engine().
        """
        self.url = settings.database_url
        self.is_sqlite = settings.is_sqlite
        self.wal: Wal | None = None
        self.spare: SpareConnection | None = None
        self.data_version: Callable[[], tuple[float, ...]] | None = None
        if self.is_sqlite:
            path = sqlite_path(self.url)
            self.engine = sqlite_engine(path)
            self.wal = Wal(path)
            self.data_version = DataVersion(path).read
        else:
            self.engine = postgres_engine(self.url, connections)
            self.spare = SpareConnection(self.engine) if connections is not None else None
        # In Postgres each statement of a transaction sees what is committed by then, so that a transaction
        # gives readers nothing, and costs them two round trips.
        autocommit = {} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"}
        self._readers = self.engine.execution_options(ganq_read=True, **autocommit)
        self.autocommit_engine = self.engine.execution_options(**autocommit)
        self.answered_at = time.monotonic()
        """When the database last answered any thread of this process, by the monotonic clock."""
        # SQLite lets a second writer sleep for up to 100 ms at a time; threads of this process queue here.
        self._writing: contextlib.AbstractContextManager[Any] = (
            threading.Lock() if self.is_sqlite else contextlib.nullcontext()
        )
        self.had_tables = False
        self.backoffs = Backoffs()
        self.installation = ""
        """Id of the job table (decision 17); known after require_schema()."""

    def requested_by(self, requester: Requester) -> "Database":
        """Return this database, with the same connections, whose events name who asked."""
        other = copy.copy(self)
        other.engine = self.engine.execution_options(**{REQUESTER: requester})
        other.autocommit_engine = self.autocommit_engine.execution_options(**{REQUESTER: requester})
        return other

    def write(
        self, work: Callable[[Connection], T], *, patience_s: float = 30.0, autocommit: bool = False
    ) -> T:
        """
        Run `work` in one write transaction; repeat it after transient errors.

        `work` must recognise what it has already done, because it is also repeated after a COMMIT whose
        answer was lost.

        Args:
            autocommit: one statement does all that must be atomic. On Postgres it commits by itself, without
                the round trips of BEGIN and COMMIT; SQLite uses a transaction all the same.

        Raises:
            DatabaseUnavailableError: after patience_s seconds.
            SchemaMismatchError: the tables are not those of this code.
        """
        engine = self.autocommit_engine if autocommit else self.engine
        done = self._run(engine, work, patience_s, self._writing)
        if self.wal is not None:
            self.wal.maintain()
        return done

    def read(self, work: Callable[[Connection], T], *, patience_s: float = 5.0) -> T:
        """Run `work` in a read transaction; see write()."""
        return self._run(self._readers, work, patience_s, contextlib.nullcontext())

    def _run(
        self,
        engine: Engine,
        work: Callable[[Connection], T],
        patience_s: float,
        turn: contextlib.AbstractContextManager[Any],
    ) -> T:
        deadline = time.monotonic() + patience_s
        pause = 0.05
        while True:
            try:
                with turn, engine.begin() as conn:
                    found = work(conn)
                self.answered_at = time.monotonic()
                if self.spare is not None:
                    self.spare.maintain()
                return found
            except NoConnectionFreeError as exc:
                raise DatabaseUnavailableError("all connections to the job table are in use") from exc
            except DBAPIError as exc:
                if needs_new_connection(exc):
                    self.engine.dispose()
                if not is_transient(exc) or time.monotonic() + pause > deadline:
                    self._raise_error(exc)
                time.sleep(pause)
                pause = min(pause * 2, 2.0)

    def _raise_error(self, exc: DBAPIError) -> NoReturn:
        if names_unknown_name(exc):
            self.require_schema()  # the most likely reason, and a better message
        found = explained(exc, self.url, had_tables=self.had_tables)
        if found is exc:
            raise exc
        raise found from exc

    def revision(self) -> str | None:
        """Return the schema's revision, or None for an empty database."""
        try:
            return self.read(schema_revision)
        except MissingTableError:
            return None

    def require_schema(self) -> None:
        """
        Check that this code can use the schema.

        Raises:
            SchemaMismatchError: it is missing, older, or newer and incompatible.
        """

        def work(conn: Connection) -> str | None:
            try:
                row = conn.exec_driver_sql(REVISION_AND_INSTALLATION).first()
            except DBAPIError as exc:
                if is_transient(exc):
                    raise
                row = None  # tables of an older version, or none: see below
            check_schema(conn, row.version_num if row is not None else None)
            return row.installation if row is not None else None

        self.installation = self.read(work) or ""
        self.had_tables = True

    def dispose(self) -> None:
        self.engine.dispose()


def schema_revision(conn: Connection) -> str | None:
    """Return the schema's revision; its table must exist."""
    found = conn.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return str(found) if found is not None else None


def check_schema(conn: Connection, found: str | None = None) -> None:
    """
    Check in the caller's transaction that this code can use the schema.

    Code works on its own schema, and on newer compatible ones: a migration that only adds keeps
    `schema_info.compatible_from`, one that breaks raises it. On Postgres the read also blocks migrations
    until the transaction ends.

    Args:
        found: the revision, if the caller has read it in this transaction.

    Raises:
        SchemaMismatchError: it cannot.
    """
    found = schema_revision(conn) if found is None else found
    if found == SCHEMA_REVISION:
        return
    if found is None:
        raise MissingTableError("the database has no tables yet", hint="run: ganq db upgrade")
    if found < SCHEMA_REVISION:
        raise SchemaMismatchError(
            f"the database is older (schema {found}) than this ganq (schema {SCHEMA_REVISION})",
            hint="run: ganq db upgrade",
        )
    oldest = conn.execute(text("SELECT compatible_from FROM schema_info")).scalar()
    if oldest is None or str(oldest) > SCHEMA_REVISION:
        needs = f", and needs one that knows schema {oldest}" if oldest else ""
        raise SchemaMismatchError(
            f"the database is newer (schema {found}) than this ganq (schema {SCHEMA_REVISION}){needs}",
            hint="install the ganq that made it, or a newer one",
        )


def sqlite_path(url: str) -> Path:
    """
    Return the path of a SQLite URL.

    Raises:
        ConfigError: it is relative, or on a file system where SQLite's locks do not work.
    """
    path = Path(url.removeprefix("sqlite:///"))
    if not path.is_absolute():
        raise ConfigError(f"{url} is a relative path", hint="use four slashes: sqlite:////absolute/path")
    folder = path.resolve().parent  # the file itself may be a link to another file system
    kind = filesystem_type(folder)
    if is_network_filesystem(kind):
        raise ConfigError(
            f"SQLite cannot be used on {kind} ({folder}): its locks do not work there",
            hint="put GANQ_DATABASE_URL on a local disk, or use Postgres for several machines",
        )
    return path
