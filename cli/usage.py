"""`ganq usage`: worker-hours and GPU-hours of users, queues or job kinds."""

from typing import cast

import click

from cli.session import NoJobsYetError, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import Duration

COLUMNS = ("JOBS", "ATTEMPTS", "WORKER-HOURS", "GPU-HOURS")
MONTH_S = 30 * 86400.0


@click.command(
    epilog=examples("ganq usage", "ganq usage --by queue --since 7d", "ganq usage --by kind --json")
)
@click.option(
    "--by",
    type=click.Choice(("user", "queue", "kind")),
    default="user",
    show_default=True,
    help="What to sum the hours for.",
)
@click.option("--since", type=Duration(), metavar="TIME", help="E.g. 12h or 7d.  [default: 30d]")
@output.json_option
def usage(by: str, since: float | None, as_json: bool) -> int:
    """
    Sum the time that attempts took on workers.

    An attempt counts from its start to its end, or until now; several attempts of a job
    add up. GPU-hours are the part on workers with a GPU.
    """
    since_s = MONTH_S if since is None else since
    try:
        session = open_session()
    except NoJobsYetError:
        found = []
    else:
        from storage.db.queries import UsageKey

        found = session.queries.usage(cast(UsageKey, by), since_s)
    if as_json:
        output.print_json_array(
            {
                by: row.name,
                "jobs": row.jobs,
                "attempts": row.attempts,
                "worker_hours": round(row.worker_s / 3600, 6),
                "gpu_hours": round(row.gpu_s / 3600, 6),
            }
            for row in found
        )
        return 0
    if not found:
        click.echo(f"no attempt ran in the last {output.duration(since_s)}")
        return 0
    rows = [
        [row.name, str(row.jobs), str(row.attempts), _hours(row.worker_s), _hours(row.gpu_s)] for row in found
    ]
    output.print_table((by.upper(), *COLUMNS), rows, right=COLUMNS)
    return 0


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.2f}"
