"""`ganq cancel`, `hold`, `release`: what a person wishes of jobs that exist."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.session import JOB, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import User
from jobs.errors import GanqError, InvalidTransitionError, SpecError
from jobs.states import JobState

if TYPE_CHECKING:
    from storage.db.rows import Job

F = TypeVar("F", bound=Callable[..., Any])
OPEN = (JobState.QUEUED, JobState.RUNNING)
LISTED = "no job is like that"
LISTED_ONE_BY_ONE = 50
"""More than so many are cancelled by the hundreds, and told of in one line."""


def for_each_job(
    session: Session,
    references: Iterable[str],
    as_json: bool,
    act: "Callable[[Session, Job], Iterable[tuple[Job, str]]]",
) -> int:
    """
    Do one thing to several jobs; one that cannot does not keep the others from it.

    Args:
        act: yields what was done, to which job.

    Returns:
        0, or the exit code of the first that could not.

    Raises:
        OSError: the answer could not be written. What was asked is done all the same, to all of them.
    """
    wanted = list(dict.fromkeys(references))
    told: list[dict[str, Any]] = []
    failures: list[GanqError] = []
    answer = _Answer()
    for reference in wanted:
        try:
            for job, word in act(session, session.queries.find(reference)):
                told.append({"id": job.id, "name": job.name, "state": str(job.state), "done": word})
                if not as_json:
                    name = f" ({output.clean(job.name)})" if job.name else ""
                    answer.give(click.echo, f"job {job.id}{name}: {word}")
        except GanqError as exc:
            if len(wanted) == 1 and not told:
                raise
            failures.append(exc)
            error = {"code": exc.code, "message": exc.message, "hint": exc.hint}
            told.append({"job": reference, "error": error})
            if not as_json:
                output.notice(f"error: {exc.message}")
    if as_json:
        answer.give(output.print_json, told)
    answer.end(lost=", ".join(f"job {one['id']} {one['done']}" for one in told if "done" in one))
    return failures[0].exit_code if failures else 0


class _Answer:
    """What goes to stdout; when that breaks (a full disk, `| head -1`), what is being done goes on."""

    def __init__(self) -> None:
        self.broken: OSError | None = None

    def give(self, write: Callable[[Any], None], what: Any) -> None:
        try:
            if self.broken is None:
                write(what)
        except OSError as exc:
            self.broken = exc

    def end(self, lost: str) -> None:
        """
        Args:
            lost: what the answer says.

        Raises:
            OSError: it could not be written.
        """
        if self.broken is None:
            return
        if not isinstance(self.broken, BrokenPipeError):
            output.notice(f"the answer could not be written; it was: {lost}")
        raise self.broken


def many_options(command: F) -> F:
    """Decorator: which jobs, by name or by what they are like; chosen() reads them."""
    for option in reversed(
        (
            click.argument("jobs", nargs=-1, type=JOB),
            click.option(
                "--all", "everything", is_flag=True, help="All that have not ended, or those of them that …"
            ),
            click.option(
                "--state",
                "states",
                multiple=True,
                type=click.Choice([str(one) for one in OPEN]),
                help="… are in this state;",
            ),
            click.option("--kind", help="… are of this kind: train, generate, evaluate, import;"),
            click.option("--user", type=User(), help="… are of this user;"),
            click.option("--name", help="… have a name that contains this."),
            click.option("--sweep", help="All of this array: its id, or the name that its jobs begin with."),
            click.option("--yes", is_flag=True, help="With --all or --sweep on a terminal: do not ask."),
            output.json_option,
        )
    ):
        command = option(command)
    return command


def chosen(session: Session, verb: str, options: dict[str, Any]) -> list[str]:
    """
    The jobs that many_options() name, newest first.

    Raises:
        SpecError: none were named, or both by name and by what they are like.
    """
    named: tuple[str, ...] = options["jobs"]
    like = {name: options[name] for name in ("kind", "user", "name") if options[name] is not None}
    many = options["everything"] or options["sweep"] is not None
    if named and (many or options["states"] or like):
        raise SpecError("name the jobs, or say --all with what they are like", hint=f"ganq {verb} {named[0]}")
    if named:
        return list(named)
    if not many:
        raise SpecError(
            f"which jobs? {verb} takes ids and names, or --all",
            hint=f"ganq {verb} --all with these filters"
            if like or options["states"]
            else "ganq status lists those that are there",
        )
    if "kind" in like:
        from jobs.kinds import kind_named

        kind_named(like["kind"])
    from storage.db.queries import Filter

    sweep = session.queries.find_sweep(options["sweep"]) if options["sweep"] is not None else None
    states = tuple(JobState(one) for one in options["states"]) or OPEN
    # The newest first: what waits for others goes before them, and nothing starts in between.
    found = session.queries.ids(Filter(states=states, sweep=sweep, **like))
    if not found and not options["as_json"]:
        click.echo(LISTED)
    if len(found) > 1 and output.on_terminal() and not options["as_json"] and not options["yes"]:
        click.confirm(f"{verb} {output.count(len(found), 'job')}?", abort=True)
    return [str(one) for one in found]


@click.command(
    epilog=examples(
        "ganq cancel 12",
        "ganq cancel 12 13 faces",
        "ganq cancel --all --state queued --user anna",
        "ganq cancel --sweep rates",
    )
)
@many_options
def cancel(as_json: bool, **options: Any) -> int:
    """
    Cancel JOBS: a queued one at once, a running one at its next step.

    'cancelled' is said of a job that has ended, 'cancel requested' of one whose worker was
    asked: it stops within 15 seconds, or has succeeded before. Checkpoints that a training
    job has written stay usable.
    """
    session = open_session()
    references = chosen(session, "cancel", {**options, "as_json": as_json})
    if not options["jobs"] and len(references) > LISTED_ONE_BY_ONE:
        return _cancel_many(session, [int(one) for one in references], as_json)
    ended_before: set[int] = set()
    if len(references) > 1:
        for reference in references if options["jobs"] else ():
            try:
                job = session.queries.find(reference)
            except GanqError:
                continue  # it is said below
            if job.state.terminal:
                ended_before.add(job.id)

    def act(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        try:
            now = session.store.request_cancel(job.id)
        except InvalidTransitionError:
            now = session.queries.get(job.id)
            by_us = len(references) > 1 and job.id not in ended_before and now.state is JobState.CANCELLED
            if not options["jobs"] and now.state.terminal:
                yield now, str(now.state)  # it ended by itself just now
            elif by_us:
                yield now, "cancelled, with a job that it waited for"
            else:
                raise
            return
        yield now, "cancelled" if now.state is JobState.CANCELLED else "cancel requested"

    return for_each_job(session, references, as_json, act)


def _cancel_many(session: Session, ids: Sequence[int], as_json: bool) -> int:
    """In transactions of some hundred jobs, so that workers claim and beat meanwhile."""
    done = session.store.cancel_many(ids)
    if as_json:
        words = {True: "cancelled", False: "cancel requested"}
        states = {True: "cancelled", False: "running"}
        output.print_json_array({"id": one, "state": states[end], "done": words[end]} for one, end in done)
        return 0
    ended = asked = 0
    for _, end in done:
        ended, asked = ended + end, asked + (not end)
    running = f"; {output.count(asked, 'running job')} asked to stop" if asked else ""
    click.echo(f"{output.count(ended, 'job')} cancelled{running}")
    return 0


@click.command(epilog=examples("ganq hold 12", "ganq submit train --data faces/ --hold"))
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@output.json_option
def hold(jobs: Sequence[str], as_json: bool) -> int:
    """Keep queued JOBS from starting, until `ganq release`."""

    def act(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        yield session.store.hold(job.id, held=True), "held"

    return for_each_job(open_session(), jobs, as_json, act)


@click.command(epilog=examples("ganq release 12"))
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@output.json_option
def release(jobs: Sequence[str], as_json: bool) -> int:
    """Let held JOBS start."""

    def act(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        from cli.submit.notify import ring

        now = session.store.hold(job.id, held=False)
        ring(session, now)
        yield now, "released"

    return for_each_job(open_session(), jobs, as_json, act)
