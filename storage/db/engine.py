"""
Transactions for the job table: SQLite on one machine, Postgres on several.

What a moment's wait mends is tried again: a lock, a conflict, a server that restarts.
storage/db/errors.py says which errors these are.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFreeError

from jobs.errors import ConfigError, DatabaseUnavailableError, SchemaMismatchError
from storage.db.backoff import Backoffs
from storage.db.errors import MissingTableError as MissingTableError
from storage.db.errors import explained, is_transient, names_unknown_column, needs_new_connection
from storage.db.postgres import postgres_engine
from storage.db.sqlite import WAL_RESET_FIXED as WAL_RESET_FIXED
from storage.db.sqlite import DataVersion, Wal, sqlite_engine
from storage.settings import Settings
from storage.volume.filesystems import NETWORK_FILESYSTEMS as NETWORK_FILESYSTEMS
from storage.volume.filesystems import filesystem_type as filesystem_type
from storage.volume.filesystems import is_network_filesystem

SCHEMA_REVISION = "0004"
"""Newest migration that this code knows; it works on newer schemas that say so, never on older."""

REVISION_AND_INSTALLATION = (
    "SELECT version_num, installation FROM alembic_version LEFT JOIN schema_info ON schema_info.id = 1"
)

T = TypeVar("T")


class Database:
    """Opens transactions; write() and read() retry what a moment's wait mends."""

    def __init__(self, settings: Settings) -> None:
        self.url = settings.database_url
        self.is_sqlite = settings.is_sqlite
        self.wal: Wal | None = None
        self.data_version: Callable[[], tuple[float, ...]] | None = None
        if self.is_sqlite:
            path = sqlite_path(self.url)
            self.engine = sqlite_engine(path)
            self.wal = Wal(path)
            self.data_version = DataVersion(path).read
        else:
            self.engine = postgres_engine(self.url)
        # Postgres shows each statement of a transaction what is committed by then, so that a transaction
        # gives readers nothing, and costs them two trips.
        alone = {} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"}
        self._readers = self.engine.execution_options(ganq_read=True, **alone)
        self.engine_at_once = self.engine.execution_options(**alone)
        self.answered_at = time.monotonic()
        """When the database last answered any thread of this process (worker/supervisor/status_socket.py)."""
        self.had_tables = False
        self.backoffs = Backoffs()
        self.installation = ""
        """Id of the job table, which all its workers and commands share; known after require_schema()."""

    def write(self, work: Callable[[Connection], T], *, patience_s: float = 30.0, at_once: bool = False) -> T:
        """
        Run `work` in one write transaction, again if the connection or a conflict broke it.

        `work` must be safe to run again after a commit whose answer was lost: it
        re-reads, and recognises what it has already done.

        Args:
            at_once: all that must hold together is one statement, which on Postgres commits by
                itself, without the trips of BEGIN and COMMIT. SQLite makes none, and has its
                transaction as ever.

        Raises:
            DatabaseUnavailableError: after patience_s seconds.
            SchemaMismatchError: the tables are not those of this code.
        """
        done = self._run(self.engine_at_once if at_once else self.engine, work, patience_s)
        if self.wal is not None:
            self.wal.tend()
        return done

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
            except NoConnectionFreeError as exc:
                raise DatabaseUnavailableError("all connections to the job table are in use") from exc
            except DBAPIError as exc:
                if needs_new_connection(exc):
                    self.engine.dispose()
                if not is_transient(exc) or time.monotonic() + pause > deadline:
                    self._give_up(exc)
                time.sleep(pause)
                pause = min(pause * 2, 2.0)

    def _give_up(self, exc: DBAPIError) -> NoReturn:
        if names_unknown_column(exc):
            self.require_schema()  # the likeliest reason, which tells more than the statement
        found = explained(exc, self.url, had_tables=self.had_tables)
        if found is exc:
            raise exc
        raise found from exc

    def revision(self) -> str | None:
        """The schema's migration, or None for an empty database."""
        try:
            return self.read(schema_revision)
        except MissingTableError:
            return None

    def require_schema(self) -> None:
        """
        Raises:
            SchemaMismatchError: empty, older, or newer and not for this code; the hint names the command.
        """

        def work(conn: Connection) -> str | None:
            try:
                row = conn.exec_driver_sql(REVISION_AND_INSTALLATION).first()
            except DBAPIError as exc:
                if is_transient(exc):
                    raise
                row = None  # tables of an older version, or none: that is said below
            check_schema(conn, row.version_num if row is not None else None)
            return row.installation if row is not None else None

        self.installation = self.read(work) or ""
        self.had_tables = True

    def checkpoint_wal(self) -> None:
        """Move SQLite's WAL into the database."""
        if self.wal is not None:
            self.wal.checkpoint()

    def dispose(self) -> None:
        self.engine.dispose()


def schema_revision(conn: Connection) -> str | None:
    """The schema's migration; the table must be there."""
    found = conn.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return str(found) if found is not None else None


def check_schema(conn: Connection, found: str | None = None) -> None:
    """
    Whether this code may work on this schema, in the caller's transaction.

    Code runs on its own schema, and on a newer one if that says so: a migration that
    only adds leaves `schema_info.compatible_from` as it is, one that breaks raises it.
    On Postgres the look also locks out a migration until the transaction ends.

    Args:
        found: the revision, if the caller has read it in this transaction.

    Raises:
        SchemaMismatchError: it may not.
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
    Raises:
        ConfigError: a relative path, or one on a file system where SQLite's locks do not hold.
    """
    path = Path(url.removeprefix("sqlite:///"))
    if not path.is_absolute():
        raise ConfigError(f"{url} is a relative path", hint="use four slashes: sqlite:////absolute/path")
    folder = path.resolve().parent  # the file itself may be a link to another file system
    kind = filesystem_type(folder)
    if is_network_filesystem(kind):
        raise ConfigError(
            f"SQLite cannot be kept on {kind} ({folder}): its locks do not hold there",
            hint="put GANQ_DATABASE_URL on a local disk, or use Postgres for several machines",
        )
    return path
