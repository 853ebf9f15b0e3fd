"""`ganq wait`: block until jobs have ended; the exit code depends on their outcome."""

import click

from cli.session import JOB, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import Seconds
from jobs.errors import SpecError


@click.command(
    epilog=examples(
        "ganq wait 12",
        "ganq wait 12 13 --timeout 3600 && ganq open 13",
        "ganq wait faces --json",
        "ganq wait faces --notify",
    )
)
@click.argument("jobs", nargs=-1, type=JOB)
@click.option("--sweep", help="All jobs of this sweep (id or name).")
@click.option("--timeout", type=Seconds(), help="Give up after this many seconds (exit code 124).")
@click.option("--notify", is_flag=True, help="Then ring the terminal's bell and show a desktop notification.")
@output.json_option
def wait(jobs: tuple[str, ...], sweep: str | None, timeout: float | None, notify: bool, as_json: bool) -> int:
    """
    Wait until JOBS have ended, and show their progress.

    Exit code: 0 all succeeded, 1 at least one failed or was cancelled, 124 timeout.
    Ctrl-C stops waiting; the jobs continue.
    """
    from cli.ui.follow import exit_code_of, follow, summary
    from cli.ui.notify_here import notify_here
    from storage.status import job_text

    if not jobs and sweep is None:
        raise SpecError("no jobs given: wait takes ids or names, or --sweep", hint="ganq status lists jobs")
    session = open_session()
    ids = list(dict.fromkeys(session.queries.find(reference).id for reference in jobs))
    if sweep is not None:
        from storage.db.queries import Filter

        members = session.queries.ids(Filter(sweep=session.queries.find_sweep(sweep)))
        ids = list(dict.fromkeys([*ids, *reversed(members)]))
    ended, timed_out = follow(session, ids, timeout_s=timeout, quiet=as_json)
    if notify:
        notify_here(summary(ended, timed_out))
    if as_json:
        context = job_text.StatusContext.of(session.queries, ended)
        output.print_json([job_text.as_json(job, context) for job in ended])
    return exit_code_of(ended, timed_out)
