"""`ganq cancel`, `hold`, `release`, `retry`: what a person wishes of jobs that exist."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli import output
from cli.lazy import examples
from cli.session import JOB, Session, open_session
from jobs.errors import GanqError, InvalidTransitionError
from jobs.states import JobState

if TYPE_CHECKING:
    from storage.jobs import Job


def _each(references: Sequence[str], as_json: bool, act: "Callable[[Session, Job], tuple[Job, str]]") -> int:
    """
    Do one thing to several jobs; one that cannot does not keep the others from it.

    Returns:
        0, or the exit code of the first that could not.
    """
    session = open_session()
    told: list[dict[str, Any]] = []
    failures: list[GanqError] = []
    for reference in dict.fromkeys(references):
        try:
            job, word = act(session, session.queries.find(reference))
        except GanqError as exc:
            if len(set(references)) == 1:
                raise
            failures.append(exc)
            error = {"code": exc.code, "message": exc.message, "hint": exc.hint}
            told.append({"job": reference, "error": error})
            if not as_json:
                output.notice(f"error: {exc.message}")
            continue
        told.append({"id": job.id, "name": job.name, "state": str(job.state), "done": word})
        if not as_json:
            click.echo(f"job {job.id}{f' ({output.clean(job.name)})' if job.name else ''}: {word}")
    if as_json:
        output.print_json(told)
    return failures[0].exit_code if failures else 0


@click.command(epilog=examples("ganq cancel 12", "ganq cancel 12 13 faces"))
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@output.json_option
def cancel(jobs: tuple[str, ...], as_json: bool) -> int:
    """
    Cancel JOBS: a queued one at once, a running one at its next step.

    Checkpoints that a training job has written stay usable.
    """

    def act(session: Session, job: "Job") -> "tuple[Job, str]":
        now = session.store.request_cancel(job.id)
        return now, "cancelled" if now.state is JobState.CANCELLED else "cancel requested"

    return _each(jobs, as_json, act)


@click.command(epilog=examples("ganq hold 12", "ganq submit train --data faces/ --hold"))
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@output.json_option
def hold(jobs: tuple[str, ...], as_json: bool) -> int:
    """Keep queued JOBS from starting, until `ganq release`."""
    return _each(jobs, as_json, lambda session, job: (session.store.hold(job.id, held=True), "held"))


@click.command(epilog=examples("ganq release 12"))
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@output.json_option
def release(jobs: tuple[str, ...], as_json: bool) -> int:
    """Let held JOBS start."""

    def act(session: Session, job: "Job") -> "tuple[Job, str]":
        now = session.store.hold(job.id, held=False)
        _ring(session, now)
        return now, "released"

    return _each(jobs, as_json, act)


@click.command(
    epilog=examples("ganq retry 12", "ganq retry $(ganq status --state failed --json | jq '.[].id')")
)
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@output.json_option
def retry(jobs: tuple[str, ...], as_json: bool) -> int:
    """
    Submit ended JOBS again: new jobs with the same spec and name, linked to the old ones.

    What has ended stays as it was. A training job starts from the beginning; to go on
    from its last checkpoint use `ganq submit train --continue JOB`.
    """
    import secrets

    def act(session: Session, job: "Job") -> "tuple[Job, str]":
        if not job.state.terminal:
            raise InvalidTransitionError(
                f"job {job.id} is {job.state}, and only an ended job can be retried",
                hint=f"ganq wait {job.id}, or ganq cancel {job.id} first",
            )
        from jobs.kinds import kind_named

        kind = kind_named(job.kind)
        if kind.runner is None:
            raise InvalidTransitionError(
                f"job {job.id} is an {job.kind}, which no worker runs", hint="ganq import does it again"
            )
        after = []
        if kind.needs_model and not session.queries.get(job.spec["source"]).state.terminal:
            after = [job.spec["source"]]
        new = session.store.submit(
            ringing=True,
            after=after,
            kind=job.kind,
            spec=job.spec,
            spec_version=job.spec_version,
            submit_key=secrets.token_hex(16),
            user=session.settings.user,
            name=job.name,
            queue=job.queue,
            priority=job.priority,
            preemptible=job.preemptible,
            retry_of=job.id,
        )
        _ring(session, new)
        return new, f"submitted as a retry of job {job.id}"

    return _each(jobs, as_json, act)


def _ring(session: Session, job: "Job") -> None:
    from cli.acceptance import ring

    ring(session, job)
