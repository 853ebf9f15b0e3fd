"""`ganq workers`: list the workers and their jobs."""

import click

from cli.session import NoJobsYetError, open_session
from cli.ui import output
from cli.ui.lazy import examples

COLUMNS = ("NAME", "STATE", "JOB", "USER", "DEVICE", "HOST", "QUEUES", "HEARTBEAT", "VERSION")
NO_WORKERS = "no workers yet\n  → ganq up starts the local stack"


@click.command(epilog=examples("ganq workers", "ganq workers --json"))
@output.json_option
def workers(as_json: bool) -> int:
    """List the workers; a worker without a heartbeat for a minute is 'unresponsive'."""
    try:
        session = open_session()
    except NoJobsYetError:
        if as_json:
            output.print_json_array(())
        else:
            click.echo(NO_WORKERS)
        return 0
    from storage.status.job_text import UNRESPONSIVE_S

    known = session.queries.workers()
    states = {
        row.name: "unresponsive" if row.silent_s > UNRESPONSIVE_S and row.state != "stopped" else row.state
        for row in known
    }
    if as_json:
        output.print_json_array({**row.__dict__, "status": states[row.name]} for row in known)
        return 0
    if not known:
        click.echo(NO_WORKERS)
        return 0
    ids = [row.job_id for row in known if row.job_id is not None]
    users = {job.id: job.user for job in session.queries.get_many(ids)}
    rows = [
        [
            row.name,
            states[row.name],
            "" if row.job_id is None else str(row.job_id),
            users.get(row.job_id or 0, ""),
            row.device,
            row.host,
            row.queues,
            f"{output.duration(row.silent_s)} ago",
            row.version,
        ]
        for row in known
    ]
    hidden = () if output.several_users(users.values(), session.settings.user) else ("USER",)
    output.print_table(COLUMNS, rows, right=("JOB",), hidden=hidden)
    return 0
