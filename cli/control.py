"""`ganq cancel`, `hold` and `release`: control existing jobs."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.session import LABEL_FILTER, OPEN_JOB, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import User
from jobs.errors import GanqError, InvalidTransitionError, SpecError
from jobs.states import JobState

if TYPE_CHECKING:
    from storage.db.rows import Job

F = TypeVar("F", bound=Callable[..., Any])
OPEN = (JobState.QUEUED, JobState.RUNNING)
NO_MATCH = "no job matches"
BULK_THRESHOLD = 50
"""More jobs are cancelled in batches and reported in one line."""


def for_each_job(
    session: Session,
    references: Iterable[str],
    as_json: bool,
    action: "Callable[[Session, Job], Iterable[tuple[Job, str]]]",
) -> int:
    """
    Apply an action to several jobs, continuing after errors.

    Args:
        action: yields each changed job with a description of the change.

    Returns:
        0, or the exit code of the first error.

    Raises:
        OSError: the output could not be written. The action was still applied to all jobs.
    """
    unique = list(dict.fromkeys(references))
    results: list[dict[str, Any]] = []
    failures: list[GanqError] = []
    guard = _OutputGuard()
    for reference in unique:
        try:
            for job, change in action(session, session.queries.find(reference)):
                results.append({"id": job.id, "name": job.name, "state": str(job.state), "done": change})
                if not as_json:
                    name = f" ({output.clean(job.name)})" if job.name else ""
                    guard.write(click.echo, f"job {job.id}{name}: {change}")
        except GanqError as exc:
            if len(unique) == 1 and not results:
                raise
            failures.append(exc)
            error = {"code": exc.code, "message": exc.message, "hint": exc.hint}
            results.append({"job": reference, "error": error})
            if not as_json:
                output.notice(f"error: {exc.message}")
    if as_json:
        guard.write(output.print_json, results)
    guard.finish(", ".join(f"job {entry['id']} {entry['done']}" for entry in results if "done" in entry))
    return failures[0].exit_code if failures else 0


class _OutputGuard:
    """Delay errors of stdout (a full disk, `| head -1`) until all jobs have been processed."""

    def __init__(self) -> None:
        self.error: OSError | None = None

    def write(self, write: Callable[[Any], None], value: Any) -> None:
        try:
            if self.error is None:
                write(value)
        except OSError as exc:
            self.error = exc

    def finish(self, summary: str) -> None:
        """Raise the delayed error, after a notice with the summary."""
        if self.error is None:
            return
        if not isinstance(self.error, BrokenPipeError):
            output.notice(f"the output could not be written; it was: {summary}")
        raise self.error


def selection_options(command: F) -> F:
    """Add the options that select jobs by id, name or filter; select_jobs() reads them."""
    for option in reversed(
        (
            click.argument("jobs", nargs=-1, type=OPEN_JOB),
            click.option(
                "--all",
                "everything",
                is_flag=True,
                help="All queued and running jobs that match the filters.",
            ),
            click.option(
                "--state",
                "states",
                multiple=True,
                type=click.Choice([str(state) for state in OPEN]),
                help="Filter for --all: jobs in this state.",
            ),
            click.option("--kind", help="Filter for --all: jobs of this kind (train, generate, evaluate)."),
            click.option("--user", type=User(), help="Filter for --all: jobs of this user."),
            click.option("--name", help="Filter for --all: jobs whose name contains this text."),
            click.option(
                "--label",
                "labels",
                multiple=True,
                type=LABEL_FILTER,
                help="Filter for --all: jobs with this label; repeatable.",
            ),
            click.option("--sweep", help="All jobs of this sweep (id or name)."),
            click.option("--yes", is_flag=True, help="Do not ask for confirmation of --all or --sweep."),
            click.option(
                "--dry-run", is_flag=True, help="Print the jobs that would be changed; change none."
            ),
            output.json_option,
        )
    ):
        command = option(command)
    return command


def select_jobs(
    session: Session,
    verb: str,
    options: dict[str, Any],
    *,
    states: Sequence[JobState] = OPEN,
    held: bool | None = None,
) -> list[str]:
    """
    Return the selected jobs, newest first; none after a dry run, which prints them.

    Args:
        states, held: those that --all and --sweep select.

    Raises:
        SpecError: no jobs were given, or jobs together with filters.
    """
    named: tuple[str, ...] = options["jobs"]
    filters = {name: options[name] for name in ("kind", "user", "name") if options[name] is not None}
    if options["labels"]:
        from jobs.labels import read_filters

        filters["labels"] = read_filters(options["labels"])
    many = options["everything"] or options["sweep"] is not None
    if named and (many or options["states"] or filters):
        raise SpecError("jobs cannot be combined with --all or filters", hint=f"ganq {verb} {named[0]}")
    if named and options["dry_run"]:
        return print_selected([session.queries.find(one) for one in named], verb, options["as_json"])
    if named:
        return list(named)
    if not many:
        raise SpecError(
            f"no jobs given: {verb} takes ids or names, or --all",
            hint=f"ganq {verb} --all with these filters"
            if filters or options["states"]
            else "ganq status lists jobs",
        )
    if "kind" in filters:
        from jobs.kinds import kind_named

        kind_named(filters["kind"])
    from storage.db.queries import Filter

    sweep = session.queries.find_sweep(options["sweep"]) if options["sweep"] is not None else None
    chosen = tuple(JobState(state) for state in options["states"]) or tuple(states)
    # Newest first: dependent jobs are cancelled before the jobs they wait for, so that none starts.
    found = session.queries.ids(Filter(states=chosen, sweep=sweep, held=held, **filters))
    if not found and not options["as_json"]:
        click.echo(NO_MATCH)
    if options["dry_run"]:
        return print_selected(reversed(session.queries.get_many(found)), verb, options["as_json"])
    if len(found) > 1 and output.on_terminal() and not options["as_json"] and not options["yes"]:
        click.confirm(f"{verb} {output.count(len(found), 'job')}?", abort=True)
    return [str(job_id) for job_id in found]


def print_selected(jobs: "Iterable[Job]", verb: str, as_json: bool) -> list[str]:
    """Print what a command would change; return no job, so that it changes none."""
    rows = [{"id": job.id, "name": job.name, "state": str(job.state), "would": verb} for job in jobs]
    if as_json:
        output.print_json(rows)
    for row in rows if not as_json else ():
        name = f" ({output.clean(str(row['name']))})" if row["name"] else ""
        click.echo(f"would {verb} job {row['id']}{name}: {row['state']}")
    return []


@click.command(
    epilog=examples(
        "ganq cancel 12",
        "ganq cancel 12 13 faces",
        "ganq cancel --all --state queued --user anna",
        "ganq cancel --sweep rates",
    )
)
@selection_options
def cancel(as_json: bool, **options: Any) -> int:
    """
    Cancel JOBS: a queued one at once, a running one at its next step.

    'cancelled' means that the job has ended, 'cancel requested' that its worker was notified:
    the job stops within 15 seconds, unless it succeeds first. Checkpoints of a training
    remain usable.
    """
    session = open_session()
    references = select_jobs(session, "cancel", {**options, "as_json": as_json})
    if not options["jobs"] and len(references) > BULK_THRESHOLD:
        return _cancel_many(session, [int(reference) for reference in references], as_json)
    ended_before: set[int] = set()
    if len(references) > 1:
        for reference in references if options["jobs"] else ():
            try:
                job = session.queries.find(reference)
            except GanqError:
                continue  # reported below
            if job.state.terminal:
                ended_before.add(job.id)

    def action(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        try:
            now = session.store.request_cancel(job.id, by=session.settings.user)
        except InvalidTransitionError:
            now = session.queries.get(job.id)
            by_us = len(references) > 1 and job.id not in ended_before and now.state is JobState.CANCELLED
            if not options["jobs"] and now.state.terminal:
                yield now, str(now.state)  # it has just ended
            elif by_us:
                yield now, "cancelled together with a job that it was waiting on"
            else:
                raise
            return
        yield now, "cancelled" if now.state is JobState.CANCELLED else "cancel requested"

    return for_each_job(session, references, as_json, action)


def _cancel_many(session: Session, ids: Sequence[int], as_json: bool) -> int:
    """Cancel in batches, so that workers can claim and send heartbeats in between."""
    done = session.store.cancel_many(ids)
    if as_json:
        output.print_json_array(
            {"id": job_id, "state": "cancelled", "done": "cancelled"}
            if ended
            else {"id": job_id, "state": "running", "done": "cancel requested"}
            for job_id, ended in done
        )
        return 0
    counts = Counter(ended for _, ended in done)
    running = f"; cancel requested for {output.count(counts[False], 'running job')}" if counts[False] else ""
    click.echo(f"{output.count(counts[True], 'job')} cancelled{running}")
    return 0


@click.command(epilog=examples("ganq hold 12", "ganq hold --all --user ada"))
@selection_options
def hold(as_json: bool, **options: Any) -> int:
    """Prevent queued JOBS from starting until `ganq release`; `ganq pause` also stops running ones."""
    session = open_session()
    jobs = select_jobs(session, "hold", {**options, "as_json": as_json}, states=OPEN[:1], held=False)

    def action(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        yield session.store.hold(job.id, held=True, by=session.settings.user), "held"

    return for_each_job(session, jobs, as_json, action) if jobs else 0


@click.command(epilog=examples("ganq release 12", "ganq release --sweep rates"))
@selection_options
def release(as_json: bool, **options: Any) -> int:
    """Allow held or paused JOBS to start."""
    session = open_session()
    jobs = select_jobs(session, "release", {**options, "as_json": as_json}, held=True)
    return release_jobs(session, jobs, as_json) if jobs else 0


def release_jobs(session: Session, jobs: Sequence[str], as_json: bool) -> int:
    """Release jobs and wake workers for them; return the exit code."""

    def action(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        from cli.submit.notify import notify_workers

        now = session.store.hold(job.id, held=False, by=session.settings.user)
        if now.state is JobState.QUEUED:
            notify_workers(session, now)
        yield now, "resumed" if job.held and (job.attempt or job.state is JobState.RUNNING) else "released"

    return for_each_job(session, jobs, as_json, action)
