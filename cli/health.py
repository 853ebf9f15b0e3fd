"""`ganq health`: health check of the workers on this machine, for containers."""

import click

from cli.ui import output
from cli.ui.lazy import examples

SETTINGS_TIMEOUT_S = 3.0


@click.command(epilog=examples("ganq health", "ganq health --worker node7-gpu0", "ganq health --json"))
@click.option(
    "--worker", "name", metavar="NAME", help="Check only this worker.  [default: all on this machine]"
)
@output.json_option
def health(name: str | None, as_json: bool) -> int:
    """
    Exit 0 if the workers of this machine are healthy, otherwise 1.

    For health checks of containers. Queries each supervisor directly, not the job table. A
    worker is unhealthy if its supervisor has ended, does not answer within 5 s, is stuck, or
    exceeds its drain timeout. A worker in a long training is healthy, and so is a worker
    without Redis, because it polls the job table. If the database is unavailable, the worker
    is 'degraded' (exit 0): its job continues, and a restart would not help.
    """
    from jobs.errors import GanqError
    from storage.settings import Settings
    from worker.doctor.check import within
    from worker.health import examine
    from worker.host.live_supervisors import Condition, Status

    # Every failure is exit code 1: Docker reserves 2.
    try:
        settings = within(SETTINGS_TIMEOUT_S, Settings.load)
        conditions = examine(settings, name)
        none_found = f"there is no worker {name}" if name else "no worker runs on this machine"
    except GanqError as exc:
        conditions, none_found = [], f"no worker found: {exc.message}"
    except TimeoutError:
        conditions, none_found = [], "no worker found, and the job table does not answer"
    if not conditions:
        conditions = [Condition("", Status.UNHEALTHY, none_found)]
    healthy = all(condition.healthy for condition in conditions)
    if as_json:
        workers = [
            {
                "worker": condition.worker or None,
                "status": condition.status,
                "reason": output.clean(condition.why),
                "why": output.clean(condition.why),  # the name of ganq 0.2
                **condition.facts,
            }
            for condition in conditions
        ]
        output.print_json({"healthy": healthy, "workers": workers})
    else:
        for condition in conditions:
            details = " ".join(filter(None, (condition.worker, condition.why)))
            click.echo(output.clean(f"{condition.status}: {details}"))
    return 0 if healthy else 1
