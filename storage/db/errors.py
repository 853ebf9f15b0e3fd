"""
Classification of database errors: what is retried, what is reported in one line, what is a bug.

An error that depends on the state of the database becomes a DatabaseUnavailableError, however
long it lasts: rights that were revoked, a read-only server, a locked table, a full disk. Workers
wait for it and commands end with one line. What remains (wrong SQL, a violated constraint) is
raised as it is.
"""

import shutil
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from jobs.errors import ConfigError, DatabaseUnavailableError, SchemaMismatchError
from storage.settings import redact

PERMANENT_MESSAGES = (
    "does not exist",
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
)
"""Messages of Postgres, without a code, to a connection attempt that a retry will not help."""
NO_ROOM = (
    "too many clients",
    "too many connections",
    "remaining connection slots",
    "no more connections allowed",
)
"""Messages of Postgres and PgBouncer, the same."""
RETRY_SQLSTATES = (
    *("40001", "40P01"),  # serialization failure, deadlock
    *("55P03", "53300"),  # lock timeout, too many connections
    *("57P01", "57P02", "57P03"),  # shut down, crashed, starting up
    "25006",  # a standby that is not promoted yet
    *("0A000", "26000", "42P05"),  # a prepared statement from before a migration, or behind a pooler
)
STALE_SQLSTATES = ("25006", "0A000", "26000", "42P05")
"""A new connection may reach the server that can be written, or prepare the statement again."""
UNAVAILABLE_CLASSES = (
    *("08", "28", "3D", "3F"),  # connection, authorization, no such database, no such schema
    *("25", "40", "53", "55"),  # read-only, rollback, out of resources, locked or in use
    *("57", "58", "XX"),  # operator intervention, I/O error, damage inside the server
)
"""SQLSTATE classes that depend on the server's state and not on the statement."""
FULL_BYTES = 65_536
"""A disk with less space than this is full."""


class MissingTableError(SchemaMismatchError):
    """The table that was asked for does not exist: the database is empty."""


def is_transient(exc: DBAPIError) -> bool:
    """Return whether a retry within seconds is likely to succeed."""
    if exc.connection_invalidated:
        return True
    state = _sqlstate(exc)
    if state is not None:
        return state in RETRY_SQLSTATES or state.startswith("08")
    if isinstance(exc.orig, sqlite3.OperationalError):
        return "locked" in str(exc.orig) or "busy" in str(exc.orig)
    return isinstance(exc, OperationalError) and not any(word in str(exc.orig) for word in PERMANENT_MESSAGES)


def needs_new_connection(exc: DBAPIError) -> bool:
    """
    Return whether pooled connections keep failing after the cause is gone.

    SQLite opens a file that it may not write for reading only, and stays with that.
    """
    return _sqlstate(exc) in STALE_SQLSTATES or _sqlite_code(exc) == sqlite3.SQLITE_READONLY


def names_unknown_name(exc: DBAPIError) -> bool:
    """Return whether the statement names a column or a function that does not exist."""
    message = str(exc.orig)
    return _sqlstate(exc) in ("42703", "42883") or (
        isinstance(exc, OperationalError | ProgrammingError)
        and ("no such column" in message or "has no column" in message)
    )


def explained(exc: DBAPIError, url: str, *, had_tables: bool) -> Exception:
    """
    Return the error to report to the user; `exc` itself if it is a bug.

    Args:
        url: of the database.
        had_tables: this process has seen the tables, so that they are missing only for now.
    """
    shown = redact(url)
    said = redact(str(exc.orig).strip().splitlines()[0]) if str(exc.orig).strip() else type(exc.orig).__name__
    sqlstate = _sqlstate(exc)
    if sqlstate == "42P01" or "no such table" in said:
        if not had_tables:
            return MissingTableError("the database has no tables yet", hint="run: ganq db upgrade")
        return DatabaseUnavailableError(
            f"the job table was deleted, or this user cannot see it: {said} ({shown})",
            hint="restore it, or grant USAGE on its schema; to start without jobs, stop the workers first",
        )
    if sqlstate == "42501":
        changes = not str(exc.statement or "").lstrip().upper().startswith("SELECT") or "FOR UPDATE" in str(
            exc.statement
        )
        return DatabaseUnavailableError(
            f"this database role may not {'change' if changes else 'read'} jobs: {said} ({shown})",
            hint="grant the user of GANQ_DATABASE_URL all rights on ganq's tables and sequences",
        )
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
    if sqlstate == "53100" or _disk_is_full(exc.orig, url):
        return DatabaseUnavailableError(
            f"the disk of the job table is full ({shown})",
            hint="free space there; accepted jobs are safe, and the workers wait",
        )
    if sqlstate == "53300" or any(words in said for words in NO_ROOM):
        return DatabaseUnavailableError(
            f"the database accepts no more connections: {said} ({shown})",
            hint="raise max_connections, or put PgBouncer in front of it; a worker has up to two connections",
        )
    wrong_sql = getattr(exc.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
    unavailable = (sqlstate or "")[:2] in UNAVAILABLE_CLASSES or sqlstate in RETRY_SQLSTATES
    if unavailable or (isinstance(exc, OperationalError) and not wrong_sql):
        return DatabaseUnavailableError(
            f"the job table cannot be reached: {said} ({shown})",
            hint="check GANQ_DATABASE_URL and that the database runs: ganq doctor",
        )
    return exc


def _sqlstate(exc: DBAPIError) -> str | None:
    return getattr(exc.orig, "sqlstate", None)


def _sqlite_code(exc: DBAPIError) -> int | None:
    """Return the primary result code."""
    code = getattr(exc.orig, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _disk_is_full(orig: Any, url: str) -> bool:
    """Return whether the disk is full: SQLITE_FULL, or an I/O error because the WAL index cannot grow."""
    code = getattr(orig, "sqlite_errorcode", None)
    if code is None or code & 0xFF not in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
    ):
        return False
    if code == sqlite3.SQLITE_FULL:
        return True
    try:
        return shutil.disk_usage(Path(url.removeprefix("sqlite:///")).parent).free < FULL_BYTES
    except OSError:
        return False
