"""
Create and upgrade the tables: `ganq db upgrade`.

A migration that only adds keeps `schema_info.compatible_from`, so that workers of the previous version
continue. One that breaks sets it to its own revision; older workers then requeue their jobs and stop.

Workers do not migrate. Only a SQLite file that does not exist is created by the first command that writes,
so that a single machine needs no set-up.
"""

from pathlib import Path

from sqlalchemy import Connection, inspect, text

from jobs.errors import DatabaseUnavailableError, SchemaMismatchError
from storage.db.engine import SCHEMA_REVISION, Database, check_schema, schema_revision
from storage.db.postgres import patient_connections
from storage.db.queries import Queries
from storage.reachable import require_answer
from storage.settings import Settings
from storage.volume.layout import Volume

ADVISORY_LOCK = 0x67616E71  # 'ganq'
UPGRADE_PATIENCE_S = 300.0
"""Time that an upgrade waits for another one, or for open transactions."""


def upgrade(database: Database) -> tuple[str | None, str]:
    """
    Upgrade the tables to this code's schema; concurrent upgrades wait for each other.

    A newer compatible schema is not changed.

    Returns:
        (revision before, revision now).

    Raises:
        SchemaMismatchError: the database is newer, and incompatible.
    """
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")

    def work(conn: Connection) -> tuple[str | None, str]:
        if not database.is_sqlite:  # on SQLite, BEGIN IMMEDIATE is the lock
            _lock_out_others(conn)
        before = schema_revision(conn) if inspect(conn).has_table("alembic_version") else None
        if before is not None and before > SCHEMA_REVISION:
            check_schema(conn)
            return before, before
        config.attributes["connection"] = conn
        command.upgrade(config, "head")
        return before, SCHEMA_REVISION

    with patient_connections(database.engine):
        return database.write(work, patience_s=UPGRADE_PATIENCE_S)


def _lock_out_others(conn: Connection) -> None:
    """Block other upgrades and all claims until the transaction ends."""
    conn.execute(text("SET LOCAL statement_timeout = 0"))
    conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
    if inspect(conn).has_table("alembic_version"):
        # Each claim reads this table in its transaction (check_schema). The lock timeout remains, so that
        # workers do not queue behind an upgrade that itself has to wait.
        conn.execute(text("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE"))


def open_database(settings: Settings, *, create: bool = False, connections: int | None = None) -> Database:
    """
    Open the job table and check its schema.

    Args:
        create: create a SQLite database that does not exist.
        connections: to Postgres; see postgres_engine().

    Raises:
        SchemaMismatchError: there are no tables, or the schema is incompatible.
        DatabaseUnavailableError: the database cannot be reached, or its file was deleted.
    """
    if settings.is_sqlite:
        path = Path(settings.database_url.removeprefix("sqlite:///"))
        if not path.exists():
            _require_no_remains(path)
            if not create:
                raise SchemaMismatchError(
                    f"there is no database at {path} yet",
                    hint="run ganq up to create it, or set GANQ_HOME or GANQ_DATABASE_URL to an existing one",
                    missing=True,
                )
            _make_parent(path)
    database = Database(settings, connections=connections)
    try:
        if create and settings.is_sqlite and database.revision() is None:
            upgrade(database)
        database.require_schema()
    except BaseException:
        database.dispose()
        raise
    return database


def _require_no_remains(path: Path) -> None:
    """Refuse a WAL without its database: it contains commits of a file that was deleted or moved."""
    remains = Path(f"{path}-wal")
    if remains.exists() and not path.exists():  # checked again: another process may be creating both
        raise DatabaseUnavailableError(
            f"the job table {path} has been deleted or moved away; what is left of it is {remains.name}",
            hint="put the file back, or restore a backup; to start without jobs, stop all workers"
            f" and delete {remains.name} and {path.name}-shm",
        )


def _make_parent(path: Path) -> None:
    from storage.volume.durable import raise_storage_error

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise_storage_error(exc, path.parent)


def prepare(settings: Settings) -> str:
    """
    Create the job table and the folders of the volume if they do not exist.

    Returns:
        The id of the job table.

    Raises:
        StorageError, ConfigError: one of them cannot be used, or they do not belong together.
    """
    database = open_database(settings, create=True)
    try:
        require_answer(settings.volume)
        Volume(settings.volume).ensure(Queries(database).any_begun)
        return database.installation
    finally:
        database.dispose()
