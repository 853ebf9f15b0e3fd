"""Settings and job table, for the client and for the command line."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.errors import JobNotFoundError, SchemaMismatchError
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job
    from storage.db.store import JobStore
    from storage.volume.layout import Volume


@dataclass(frozen=True)
class Session:
    """Settings, database and volume of a client or a command; modules are imported on first use."""

    settings: Settings
    database: "Database"
    queries: "Queries"

    @property
    def store(self) -> "JobStore":
        from storage.db.store import JobStore

        return JobStore(self.database)

    @property
    def volume(self) -> "Volume":
        """
        Return the shared volume.

        Raises:
            VolumeError: it does not answer; a file access would block for ever.
        """
        from storage.reachable import require_answer
        from storage.volume.layout import Volume

        require_answer(self.settings.volume)
        return Volume(self.settings.volume)

    def volume_of(self, job: "Job") -> "Volume":
        """
        Return the shared volume with the files of a job that has started.

        Raises:
            VolumeError: it does not answer, or this machine does not see it.
        """
        from jobs.errors import VolumeError

        volume = self.volume
        if job.attempt and not volume.jobs.is_dir():
            raise VolumeError(
                f"this machine does not see the volume at {volume.root}",
                hint=f"mount it, or set GANQ_VOLUME to the folder that the worker of job {job.id} uses",
            )
        return volume


class NoJobsYetError(JobNotFoundError):
    """There is no job table yet."""


def open_session(*, create: bool = False, settings: Settings | None = None) -> Session:
    """
    Open the job table.

    Args:
        create: create a SQLite job table if there is none.

    Raises:
        NoJobsYetError: there is none.
        SchemaMismatchError, DatabaseUnavailableError: it cannot be used.
    """
    from storage.db.queries import Queries
    from storage.db.schema import open_database

    settings = settings or Settings.load()
    try:
        database = open_database(settings, create=create)
    except SchemaMismatchError as exc:
        if exc.facts.get("missing"):
            raise NoJobsYetError(
                f"there are no jobs yet (no job table at {settings.database_url.removeprefix('sqlite:///')})",
                hint="the first ganq submit creates it; GANQ_HOME sets its folder",
            ) from exc
        raise
    return Session(settings, database, Queries(database))
