"""What most commands need: the settings, and the job table if there is one."""

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

COMPLETIONS = 200


@dataclass(frozen=True)
class Session:
    """One command's view of ganq. Imports what it opens only when it is opened."""

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
        The shared volume, for a command that reads or writes there.

        Raises:
            VolumeError: it does not answer; whoever asked it would wait for ever.
        """
        from storage.reachable import require_answer
        from storage.volume.layout import Volume

        require_answer(self.settings.volume)
        return Volume(self.settings.volume)


class NoJobsYetError(JobNotFoundError):
    """There is no job table here: nothing was ever submitted."""


def open_session(*, create: bool = False, settings: Settings | None = None) -> Session:
    """
    Args:
        create: make a SQLite job table that does not exist yet (commands that write the first row).

    Raises:
        NoJobsYetError: there is none, and it is not to be made.
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
                hint="the first ganq submit makes it; GANQ_HOME says where",
            ) from exc
        raise
    ctx = click.get_current_context(silent=True)
    if ctx is not None:
        ctx.call_on_close(database.dispose)
    return Session(settings, database, Queries(database))


def leave_nothing_half_made() -> None:
    """
    From now on SIGTERM ends this command as Ctrl-C does: what it has half made is taken away.

    Not for all commands: Python hears a signal only when the call in hand is over, and one that waits for
    a locked table should be gone at once.
    """
    import signal

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)


class JobReference(click.ParamType[str]):
    """A job's id or name, and not an empty one; the shell completes both."""

    name = "job"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("it is empty; ganq status lists ids and names", param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with suppress(Exception):  # a shell that completes must not be disturbed
            from storage.db.queries import Filter

            session = open_session()
            jobs = session.queries.page(Filter(), limit=COMPLETIONS)
            return _completions(jobs, incomplete)
        return []


def _completions(jobs: "list[Job]", incomplete: str) -> list[CompletionItem]:
    items = [CompletionItem(str(one.id), help=f"{one.kind} {one.name or ''} {one.state}") for one in jobs]
    names = dict.fromkeys(one.name for one in jobs if one.name)
    items += [CompletionItem(name, help="newest job of this name") for name in names]
    return [item for item in items if item.value.startswith(incomplete)]


JOB = JobReference()
