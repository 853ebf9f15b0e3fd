"""Open the job table of the settings: the database itself, or that of a server."""

from ganq.session import NoJobsYetError, Session
from jobs.errors import SchemaMismatchError
from storage.settings import Settings


def open_session(*, create: bool = False, settings: Settings | None = None, way: str = "python") -> Session:
    """
    Open the job table.

    Args:
        create: create a SQLite job table if there is none.
        way: see Session.

    Raises:
        NoJobsYetError: there is none.
        SchemaMismatchError, DatabaseUnavailableError: it cannot be used.
        UnauthenticatedError: the settings name a server and no token.
    """
    from storage.db.queries import Queries
    from storage.db.schema import open_database

    settings = settings or Settings.load()
    if settings.api_url:
        from ganq.remote.session import open_remote

        return open_remote(settings, way)
    try:
        database = open_database(settings, create=create)
    except SchemaMismatchError as exc:
        if exc.facts.get("missing"):
            raise NoJobsYetError(
                f"there are no jobs yet (no job table at {settings.database_url.removeprefix('sqlite:///')})",
                hint="ganq submit train --data DIR creates it; GANQ_HOME sets its folder",
            ) from exc
        raise
    return Session(settings, database, Queries(database), way)
