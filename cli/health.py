"""`ganq health`: whether the workers of this machine are well, for a container's health check."""

import click

from cli.ui import output
from cli.ui.lazy import examples

SETTINGS_S = 3.0


@click.command(epilog=examples("ganq health", "ganq health --worker node7-gpu0", "ganq health --json"))
@click.option("--worker", "name", metavar="NAME", help="This one.  [default: all workers of this machine]")
@output.json_option
def health(name: str | None, as_json: bool) -> int:
    """
    Exit 0 if this machine's workers are well, 1 otherwise: for a container's health check.

    Asks each supervisor itself, not the job table. Unhealthy: it has ended, does not
    answer within 5 s (stopped, frozen), is stuck, or drains for longer than it may. A
    worker in a long training is healthy. So is one that Redis or Celery has gone deaf
    on: it looks at the job table by itself. With the database away it is 'degraded',
    exit 0: its work goes on, and a restart would mend nothing.
    """
    from jobs.errors import GanqError
    from storage.settings import Settings
    from worker.doctor.check import within
    from worker.health import examine
    from worker.host.live_supervisors import Condition, Status

    # Every failure is exit code 1: Docker keeps 2 for itself.
    try:
        settings = within(SETTINGS_S, Settings.load)
        conditions = examine(settings, name)
        nobody = f"no worker called {name} is known" if name else "no worker runs on this machine"
    except GanqError as exc:
        conditions, nobody = [], f"no worker is found here: {exc.message}"
    except TimeoutError:
        conditions, nobody = [], "no worker is found here, and the job table does not answer"
    if not conditions:
        conditions = [Condition("", Status.UNHEALTHY, nobody)]
    well = all(one.healthy for one in conditions)
    if as_json:
        told = [
            {"worker": one.worker or None, "status": one.status, "why": output.clean(one.why), **one.facts}
            for one in conditions
        ]
        output.print_json({"healthy": well, "workers": told})
    else:
        for one in conditions:
            click.echo(output.clean(f"{one.status}: {' '.join(filter(None, (one.worker, one.why)))}"))
    return 0 if well else 1
