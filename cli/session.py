"""Settings and job table of a command."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ganq import opening
from ganq.session import NoJobsYetError as NoJobsYetError
from ganq.session import Session as Session
from jobs.kinds import KINDS
from jobs.states import TERMINAL, JobState
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.db.rows import Job

MAX_COMPLETIONS = 200


def open_session(*, create: bool = False, settings: Settings | None = None) -> Session:
    """Open the job table until the command ends; see ganq.opening.open_session()."""
    session = opening.open_session(create=create, settings=settings, way="cli")
    ctx = click.get_current_context(silent=True)
    if ctx is not None:
        ctx.call_on_close(session.database.dispose)
    return session


def open_archive(session: Session) -> Session:
    """Return a session whose job table has the archived jobs alone, until the command ends."""
    from tempfile import TemporaryDirectory

    from storage.db.queries import Queries
    from storage.gc.archive import read_archive

    ctx = click.get_current_context()
    folder = ctx.with_resource(TemporaryDirectory(prefix="ganq-archive-"))
    database, notes = read_archive(session.settings, session.volume, session.database, Path(folder))
    ctx.call_on_close(database.dispose)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    return Session(session.settings, database, Queries(database))


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
    """
    The id or name of a job, with shell completion.

    Args:
        states, kinds: of the jobs that the shell offers, because the command does something with them alone;
            None: all.
    """

    name = "job"

    def __init__(
        self, *, states: tuple[JobState, ...] | None = None, kinds: Sequence[str | None] = (None,)
    ) -> None:
        self.states, self.kinds = states, kinds

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
            wanted = [Filter(states=self.states, kind=kind) for kind in self.kinds]
            jobs = [job for one in wanted for job in session.queries.page(one, limit=MAX_COMPLETIONS)]
            return _completions(jobs, incomplete)
        return []


def _completions(jobs: "list[Job]", incomplete: str) -> list[CompletionItem]:
    items = [CompletionItem(str(job.id), help=f"{job.kind} {job.name or ''} {job.state}") for job in jobs]
    names = dict.fromkeys(job.name for job in jobs if job.name)
    items += [CompletionItem(name, help="newest job with this name") for name in names]
    return [item for item in items if item.value.startswith(incomplete)]


JOB = JobReference()
OPEN_JOB = JobReference(states=tuple(state for state in JobState if state not in TERMINAL))
ENDED_JOB = JobReference(states=tuple(TERMINAL))
TRAINING = JobReference(kinds=["train"])
MODEL = JobReference(kinds=[kind.name for kind in KINDS.values() if kind.makes_model])


class LabelText(click.ParamType[str]):
    """
    A label 'key=value', with shell completion.

    Args:
        filter: also accept 'key', which matches any value.
    """

    def __init__(self, *, filter: bool = False) -> None:
        self.filter = filter
        self.name = "key[=value]" if filter else "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from jobs.errors import SpecError
        from jobs.labels import read_filters, read_label

        try:
            _ = read_filters([str(value)]) if self.filter else read_label(str(value))
        except SpecError as exc:
            self.fail(f"{exc.message}; {exc.hint}", param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with suppress(Exception):  # errors would disturb the shell
            known = open_session().queries.label_texts(MAX_COMPLETIONS)
            return [CompletionItem(one) for one in known if one.startswith(incomplete)]
        return []


class WorkerName(click.ParamType[str]):
    """The name of a worker, with shell completion."""

    name = "worker"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with suppress(Exception):  # errors would disturb the shell
            known = open_session().queries.workers()
            return [
                CompletionItem(one.name, help=one.state) for one in known if one.name.startswith(incomplete)
            ]
        return []


LABEL = LabelText()
LABEL_FILTER = LabelText(filter=True)
