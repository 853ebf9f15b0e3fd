"""
Make and upgrade the tables: `ganq db upgrade`.

Workers never do this by themselves. The one exception is a SQLite file that does
not exist yet: the first command that writes creates it, so that a single machine
needs no set-up.
"""

from pathlib import Path

from sqlalchemy import Connection, text

from jobs.errors import SchemaMismatchError
from storage.engine import SCHEMA_REVISION, Database
from storage.settings import Settings

ADVISORY_LOCK = 0x67616E71  # 'ganq'


def upgrade(database: Database) -> tuple[str | None, str]:
    """
    Bring the tables to this code's schema; two at once wait for each other.

    Returns:
        (schema before, schema now).

    Raises:
        SchemaMismatchError: the database is newer than this code.
    """
    from alembic import command
    from alembic.config import Config

    before = database.revision()
    if before is not None and before > SCHEMA_REVISION:
        database.require_schema()
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")

    def work(conn: Connection) -> None:
        if not database.is_sqlite:  # on SQLite, BEGIN IMMEDIATE is the lock
            conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        config.attributes["connection"] = conn
        command.upgrade(config, "head")

    database.write(work)
    return before, SCHEMA_REVISION


def open_database(settings: Settings, *, create: bool = False) -> Database:
    """
    The job table, ready for use.

    Args:
        create: make a SQLite database that does not exist yet.

    Raises:
        SchemaMismatchError: no tables, or another schema than this code's.
        DatabaseUnavailableError: it cannot be reached.
    """
    if settings.is_sqlite:
        path = Path(settings.database_url.removeprefix("sqlite:///"))
        if not path.exists():
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


def _make_parent(path: Path) -> None:
    from storage.durable import raise_storage_error

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise_storage_error(exc, path.parent)
