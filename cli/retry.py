"""`ganq retry`: ended jobs again, and those that ended with them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from cli.control import for_each_job
from cli.session import JOB, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples

if TYPE_CHECKING:
    from storage.db.rows import Job


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
    """Submit what an ended job was, anew, and wake the workers; see storage/db/resubmit.py."""
    from cli.submit.notify import ring
    from storage.db.resubmit import resubmit

    new = resubmit(session.queries, session.store, job, user=session.settings.user, instead=instead)
    ring(session, new)
    return new
