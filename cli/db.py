"""`ganq db`: the job table's schema."""

import click

from cli import output
from cli.lazy import Entry, LazyGroup, examples


@click.group(
    cls=LazyGroup,
    entries=(
        Entry("upgrade", "cli.db:upgrade", "Bring the tables to this ganq's schema."),
        Entry("status", "cli.db:status", "Say which schema the database has."),
    ),
    epilog=examples("ganq db upgrade", "ganq db status"),
)
def db() -> None:
    """Make or upgrade the job table."""


@click.command(
    epilog=examples("ganq db upgrade", "GANQ_DATABASE_URL=postgresql://ganq@db/ganq ganq db upgrade")
)
@output.json_option
def upgrade(as_json: bool) -> int:
    """
    Bring the tables to this ganq's schema; makes them where there are none.

    Safe to run twice, and from several machines at once.
    """
    from pathlib import Path

    from storage import schema
    from storage.engine import SCHEMA_REVISION, Database
    from storage.settings import Settings, redact

    settings = Settings.load()
    url = redact(settings.database_url)
    if settings.is_sqlite and not Path(settings.database_url.removeprefix("sqlite:///")).exists():
        schema.open_database(settings, create=True)
        before, now = None, SCHEMA_REVISION
    else:
        before, now = schema.upgrade(Database(settings))
    if as_json:
        output.print_json({"database": url, "before": before, "schema": now})
    elif before == now:
        click.echo(f"{url} already has schema {now}")
    else:
        click.echo(f"{url}: schema {before or 'none'} → {now}")
    return 0


@click.command(epilog=examples("ganq db status", "ganq db status --json"))
@output.json_option
def status(as_json: bool) -> int:
    """Say which schema the database has; exit code 1 unless it is this ganq's."""
    from pathlib import Path

    from storage.engine import SCHEMA_REVISION, Database
    from storage.settings import Settings, redact

    settings = Settings.load()
    absent = settings.is_sqlite and not Path(settings.database_url.removeprefix("sqlite:///")).exists()
    found = None if absent else Database(settings).revision()
    url = redact(settings.database_url)
    if as_json:
        output.print_json({"database": url, "schema": found, "needed": SCHEMA_REVISION})
    elif found == SCHEMA_REVISION:
        click.echo(f"{url} has schema {found}, as this ganq needs")
    else:
        click.echo(
            f"{url} has {f'schema {found}' if found else 'no tables'}; this ganq needs {SCHEMA_REVISION}"
        )
        if found is None or found < SCHEMA_REVISION:
            click.echo("  → ganq db upgrade")
    return 0 if found == SCHEMA_REVISION else 1
