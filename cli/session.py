"""Settings and job table of a command."""

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from jobs.errors import JobNotFoundError, SchemaMismatchError
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job
    from storage.db.store import JobStore
    from storage.volume.layout import Volume

MAX_COMPLETIONS = 200


@dataclass(frozen=True)
class Session:
    """Settings, database and volume of a command; modules are imported on first use."""

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
    ctx = click.get_current_context(silent=True)
    if ctx is not None:
        ctx.call_on_close(database.dispose)
    return Session(settings, database, Queries(database))


def clean_up_on_sigterm() -> None:
    """
    Make SIGTERM end this command like Ctrl-C, so that partial files are removed.

    Not for all commands: Python handles a signal only after the current call returns, and a command that
    waits for a locked table should end at once.
    """
    import signal

    def exit_(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, exit_)


class JobReference(click.ParamType[str]):
    """The id or name of a job, with shell completion."""

    name = "job"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("the job is empty; ganq status lists ids and names", param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with suppress(Exception):  # errors would disturb the shell
            from storage.db.queries import Filter

            session = open_session()
            jobs = session.queries.page(Filter(), limit=MAX_COMPLETIONS)
            return _completions(jobs, incomplete)
        return []


def _completions(jobs: "list[Job]", incomplete: str) -> list[CompletionItem]:
    items = [CompletionItem(str(job.id), help=f"{job.kind} {job.name or ''} {job.state}") for job in jobs]
    names = dict.fromkeys(job.name for job in jobs if job.name)
    items += [CompletionItem(name, help="newest job with this name") for name in names]
    return [item for item in items if item.value.startswith(incomplete)]


JOB = JobReference()
