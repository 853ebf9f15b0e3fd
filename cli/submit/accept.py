"""Report submitted jobs, notify the workers, and wait on request. ganq.submission.accept commits the jobs."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.session import Session, open_session
from cli.submit import sweep
from cli.submit.notify import notices_of, report_unwritten
from cli.submit.options import CommandOptions
from cli.ui import output
from ganq.submission.accept import (
    UnresolvedRequest,
    accept_job,
    accept_sweep,
    job_with_same_name,
    notify_for_many,
    notify_workers,
)
from jobs.errors import SpecError

if TYPE_CHECKING:
    from jobs.specs import Spec
    from storage.db.rows import Job


def submit_unresolved(
    kind: str, options: dict[str, Any], request: CommandOptions, spec: "type[Spec]", never: Sequence[str]
) -> int:
    """
    Submit to a server (GANQ_API_URL), which checks the options; return the exit code.

    Args:
        never: fields that cannot be swept.

    Raises:
        SpecError: an option needs the job table, or the volume.
    """
    options = {name: value for name, value in options.items() if value is not None}
    out = options.pop("out", None)
    if out is not None and not request.wait:
        raise SpecError("with GANQ_API_URL, --out needs --wait", hint="or later: ganq download JOB --out DIR")
    changes = sweep.combinations(spec, request.sweep, options, never=never)
    session, asked = open_session(), UnresolvedRequest(kind, options)
    if request.sweep:
        return submit_sweep(session, asked, request, changes)
    return submit_job(session, asked, request, out=out)


def submit_job(
    session: Session,
    spec: "Spec | UnresolvedRequest",
    request: CommandOptions,
    *,
    after: Sequence[int] = (),
    out: str | None = None,
) -> int:
    """
    Submit one job; return the exit code. See ganq.submission.accept.accept_job().

    Args:
        out: folder to which the result is copied from the server when the job has ended.
    """
    accepted = accept_job(session, spec, request, after=after)
    job = accepted.job

    def as_json() -> dict[str, Any]:
        from storage.status import job_text

        current = session.queries.get(job.id)
        return job_text.as_json(current, job_text.StatusContext.of(session.queries, [current]))

    def announce() -> None:
        from storage.status import job_text

        if not accepted.known:
            report_reused_name(session, job)
        if not request.as_json:
            status = job_text.state(job, job_text.StatusContext.of(session.queries, [job]))
            name = f" ({job.name})" if job.name else ""
            click.echo(f"job {job.id}{name}: {job.kind} {_accepted(accepted.known)}, {status}")

    with report_unwritten(f"job {job.id}"):
        _report(
            request,
            announce,
            lambda: notices_of(notify_workers(session, job)),
            as_json,
            f"ganq release {job.id}" if job.held else f"ganq status {job.id} --watch, ganq logs {job.id} -f",
        )
    code = _wait(session, [job.id], request, as_json)
    if out is not None and code == 0:
        from pathlib import Path

        session.download(session.queries.get(job.id), Path(out).expanduser().absolute(), None)
    return code


def submit_sweep(
    session: Session,
    specs: "Sequence[Spec] | UnresolvedRequest",
    request: CommandOptions,
    changes: Sequence[dict[str, Any]],
    *,
    after: Sequence[int] = (),
) -> int:
    """Submit all jobs of a sweep; return the exit code. See ganq.submission.accept.accept_sweep()."""
    accepted = accept_sweep(session, specs, request, changes, after=after)
    kind = specs.kind if isinstance(specs, UnresolvedRequest) else specs[0].kind
    made, base = accepted.sweep, accepted.name

    def as_json() -> dict[str, Any]:
        counts = session.queries.counts(sweep=made.id)
        return {"sweep": made.id, "name": base, "jobs": list(made.job_ids), "states": counts}

    def announce() -> None:
        if not request.as_json:
            jobs = f"{output.count(len(made.job_ids), 'job')} of kind {kind} {_accepted(accepted.known)}"
            click.echo(f"sweep {made.id} ({base}): {jobs}, {made.job_ids[0]} to {made.job_ids[-1]}")

    with report_unwritten(f"sweep {made.id}"):
        _report(
            request,
            announce,
            lambda: notices_of(notify_for_many(session, made.job_ids)),
            as_json,
            f"ganq status --sweep {base}, ganq wait --sweep {base}, ganq cancel --sweep {base}",
        )
    return _wait(session, made.job_ids, request, as_json)


def _accepted(known: bool) -> str:
    return "accepted earlier with this key" if known else "accepted"


def _report(
    request: CommandOptions,
    announce: Callable[[], None],
    notify: Callable[[], None],
    as_json: Callable[[], Any],
    next_commands: str,
) -> None:
    """Print what was accepted; notify the workers even if it cannot be printed."""
    try:
        announce()
    finally:
        notify()
    if request.wait:
        return
    if request.as_json:
        output.print_json(as_json())
    else:
        click.echo(f"  → {next_commands}")


def _wait(
    session: Session, job_ids: Sequence[int], request: CommandOptions, as_json: Callable[[], Any]
) -> int:
    if not request.wait:
        return 0
    from cli.ui.follow import exit_code_of, follow

    code = exit_code_of(*follow(session, job_ids, quiet=request.as_json))
    if request.as_json:
        output.print_json(as_json())
    return code


def report_reused_name(session: Session, job: "Job") -> None:
    if job.name and (other := job_with_same_name(session, job)) is not None:
        output.notice(f"{job.name} was job {other.id} ({other.state}); it now refers to job {job.id}")
