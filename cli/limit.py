"""`ganq limit`: how many jobs of a user or a queue may run at once."""

from shlex import quote

import click

from cli.session import NoJobsYetError, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import User
from jobs.errors import SpecError
from storage.settings import WORD, WORD_HINT

NOBODY = "none"
EVERYBODY = "*"


class Most(click.ParamType[int]):
    """A number of jobs, or 'none' for no limit (-1)."""

    name = "number|none"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        told = str(value)
        if told == NOBODY or value == -1:
            return -1
        if not told.isdigit() or int(told) > 1_000_000:
            self.fail(f"{told[:40]!r} is neither a number from 0 to 1,000,000 nor 'none'", param, ctx)
        return int(told)


@click.command(
    epilog=examples(
        "ganq limit",
        "ganq limit --user ada 2",
        "ganq limit --user '*' 4",
        "ganq limit --queue studio 0",
        "ganq limit --user ada none",
    )
)
@click.argument("most", required=False, type=Most())
@click.option(
    "--user",
    type=User(everybody=True),
    help="The limit is for this user; '*': for each that has none of its own.",
)
@click.option("--queue", help="The limit is for this queue; '*': for each that has none of its own.")
@output.json_option
def limit(most: int | None, user: str | None, queue: str | None, as_json: bool) -> int:
    """
    List the limits, or let at most MOST jobs of a user or a queue run at once.

    0 lets nothing more start; 'none' takes the limit away. What runs already goes on. The
    parts of a split job count like jobs.
    """
    from storage.db.quotas import Quotas

    scope, name = ("user", user) if user is not None else ("queue", queue)
    if most is None:
        if name is not None:
            raise SpecError(f"which limit? say a number or none: ganq limit --{scope} {quote(name[:70])} 2")
        return _list(as_json)
    if name is None or (user is not None and queue is not None):
        raise SpecError("a limit is for one user or one queue", hint="ganq limit --user NAME 2")
    if queue is not None and name != EVERYBODY and not WORD.fullmatch(name):
        raise SpecError(f"--{scope} {name[:70]!r} cannot be used", hint=WORD_HINT)
    quotas = Quotas(open_session(create=True).database)
    whom = f"each {scope}" if name == EVERYBODY else f"{scope} {name}"
    if most < 0:
        quotas.remove(scope, name)
        told = f"{whom}: no limit"
    else:
        quotas.set(scope, name, most)
        told = f"{whom}: at most {output.count(most, 'job')} at once"
    if as_json:
        output.print_json({"scope": scope, "name": name, "max_running": None if most < 0 else most})
    else:
        click.echo(told)
    return 0


def _list(as_json: bool) -> int:
    from storage.db.quotas import Quotas

    try:
        found = Quotas(open_session().database).all()
    except NoJobsYetError:
        found = []
    if as_json:
        output.print_json([vars(one) for one in found])
    elif found:
        rows = [[one.scope, one.name, str(one.max_running), str(one.running)] for one in found]
        output.print_table(("SCOPE", "NAME", "MOST", "RUNNING"), rows, right=("MOST", "RUNNING"))
    else:
        click.echo("no limits: users take turns, and any number of jobs may run")
    return 0
