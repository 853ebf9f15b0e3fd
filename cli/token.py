"""`ganq token`: who may use the page and the REST API."""

from typing import TYPE_CHECKING, Any

import click

from cli.session import NoJobsYetError, open_session
from cli.ui import output
from cli.ui.lazy import Entry, LazyGroup, examples
from cli.ui.params import BoundedInt, Duration, User

if TYPE_CHECKING:
    from storage.db.tokens import Token

ROLES = ("viewer", "submitter", "operator", "admin")
NEVER = "never"
COLUMNS = ("ID", "USER", "ROLE", "STATE", "CREATED", "EXPIRES", "LAST USE")


class Expiry(Duration):
    """A length of time, or 'never' (0)."""

    name = "duration|never"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return 0.0 if value in (NEVER, 0.0) else super().convert(value, param, ctx)


@click.group(
    cls=LazyGroup,
    entries=(
        Entry("create", "cli.token:create", "Create a token and print it once."),
        Entry("list", "cli.token:list_", "List the tokens with their last use."),
        Entry("revoke", "cli.token:revoke", "Make tokens invalid."),
    ),
    epilog=examples(
        "ganq token create --user ada --role submitter --expires 90d",
        "ganq token list",
        "ganq token revoke 3",
    ),
)
def token() -> None:
    """Create and revoke tokens of the page and the REST API."""


@click.command(
    epilog=examples(
        "ganq token create --user ada --role submitter > token",
        "ganq token create --user grafana --role viewer --expires never",
    )
)
@click.option("--user", required=True, type=User(), help="Who uses it; owner of the submitted jobs.")
@click.option(
    "--role",
    required=True,
    type=click.Choice(ROLES),
    help="viewer: read; submitter: also submit, and change their own jobs; operator: also change the jobs of "
    "others; admin: also submit for others.",
)
@click.option(
    "--expires",
    "expires_s",
    type=Expiry(),
    default="90d",
    show_default=True,
    help="How long it is valid, e.g. 90d, or never.",
)
@output.json_option
def create(user: str, role: str, expires_s: float, as_json: bool) -> int:
    """
    Create a token and print it.

    The job table contains only a hash of the token: it cannot be shown again.
    """
    from storage.db.tokens import Role, Tokens

    tokens = Tokens(open_session(create=True).database)
    made, text = tokens.create(user, Role(role), expires_s or None)
    if as_json:
        output.print_json({**_facts(made), "token": text})
        return 0
    until = NEVER if made.expires_at is None else output.timestamp(made.expires_at)
    output.notice(f"token {made.id} of {user} ({role}), expires: {until}. It is not shown again:")
    click.echo(text)
    return 0


@click.command(epilog=examples("ganq token list", "ganq token list --json"))
@output.json_option
def list_(as_json: bool) -> int:
    """List the tokens. The last use is exact to a minute."""
    from storage.db.tokens import Tokens

    try:
        found = Tokens(open_session().database).all()
    except NoJobsYetError:
        found = []
    if as_json:
        output.print_json([_facts(one) for one in found])
    elif found:
        output.print_table(COLUMNS, [_row(one) for one in found], right=("ID",))
    else:
        click.echo("no tokens: ganq token create --user USER --role ROLE")
    return 0


@click.command(epilog=examples("ganq token revoke 3"))
@click.argument("tokens", nargs=-1, required=True, type=BoundedInt(1))
@output.json_option
def revoke(tokens: tuple[int, ...], as_json: bool) -> int:
    """Make TOKENS invalid, by the number that `ganq token list` shows."""
    from storage.db.tokens import Tokens

    table = Tokens(open_session().database)
    done = [table.revoke(number) for number in dict.fromkeys(tokens)]
    if as_json:
        output.print_json([_facts(one) for one in done])
        return 0
    for one in done:
        click.echo(f"token {one.id} of {output.clean(one.user)} is revoked")
    return 0


def _facts(one: "Token") -> dict[str, Any]:
    return {
        "id": one.id,
        "user": one.user,
        "role": str(one.role),
        "state": one.state,
        "created_at": one.created_at,
        "expires_at": one.expires_at,
        "revoked_at": one.revoked_at,
        "used_at": one.used_at,
    }


def _row(one: "Token") -> list[str]:
    return [
        str(one.id),
        one.user,
        str(one.role),
        one.state,
        output.timestamp(one.created_at),
        NEVER if one.expires_at is None else output.timestamp(one.expires_at),
        NEVER if one.used_at is None else output.timestamp(one.used_at),
    ]
