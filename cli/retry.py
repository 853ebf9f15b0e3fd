"""`ganq retry`: submit ended jobs again, with the jobs that were cancelled because of them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from cli.control import NO_MATCH, for_each_job, print_selected
from cli.session import ENDED_JOB, LABEL_FILTER, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import Duration, User
from jobs.errors import SpecError

if TYPE_CHECKING:
    from storage.db.rows import Job


@click.command(
    epilog=examples(
        "ganq retry 12",
        "ganq retry 12 --with-waiting",
        "ganq retry --all-failed --since 1d",
    )
)
@click.argument("jobs", nargs=-1, type=ENDED_JOB)
@click.option("--all-failed", is_flag=True, help="All failed jobs that were not retried yet.")
@click.option("--since", type=Duration(), help="With --all-failed: submitted within this time, e.g. 1d.")
@click.option("--user", type=User(), help="With --all-failed: jobs of this user.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    type=LABEL_FILTER,
    help="With --all-failed: jobs with this label; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Print the jobs that would be retried; submit nothing.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation of --all-failed.")
@click.option(
    "--with-waiting",
    is_flag=True,
    help="Also retry the jobs that waited on one of them and ended with it.",
)
@output.json_option
def retry(
    jobs: Sequence[str],
    all_failed: bool,
    since: float | None,
    user: str | None,
    labels: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    with_waiting: bool,
    as_json: bool,
) -> int:
    """
    Submit ended JOBS again: new jobs with the same options and name, linked to the old ones.

    The old jobs are not changed. A training starts from the beginning; to continue from its
    last checkpoint, use `ganq submit train --continue JOB`.
    """
    from cli.submit.accept import report_reused_name
    from cli.submit.notify import notices_of
    from ganq.submission.retry import resubmit
    from jobs.states import JobState

    def action(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        waiting = [] if with_waiting else session.queries.ended_with(job.id)
        for again in resubmit(session, job, with_waiting=with_waiting):
            notices_of(again.notices)
            yield again.new, f"submitted as a retry of job {again.old.id}"
            if again.old.state is JobState.SUCCEEDED:  # its results were reached by that name
                report_reused_name(session, again.new)
        if waiting:
            numbers = ", ".join(str(each.id) for each in waiting[:10]) + (", …" if len(waiting) > 10 else "")
            output.notice(
                f"{output.count(len(waiting), 'job')} that waited on job {job.id} ended with it ({numbers})"
                f" and will not run again (ganq retry --with-waiting includes them)"
            )

    if all_failed == bool(jobs) or (jobs and (since is not None or user or labels)):
        raise SpecError(
            "retry takes ids or names, or --all-failed with its filters",
            hint="ganq retry --all-failed --since 1d",
        )
    session = open_session()
    if all_failed:
        from jobs.labels import read_filters
        from storage.db.queries import Filter

        after = None if since is None else session.queries.now() - since
        wanted = Filter(since=after, user=user, labels=read_filters(labels))
        jobs = [str(job_id) for job_id in session.queries.to_retry(wanted)]
        if not jobs and not as_json:
            click.echo(NO_MATCH)
    if dry_run:
        found = {job.id: job for job in map(session.queries.find, jobs)}
        print_selected(list(found.values()), "retry", as_json)
        return 0
    asks = all_failed and len(jobs) > 1 and output.on_terminal() and not as_json and not yes
    if asks:
        click.confirm(f"retry {output.count(len(jobs), 'job')}?", abort=True)
    return for_each_job(session, jobs, as_json, action)
