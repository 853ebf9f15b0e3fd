"""`ganq retry`: submit ended jobs again, with the jobs that were cancelled because of them."""

from collections.abc import Iterable, Sequence
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
    "--with-waiting",
    is_flag=True,
    help="Also retry the jobs that waited on one of them and ended with it.",
)
@output.json_option
def retry(jobs: Sequence[str], with_waiting: bool, as_json: bool) -> int:
    """
    Submit ended JOBS again: new jobs with the same options and name, linked to the old ones.

    The old jobs are not changed. A training starts from the beginning; to continue from its
    last checkpoint, use `ganq submit train --continue JOB`.
    """

    from cli.submit.notify import notices_of
    from ganq.retry import resubmit

    def action(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        waiting = [] if with_waiting else session.queries.ended_with(job.id)
        for again in resubmit(session, job, with_waiting=with_waiting):
            notices_of(again.notices)
            yield again.new, f"submitted as a retry of job {again.old.id}"
        if waiting:
            numbers = ", ".join(str(each.id) for each in waiting[:10]) + (", …" if len(waiting) > 10 else "")
            output.notice(
                f"{output.count(len(waiting), 'job')} that waited on job {job.id} ended with it ({numbers})"
                f" and will not run again (ganq retry --with-waiting includes them)"
            )

    return for_each_job(open_session(), jobs, as_json, action)
