"""`ganq drain`: have workers return their jobs and exit, from any machine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cli.session import WorkerName, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import Seconds
from jobs.errors import SpecError

if TYPE_CHECKING:
    from storage.db.rows import WorkerRow

EXIT_TIMEOUT = 124


@click.command(epilog=examples("ganq drain node3-gpu0", "ganq drain --host node3 --wait", "ganq drain --all"))
@click.argument("workers", nargs=-1, type=WorkerName())
@click.option("--host", help="All workers of this machine.")
@click.option("--all", "everything", is_flag=True, help="All workers.")
@click.option("--wait", "waits", is_flag=True, help="Wait until they have exited.")
@click.option(
    "--timeout", type=Seconds(), help="With --wait: give up after this many seconds (exit code 124)."
)
@click.option("--dry-run", is_flag=True, help="Print the workers that would be drained; drain none.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation of --host or --all.")
@output.json_option
def drain(
    workers: Sequence[str],
    host: str | None,
    everything: bool,
    waits: bool,
    timeout: float | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """
    Have WORKERS return their jobs and exit, as SIGTERM does.

    A training saves a checkpoint and continues on another worker. A worker sees the request with its
    next heartbeat, within GANQ_HEARTBEAT_SECONDS. `ganq worker` then exits with 0; a service manager or
    container that restarts it always starts it again. Workers of ganq 0.2 ignore the request.
    """
    from ganq.draining import choose, request_drain, wait_until_stopped

    if (bool(workers) + (host is not None) + everything) != 1:
        raise SpecError("drain takes names of workers, --host or --all", hint="ganq workers lists them")
    session = open_session()
    chosen = choose(session, workers, host)
    if not chosen and not as_json:
        click.echo("no worker matches")
    if not (dry_run or workers or yes or as_json) and len(chosen) > 1 and output.on_terminal():
        click.confirm(f"drain {output.count(len(chosen), 'worker')}?", abort=True)
    if not dry_run:
        request_drain(session, chosen)
    rows = [
        {"name": one.name, "host": one.host, "job": one.job_id, "done": _outcome(one, dry_run)}
        for one in chosen
    ]
    if as_json:
        output.print_json(rows)
    for row in rows if not as_json else ():
        click.echo(f"worker {row['name']}: {row['done']}")
    if dry_run or not waits:
        return 0
    left = wait_until_stopped(session, chosen, timeout)
    for name in left:
        output.notice(f"worker {name} has not exited yet; the request stays")
    return EXIT_TIMEOUT if left else 0


def _outcome(row: "WorkerRow", dry_run: bool) -> str:
    from storage.status.job_text import UNRESPONSIVE_S

    job = f"; it returns job {row.job_id}" if row.job_id is not None else ""
    if dry_run:
        return f"would be drained{job}"
    if row.silent_s > UNRESPONSIVE_S:
        return f"drain requested, but it has been silent for {output.duration(row.silent_s)}"
    return f"drain requested{job}"
