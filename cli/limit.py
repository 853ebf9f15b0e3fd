"""`ganq limit`: limit the running jobs of a user or a queue."""

from shlex import quote

import click

from cli.session import NoJobsYetError, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import User
from jobs.errors import SpecError
from storage.settings import NAME_HINT, WORKER_NAME_PATTERN

UNLIMITED = "none"
WILDCARD = "*"


class MaxRunning(click.ParamType[int]):
    """A number of jobs, or 'none' for no limit (-1)."""

    name = "number|none"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if text == UNLIMITED or value == -1:
            return -1
        if not text.isdigit() or int(text) > 1_000_000:
            self.fail(f"{text[:40]!r} is neither a number from 0 to 1,000,000 nor 'none'", param, ctx)
        return int(text)


@click.command(
    epilog=examples(
        "ganq limit",
        "ganq limit --user ada 2",
        "ganq limit --user '*' 4",
        "ganq limit --queue studio 0",
        "ganq limit --user ada none",
    )
)
@click.argument("max_running", metavar="[MAX]", required=False, type=MaxRunning())
@click.option(
    "--user",
    type=User(wildcard=True),
    help="Limit this user; '*': each user without a limit of their own.",
)
@click.option("--queue", help="Limit this queue; '*': each queue without a limit of its own.")
@output.json_option
def limit(max_running: int | None, user: str | None, queue: str | None, as_json: bool) -> int:
    """
    List the limits, or let at most MAX jobs of a user or a queue run at once.

    0 prevents further jobs from starting; 'none' removes the limit. Running jobs continue.
    Shards of a split job count as jobs.
    """
    from storage.db.quotas import Quotas

    scope, name = ("user", user) if user is not None else ("queue", queue)
    if max_running is None:
        if name is not None:
            raise SpecError(f"no limit given: a number or none, as ganq limit --{scope} {quote(name[:70])} 2")
        return _list(as_json)
    if name is None or (user is not None and queue is not None):
        raise SpecError("a limit applies to one user or one queue", hint="ganq limit --user NAME 2")
    if queue is not None and name != WILDCARD and not WORKER_NAME_PATTERN.fullmatch(name):
        raise SpecError(f"--{scope} {name[:70]!r} is not valid", hint=NAME_HINT)
    quotas = Quotas(open_session(create=True).database)
    target = f"each {scope}" if name == WILDCARD else f"{scope} {name}"
    if max_running < 0:
        quotas.remove(scope, name)
        message = f"{target}: no limit"
    else:
        quotas.set(scope, name, max_running)
        message = f"{target}: at most {output.count(max_running, 'running job')}"
    if as_json:
        output.print_json(
            {"scope": scope, "name": name, "max_running": None if max_running < 0 else max_running}
        )
    else:
        click.echo(message)
    return 0


def _list(as_json: bool) -> int:
    from storage.db.quotas import Quotas

    try:
        found = Quotas(open_session().database).all()
    except NoJobsYetError:
        found = []
    if as_json:
        output.print_json([vars(quota) for quota in found])
    elif found:
        rows = [[q.scope, q.name, str(q.max_running), str(q.running)] for q in found]
        output.print_table(("SCOPE", "NAME", "MAX", "RUNNING"), rows, right=("MAX", "RUNNING"))
    else:
        click.echo("no limits: the number of running jobs is not limited, and users take turns")
    return 0
