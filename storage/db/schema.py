"""
Make and upgrade the tables: `ganq db upgrade`.

A migration that only adds leaves `schema_info.compatible_from` alone, so that workers of
the version before go on while the new ones start. One that breaks raises it to its own
revision: then older workers give their jobs back and stop by themselves.

Workers never migrate by themselves. The one exception is a SQLite file that does
not exist yet: the first command that writes creates it, so that a single machine
needs no set-up.
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
"""How long an upgrade waits for another one, or for transactions that are still open."""


def upgrade(database: Database) -> tuple[str | None, str]:
    """
    Bring the tables to this code's schema; two at once wait for each other.

    A newer schema that this code may work on is left as it is.

    Returns:
        (schema before, schema now).

    Raises:
        SchemaMismatchError: the database is newer than this code, and not for it.
    """
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")

    def work(conn: Connection) -> tuple[str | None, str]:
        if not database.is_sqlite:  # on SQLite, BEGIN IMMEDIATE is the lock
            _take_alone(conn)
        before = schema_revision(conn) if inspect(conn).has_table("alembic_version") else None
        if before is not None and before > SCHEMA_REVISION:
            check_schema(conn)
            return before, before
        config.attributes["connection"] = conn
        command.upgrade(config, "head")
        return before, SCHEMA_REVISION

    with patient_connections(database.engine):
        return database.write(work, patience_s=UPGRADE_PATIENCE_S)


def _take_alone(conn: Connection) -> None:
    """Keep other upgrades and all claims out until the transaction ends, however long that takes."""
    conn.execute(text("SET LOCAL statement_timeout = 0"))
    conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
    if inspect(conn).has_table("alembic_version"):
        # Whoever claims looks at this table first, in the same transaction (check_schema). The
        # lock timeout stands: workers must not queue behind an upgrade that itself must wait.
        conn.execute(text("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE"))


def open_database(settings: Settings, *, create: bool = False) -> Database:
    """
    The job table, ready for use.

    Args:
        create: make a SQLite database that does not exist yet.

    Raises:
        SchemaMismatchError: no tables, or a schema that is not for this code.
        DatabaseUnavailableError: it cannot be reached, or its file was deleted.
    """
    if settings.is_sqlite:
        path = Path(settings.database_url.removeprefix("sqlite:///"))
        if not path.exists():
            _require_no_remains(path)
            if not create:
                raise SchemaMismatchError(
                    f"there is no database at {path} yet",
                    hint="ganq up makes it; or set GANQ_HOME or GANQ_DATABASE_URL to where it is",
                    missing=True,
                )
            _make_parent(path)
    database = Database(settings)
    try:
        if create and settings.is_sqlite and database.revision() is None:
            upgrade(database)
        database.require_schema()
    except BaseException:
        database.dispose()
        raise
    return database


def _require_no_remains(path: Path) -> None:
    """SQLite deletes its WAL with the last connection: one that lies alone holds commits of a lost file."""
    remains = Path(f"{path}-wal")
    if remains.exists() and not path.exists():  # asked again: somebody may be making both just now
        raise DatabaseUnavailableError(
            f"the job table {path} has been deleted or moved away; what is left of it is {remains.name}",
            hint="put the file back, or restore a backup; to begin with no jobs, stop all workers"
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
    Make the job table and the folders of the volume, where there are none yet.

    Returns:
        The id of the installation.

    Raises:
        StorageError, ConfigError: one of the two cannot be used, or they do not belong together.
    """
    database = open_database(settings, create=True)
    try:
        require_answer(settings.volume)
        Volume(settings.volume).ensure(Queries(database).any_begun)
        return database.installation
    finally:
        database.dispose()
