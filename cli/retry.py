"""`ganq retry`: ended jobs again, and those that ended with them."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from cli.control import for_each_job
from cli.session import JOB, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from jobs.errors import InvalidTransitionError

if TYPE_CHECKING:
    from storage.db.rows import Job

DRAWS_FROM = ("source", "continue_from")
"""Fields of a spec that name another job."""


@click.command(
    epilog=examples(
        "ganq retry 12",
        "ganq retry 12 --with-waiting",
        "ganq retry $(ganq status --state failed --json | jq '.[].id')",
    )
)
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@click.option(
    "--with-waiting", is_flag=True, help="Also the jobs that waited for one of them, and ended with it."
)
@output.json_option
def retry(jobs: Sequence[str], with_waiting: bool, as_json: bool) -> int:
    """
    Submit ended JOBS again: new jobs with the same spec and name, linked to the old ones.

    What has ended stays as it was. A training job starts from the beginning; to go on
    from its last checkpoint use `ganq submit train --continue JOB`.
    """

    def act(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        new = again(session, job, {})
        yield new, f"submitted as a retry of job {job.id}"
        waiting = session.queries.ended_with(job.id)
        if waiting and not with_waiting:
            numbers = ", ".join(str(one.id) for one in waiting[:10]) + (", …" if len(waiting) > 10 else "")
            output.notice(
                f"{output.count(len(waiting), 'job')} that waited for job {job.id} ended with it ({numbers})"
                f" and do not run again (ganq retry --with-waiting takes them along)"
            )
        instead = {job.id: new.id}
        for one in waiting if with_waiting else ():
            repeated = again(session, one, instead)
            instead[one.id] = repeated.id
            yield repeated, f"submitted as a retry of job {one.id}"

    return for_each_job(open_session(), jobs, as_json, act)


def again(session: Session, job: "Job", instead: Mapping[int, int]) -> "Job":
    """
    Submit what an ended job was, anew.

    Args:
        instead: retried jobs and what they are now: it waits for those, and draws from them.

    Raises:
        InvalidTransitionError: it has not ended, or no worker runs its kind.
        SpecError: it waited for another job, too, that has failed.
    """
    from cli.submit.notify import ring
    from jobs.kinds import kind_named

    if not job.state.terminal:
        raise InvalidTransitionError(
            f"job {job.id} is {job.state}, and only an ended job can be retried",
            hint=f"ganq wait {job.id}, or ganq cancel {job.id} first",
        )
    if job.malformed:
        from storage.db.malformed import refusal

        raise refusal(job)
    kind = kind_named(job.kind)
    if kind.runner is None:
        raise InvalidTransitionError(
            f"job {job.id} is an {job.kind}, which no worker runs", hint="ganq import does it again"
        )
    kind.spec_class().from_json(job.spec)  # one that no ganq wrote is refused before it is read
    spec = dict(job.spec)
    for field in DRAWS_FROM:
        if spec.get(field) in instead:
            spec[field] = instead[spec[field]]
    after = [instead.get(needed, needed) for needed, _ in session.queries.needs(job.id)] if instead else []
    source = spec.get("source") if kind.needs_model else None
    if source is not None and not session.queries.get(source).state.terminal:
        after.append(source)
    new = session.store.submit(
        ringing=True,
        parts=[(part.to_json(), part.pictures) for part in kind.spec_class().from_json(spec).split()],
        max_workers=spec.get("max_workers", 0),
        after=after,
        kind=job.kind,
        spec=spec,
        spec_version=job.spec_version,
        submit_key=secrets.token_hex(16),
        user=session.settings.user,
        name=job.name,
        queue=job.queue,
        priority=job.own_priority,
        preemptible=job.preemptible,
        time_limit_s=job.time_limit_s,
        retry_of=job.id,
    )
    ring(session, new)
    return new
