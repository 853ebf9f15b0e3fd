"""`ganq wait`: block until jobs have ended, and exit by their fate."""

import click

from cli.session import JOB, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import Seconds
from jobs.errors import SpecError


@click.command(
    epilog=examples(
        "ganq wait 12", "ganq wait 12 13 --timeout 3600 && ganq open 13", "ganq wait faces --json"
    )
)
@click.argument("jobs", nargs=-1, type=JOB)
@click.option("--sweep", help="All jobs of this array: its id, or the name that they begin with.")
@click.option("--timeout", type=Seconds(), help="Give up after so many seconds (exit code 124).")
@output.json_option
def wait(jobs: tuple[str, ...], sweep: str | None, timeout: float | None, as_json: bool) -> int:
    """
    Wait until JOBS have ended, showing their progress.

    Exit code: 0 all succeeded, 1 one failed or was cancelled, 124 the time ran out.
    Ctrl-C stops the waiting, not the jobs.
    """
    from cli.ui.follow import exit_code_of, follow
    from storage.status import job_text

    if not jobs and sweep is None:
        raise SpecError("wait for which jobs? it takes ids and names, or --sweep", hint="ganq status")
    session = open_session()
    ids = list(dict.fromkeys(session.queries.find(one).id for one in jobs))
    if sweep is not None:
        from storage.db.queries import Filter

        members = session.queries.ids(Filter(sweep=session.queries.find_sweep(sweep)))
        ids = list(dict.fromkeys([*ids, *reversed(members)]))
    ended, timed_out = follow(session, ids, timeout_s=timeout, quiet=as_json)
    if as_json:
        around = job_text.StatusContext.of(session.queries, ended)
        output.print_json([job_text.as_json(one, around) for one in ended])
    return exit_code_of(ended, timed_out)
