"""`ganq workers`: list the workers and their jobs."""

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cli.session import NoJobsYetError, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from jobs.errors import InvalidTransitionError, NotFoundError
from jobs.states import JobState

if TYPE_CHECKING:
    from storage.db.rows import Job, WorkerRow

COLUMNS = ("NAME", "STATE", "JOB", "USER", "DEVICE", "HOST", "QUEUES", "HEARTBEAT", "VERSION")
NO_WORKERS = "no workers yet\n  → ganq up starts the local stack"


@click.command(epilog=examples("ganq workers", "ganq workers --json", "ganq workers --forget node3-cpu"))
@click.option("--forget", metavar="NAME", help="Remove a worker that has ended from the list.")
@output.json_option
def workers(forget: str | None, as_json: bool) -> int:
    """
    List the workers; a worker without a heartbeat for a minute is 'unresponsive'.

    Workers that have not reported for a week are removed automatically. A removed worker that is alive is
    listed again with its next heartbeat.
    """
    if forget is not None:
        return _forget(forget, as_json)
    try:
        session = open_session()
    except NoJobsYetError:
        if as_json:
            output.print_json_array(())
        else:
            click.echo(NO_WORKERS)
        return 0
    from storage.status.job_text import UNRESPONSIVE_S

    known = [_with_own_job(row, session) for row in session.queries.workers()]
    states = {
        row.name: "unresponsive" if row.silent_s > UNRESPONSIVE_S and row.state != "stopped" else row.state
        for row in known
    }
    if as_json:
        output.print_json_array({**row.__dict__, "status": states[row.name]} for row in known)
        return 0
    if not known:
        click.echo(NO_WORKERS)
        return 0
    ids = [row.job_id for row in known if row.job_id is not None]
    jobs = {job.id: job for job in session.queries.get_many(ids)}
    users = {job.id: job.user for job in jobs.values()}
    rows = [
        [
            row.name,
            states[row.name],
            _job_text(jobs.get(row.job_id or 0)),
            users.get(row.job_id or 0, ""),
            row.device,
            row.host,
            row.queues,
            f"{output.duration(row.silent_s)} ago",
            row.version,
        ]
        for row in known
    ]
    hidden = () if output.several_users(users.values(), session.settings.user) else ("USER",)
    output.print_table(COLUMNS, rows, right=("JOB",), hidden=hidden)
    return 0


def _job_text(job: "Job | None") -> str:
    """Return the id by which `ganq status` lists a job: that of the whole for a shard."""
    if job is None:
        return ""
    return str(job.id) if job.part_of is None else f"{job.part_of} (a shard)"


def _with_own_job(row: "WorkerRow", session: Session) -> "WorkerRow":
    """Return a row without its job, if that has ended, was requeued or runs elsewhere."""
    if row.job_id is None:
        return row
    job = next(iter(session.queries.get_many([row.job_id])), None)
    runs_it = job is not None and job.state is JobState.RUNNING and job.worker == row.name
    return row if runs_it else replace(row, job_id=None)


def _forget(name: str, as_json: bool) -> int:
    """
    Remove a worker from the table; return the exit code.

    Raises:
        NotFoundError: there is no such worker.
        InvalidTransitionError: it is alive.
    """
    from storage.db.workers import WorkerStore
    from storage.status.job_text import UNRESPONSIVE_S

    session = open_session()
    if not WorkerStore.forget(session.database, name, after_s=UNRESPONSIVE_S):
        if any(row.name == name for row in session.queries.workers()):
            raise InvalidTransitionError(f"worker {name} is alive", hint="stop it first (SIGTERM drains it)")
        raise NotFoundError(f"there is no worker {name}", hint="ganq workers lists them")
    if as_json:
        output.print_json({"name": name, "forgotten": True})
    else:
        click.echo(f"worker {name}: forgotten")
    return 0
