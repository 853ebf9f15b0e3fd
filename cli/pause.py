"""`ganq pause` and `ganq resume`: stop running jobs with their work saved, and continue them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from cli.control import OPEN, for_each_job, release_jobs, select_jobs, selection_options
from cli.session import Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import Seconds

if TYPE_CHECKING:
    from storage.db.rows import Job

EXIT_TIMEOUT = 124


@click.command(
    epilog=examples(
        "ganq pause faces", "ganq pause 12 --reason 'demo at noon' --wait", "ganq pause --all --user ada"
    )
)
@selection_options
@click.option("--reason", help="Text for the history of the job.")
@click.option("--wait", "waits", is_flag=True, help="Wait until the workers have stopped the jobs.")
@click.option(
    "--timeout", type=Seconds(), help="With --wait: give up after this many seconds (exit code 124)."
)
def pause(as_json: bool, reason: str | None, waits: bool, timeout: float | None, **options: Any) -> int:
    """
    Stop running JOBS and hold them until `ganq resume`; queued ones are held.

    The worker of a training saves a checkpoint at the next step and takes the next job; the result
    after `ganq resume` is bit-identical to that of an uninterrupted run. A generation keeps its
    finished shards, and starts from its beginning if it has none. An evaluation starts from its beginning.
    A job whose worker is unresponsive is held when it is requeued.
    """
    session = open_session()
    jobs = select_jobs(session, "pause", {**options, "as_json": as_json}, states=OPEN, held=False)
    ids: list[int] = []

    def action(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        from storage.status import job_text

        now = session.store.pause(job.id, by=session.settings.user, reason=reason)
        ids.append(now.id)
        yield now, job_text.after_pause(now, job_text.StatusContext.of(session.queries, [now]))

    code = for_each_job(session, jobs, as_json, action) if jobs else 0
    return _wait(session, ids, timeout, as_json) or code if waits and ids else code


def _wait(session: Session, ids: list[int], timeout: float | None, as_json: bool) -> int:
    """Wait until none of the jobs is running, and print a line for each one."""
    from ganq.job import wait_until_stopped
    from storage.status import job_text

    stopped, running = wait_until_stopped(session.queries, ids, timeout)
    context = job_text.StatusContext.of(session.queries, stopped)
    for job in stopped if not as_json else ():
        at = ", ".join(filter(None, (job_text.state(job, context), job_text.progress(job))))
        click.echo(f"job {job.id}: {output.clean(at)}")
    for job in running:
        output.notice(f"job {job.id} has not stopped yet; the request stays")
    return EXIT_TIMEOUT if running else 0


@click.command(epilog=examples("ganq resume faces", "ganq resume --all"))
@selection_options
def resume(as_json: bool, **options: Any) -> int:
    """Continue paused JOBS, and let held ones start. A pause that has not taken effect is withdrawn."""
    session = open_session()
    jobs = select_jobs(session, "resume", {**options, "as_json": as_json}, held=True)
    return release_jobs(session, jobs, as_json) if jobs else 0
