"""
Commit submitted jobs, notify the workers, report, and wait on request.

A job is accepted when its row is committed. Whatever fails after that is a notice.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.session import Session
from cli.submit.notify import notify_workers, report_unwritten
from cli.submit.options import SubmitOptions
from cli.ui import output
from jobs.errors import SpecError
from jobs.kinds import SPEC_VERSION, kind_named

if TYPE_CHECKING:
    from jobs.specs import Spec
    from storage.db.rows import Job
    from storage.db.store.sweeps import Sweep


def prerequisites(session: Session, request: SubmitOptions) -> list[int]:
    """
    Return the ids of the jobs of --after.

    Raises:
        JobNotFoundError: one of them does not exist.
    """
    return [session.queries.find(reference).id for reference in request.after]


def submit_job(session: Session, spec: "Spec", request: SubmitOptions, *, after: Sequence[int] = ()) -> int:
    """
    Submit one job; return the exit code.

    Args:
        after: jobs that this one requires, in addition to those of --after.

    Raises:
        JobNotFoundError, SpecError: a job of --after does not exist or has failed.
    """
    named = prerequisites(session, request)
    split = spec.split()
    before = session.queries.by_submit_key(request.submit_key) if request.submit_key else None
    job = session.store.submit(
        **_common(session, spec, request),
        will_notify=True,
        shards=[(shard.to_json(), shard.pictures) for shard in split],
        max_workers=getattr(spec, "max_workers", 0),
        spec=spec.to_json(),
        submit_key=request.submit_key or secrets.token_hex(16),
        name=request.name,
        after=[*dict.fromkeys([*after, *named])],
    )

    def as_json() -> dict[str, Any]:
        from storage.status import job_text

        current = session.queries.get(job.id)
        return job_text.as_json(current, job_text.StatusContext.of(session.queries, [current]))

    def announce() -> None:
        from storage.status import job_text

        if request.name is not None and before is None:
            _report_reused_name(session, job)
        if not request.as_json:
            status = job_text.state(job, job_text.StatusContext.of(session.queries, [job]))
            name = f" ({job.name})" if job.name else ""
            click.echo(f"job {job.id}{name}: {job.kind} {_accepted(before is not None)}, {status}")

    with report_unwritten(f"job {job.id}"):
        _report(
            request,
            announce,
            lambda: notify_workers(session, job),
            as_json,
            f"ganq status {job.id} --watch, ganq logs {job.id} -f",
        )
    return _wait(session, [job.id], request, as_json)


def submit_sweep(
    session: Session,
    specs: "Sequence[Spec]",
    request: SubmitOptions,
    changes: Sequence[dict[str, Any]],
    *,
    after: Sequence[int] = (),
) -> int:
    """
    Submit all jobs of a sweep in one transaction; return the exit code.

    Args:
        changes: the fields that differ, for each spec.
        after: jobs that all of them require.

    Raises:
        JobNotFoundError, SpecError: a job of --after does not exist or has failed; a job would be split.
    """
    from cli.submit.sweep import job_names
    from storage.db.store.sweeps import sweep_id
    from worker.celery_bridge.notify import try_notify
    from worker.celery_bridge.notify_job import MOST_NOTIFIED

    if any(spec.split() for spec in specs):
        raise SpecError(
            "a sweep cannot contain jobs that are split into shards", hint="raise --shard-size above --count"
        )
    kind = specs[0].kind
    submit_key = request.submit_key or secrets.token_hex(16)
    base = request.name or sweep_id(submit_key)
    known = request.submit_key is not None and any(
        session.queries.counts(sweep=sweep_id(submit_key)).values()
    )
    sweep: Sweep = session.store.submit_sweep(
        [spec.to_json() for spec in specs],
        **_common(session, specs[0], request),
        names=job_names(base, changes),
        submit_key=submit_key,
        after=[*dict.fromkeys([*after, *prerequisites(session, request)])],
        will_notify=MOST_NOTIFIED,
    )

    def as_json() -> dict[str, Any]:
        counts = session.queries.counts(sweep=sweep.id)
        return {"sweep": sweep.id, "name": base, "jobs": list(sweep.job_ids), "states": counts}

    def announce() -> None:
        if not request.as_json:
            jobs = f"{output.count(len(specs), 'job')} of kind {kind} {_accepted(known)}"
            click.echo(f"sweep {sweep.id} ({base}): {jobs}, {sweep.job_ids[0]} to {sweep.job_ids[-1]}")

    def notify() -> None:
        first, *others = sorted(session.queries.get_many(sweep.job_ids[:MOST_NOTIFIED]), key=lambda j: j.id)
        notify_workers(session, first)
        for job in others:
            try_notify(session.settings, job.id, job.queue, session.database.installation)

    with report_unwritten(f"sweep {sweep.id}"):
        _report(
            request,
            announce,
            notify,
            as_json,
            f"ganq status --sweep {base}, ganq wait --sweep {base}, ganq cancel --sweep {base}",
        )
    return _wait(session, sweep.job_ids, request, as_json)


def _common(session: Session, spec: "Spec", request: SubmitOptions) -> dict[str, Any]:
    """Return the columns that a job and the jobs of a sweep take from the options."""
    kind = kind_named(spec.kind)
    return {
        "kind": kind.name,
        "spec_version": SPEC_VERSION,
        "user": request.user or session.settings.user,
        "queue": request.queue,
        "priority": kind.priority if request.priority is None else request.priority,
        "preemptible": kind.preemptible and not request.no_preempt,
        "held": request.held,
        "time_limit_s": request.time_limit,
    }


def _accepted(known: bool) -> str:
    return "accepted earlier with this key" if known else "accepted"


def _report(
    request: SubmitOptions,
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
    session: Session, job_ids: Sequence[int], request: SubmitOptions, as_json: Callable[[], Any]
) -> int:
    if not request.wait:
        return 0
    from cli.ui.follow import exit_code_of, follow

    code = exit_code_of(*follow(session, job_ids, quiet=request.as_json))
    if request.as_json:
        output.print_json(as_json())
    return code


def _report_reused_name(session: Session, job: "Job") -> None:
    """Print which job the name referred to until now: a name refers to its newest job."""
    from storage.db.queries import Filter

    for other in session.queries.page(Filter(before_id=job.id, name=job.name), limit=20):
        if other.name == job.name:
            output.notice(f"{job.name} was job {other.id} ({other.state}); it now refers to job {job.id}")
            return
