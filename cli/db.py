"""`ganq db`: the job table's schema."""

import click

from cli.ui import output
from cli.ui.lazy import Entry, LazyGroup, examples


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

    from storage.db import schema
    from storage.db.engine import SCHEMA_REVISION, Database
    from storage.settings import Settings, redact

    settings = Settings.load()
    url = redact(settings.database_url)
    if settings.is_sqlite and not Path(settings.database_url.removeprefix("sqlite:///")).exists():
        schema.open_database(settings, create=True).dispose()
        before, now = None, SCHEMA_REVISION
    else:
        before, now = schema.upgrade(Database(settings))
    if as_json:
        output.print_json({"database": url, "before": before, "schema": now})
    elif before == now:
        newer = f", newer than this ganq's {SCHEMA_REVISION} and fit for it" if now > SCHEMA_REVISION else ""
        click.echo(f"{url} already has schema {now}{newer}")
    else:
        click.echo(f"{url}: schema {before or 'none'} → {now}")
    return 0


@click.command(epilog=examples("ganq db status", "ganq db status --json"))
@output.json_option
def status(as_json: bool) -> int:
    """Say which schema the database has; exit code 1 unless this ganq can work on it."""
    from pathlib import Path

    from jobs.errors import SchemaMismatchError
    from storage.db.engine import SCHEMA_REVISION, Database
    from storage.settings import Settings, redact

    settings = Settings.load()
    absent = settings.is_sqlite and not Path(settings.database_url.removeprefix("sqlite:///")).exists()
    found, schema_mismatch = None, None
    if not absent:
        database = Database(settings)
        found = database.revision()
        try:
            database.require_schema()
        except SchemaMismatchError as exc:
            schema_mismatch = exc
    usable = found is not None and schema_mismatch is None
    url = redact(settings.database_url)
    if as_json:
        output.print_json({"database": url, "schema": found, "needed": SCHEMA_REVISION, "usable": usable})
    elif found == SCHEMA_REVISION:
        click.echo(f"{url} has schema {found}, as this ganq needs")
    elif usable:
        click.echo(f"{url} has schema {found}, newer than this ganq's {SCHEMA_REVISION} and fit for it")
    else:
        click.echo(
            f"{url} has {f'schema {found}' if found else 'no tables'}; this ganq needs {SCHEMA_REVISION}"
        )
        click.echo(f"  → {(schema_mismatch.hint if schema_mismatch else None) or 'run: ganq db upgrade'}")
    return 0 if usable else 1
