"""`ganq keep` and `ganq rm`: which results stay on the volume, and which go now."""

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.control import for_each_job
from cli.session import JOB, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from jobs.errors import GanqError, InvalidTransitionError, SpecError

if TYPE_CHECKING:
    from storage.db.rows import Job
    from storage.gc.sweep import Plan


@click.command(epilog=examples("ganq keep faces", "ganq keep 12 13", "ganq keep --undo 12"))
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@click.option("--undo", is_flag=True, help="Let them be deleted again.")
@output.json_option
def keep(jobs: Sequence[str], undo: bool, as_json: bool) -> int:
    """
    Keep the results of JOBS: neither `ganq gc` nor `ganq rm` deletes them.

    A running training still deletes its own older checkpoints by --keep-last, --keep-every and --keep-best.
    """

    def act(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        yield session.store.keep(job.id, kept=not undo), "no longer kept" if undo else "kept"

    return for_each_job(open_session(), jobs, as_json, act)


@click.command(epilog=examples("ganq rm 12", "ganq rm 12 13 --yes"))
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@click.option("--yes", is_flag=True, help="Do not ask.")
@output.json_option
def rm(jobs: Sequence[str], yes: bool, as_json: bool) -> int:
    """
    Delete the results of ended JOBS: images, samples and checkpoints.

    The job stays in `ganq status` with its history and its log. A job that is kept, or that a queued or
    running job needs, is refused, as is a job of another user. `ganq gc --datasets` deletes decoded data
    sets.
    """
    from storage.gc.policy import Policy
    from storage.gc.sweep import Collector, alone

    session = open_session()
    chosen = list({job.id: job for job in map(session.queries.find, jobs)}.values())
    for job in chosen:
        _require_deletable(session, job)
    grace_s = session.settings.lease_seconds
    policy = Policy(grace_s=grace_s, jobs_s=0.0, only=frozenset(job.id for job in chosen))
    collector = Collector(session.database, session.volume, policy)
    with alone(session.database):
        plan = collector.plan_results([job.id for job in chosen])
        _require_whole(session, chosen, plan, grace_s)
        if plan.items and not yes:
            _confirm(chosen, plan, as_json)
        swept = collector.sweep(plan)
    facts: list[dict[str, Any]] = [
        {
            "id": job.id,
            "name": job.name,
            "count": sum(one.job_id == job.id for one in swept.gone),
            "bytes": sum(one.bytes for one in swept.gone if one.job_id == job.id),
        }
        for job in chosen
    ]
    if as_json:
        output.print_json(facts)
    else:
        for job, fact in zip(chosen, facts, strict=True):
            done = f"deleted, {output.size(fact['bytes'])}" if fact["count"] else "has no results"
            click.echo(f"job {job.id}{_name_text(job)}: {done}")
    for item, why in (*swept.kept, *swept.failed):
        output.notice(f"error: {output.clean(item.path)} was not deleted: {why}")
    return 1 if swept.failed or swept.kept else 0


def _require_deletable(session: Session, job: "Job") -> None:
    """
    Check that the results of a job may be deleted.

    Raises:
        InvalidTransitionError: the job is another user's, has not ended, is kept or a shard, or is needed.
    """
    from storage.gc.scan import needed_jobs

    if job.part_of is not None:
        raise InvalidTransitionError(
            f"job {job.id} is a shard of job {job.part_of}", hint=f"ganq rm {job.part_of}"
        )
    if job.user != session.settings.user:
        raise InvalidTransitionError(
            f"job {job.id} is a job of {job.user}, and rm deletes only your own",
            hint=f"GANQ_USER={shlex.quote(job.user)} ganq rm {job.id}, if that is agreed with {job.user}",
        )
    if not job.state.terminal:
        raise InvalidTransitionError(
            f"job {job.id} is {job.state}, and only the results of ended jobs are deleted",
            hint=f"ganq cancel {job.id} first",
        )
    if job.kept:
        raise InvalidTransitionError(f"job {job.id} is kept", hint=f"ganq keep --undo {job.id} first")
    needed_by = session.database.read(needed_jobs).get(job.id)
    if needed_by is not None:
        raise InvalidTransitionError(
            f"job {needed_by} needs the results of job {job.id}",
            hint=f"ganq wait {needed_by}, or ganq cancel {needed_by}",
        )


def _require_whole(session: Session, jobs: "Sequence[Job]", plan: "Plan", grace_s: float) -> None:
    """
    Check that no worker may still write to a job's folder.

    Raises:
        GanqError: an attempt ended so recently that its worker may not know yet, and may still write.
    """
    now = session.queries.now()
    for job in jobs:
        left_s = max((one["ended_at"] or now for one in session.queries.attempts(job.id)), default=0.0)
        left_s += grace_s - now
        if left_s > 0 and not any(one.job_id == job.id for one in plan.items):
            raise GanqError(
                f"job {job.id} ended moments ago, and its worker may still write",
                hint=f"try again in {max(1, round(left_s))} s",
            )


def _confirm(jobs: "Sequence[Job]", plan: "Plan", as_json: bool) -> None:
    """
    Ask for confirmation.

    Raises:
        SpecError: nobody can be asked.
        click.Abort: the answer is no.
    """
    if as_json or not output.on_terminal():
        raise SpecError("rm asks for confirmation, and there is no terminal", hint="add --yes")
    listed = ", ".join(f"{job.id}{_name_text(job)}" for job in jobs[:10]) + (", …" if len(jobs) > 10 else "")
    total = output.size(sum(one.bytes for one in plan.items))
    click.confirm(f"delete {total} of {'job' if len(jobs) == 1 else 'jobs'} {listed}?", abort=True)


def _name_text(job: "Job") -> str:
    return f" ({output.clean(job.name)})" if job.name else ""
