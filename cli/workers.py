"""`ganq workers`: who is there, and what they do."""

import click

from cli.session import NoJobsYetError, open_session
from cli.ui import output
from cli.ui.lazy import examples

COLUMNS = ("NAME", "STATE", "JOB", "DEVICE", "HOST", "QUEUES", "LAST SPOKE", "VERSION")


@click.command(epilog=examples("ganq workers", "ganq workers --json"))
@output.json_option
def workers(as_json: bool) -> int:
    """List the workers; one that has not spoken for a minute is shown as silent."""
    try:
        session = open_session()
    except NoJobsYetError:
        if as_json:
            output.print_json_array(())
        else:
            click.echo("no workers yet\n  → ganq up runs everything on this machine")
        return 0
    from storage.status.job_text import SILENT_S

    known = session.queries.workers()
    states = {
        one.name: "silent" if one.silent_s > SILENT_S and one.state != "stopped" else one.state
        for one in known
    }
    if as_json:
        output.print_json_array({**one.__dict__, "status": states[one.name]} for one in known)
        return 0
    if not known:
        click.echo("no workers yet\n  → ganq up runs everything on this machine")
        return 0
    rows = [
        [
            one.name,
            states[one.name],
            "" if one.job_id is None else str(one.job_id),
            one.device,
            one.host,
            one.queues,
            f"{output.duration(one.silent_s)} ago",
            one.version,
        ]
        for one in known
    ]
    output.print_table(COLUMNS, rows, right=("JOB",))
    return 0
