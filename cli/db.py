"""`ganq db`: the schema of the job table."""

import click

from cli.ui import output
from cli.ui.lazy import Entry, LazyGroup, examples


@click.group(
    cls=LazyGroup,
    entries=(
        Entry("upgrade", "cli.db:upgrade", "Create or migrate the tables."),
        Entry("status", "cli.db:status", "Show the schema version of the database."),
    ),
    epilog=examples("ganq db upgrade", "ganq db status"),
)
def db() -> None:
    """Create or upgrade the job table."""


@click.command(
    epilog=examples("ganq db upgrade", "GANQ_DATABASE_URL=postgresql://ganq@db/ganq ganq db upgrade")
)
@output.json_option
def upgrade(as_json: bool) -> int:
    """
    Create the tables, or migrate them to the schema of this version.

    Can be repeated, and run on several machines at the same time.
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
        newer = f", which is newer than {SCHEMA_REVISION} and compatible" if now > SCHEMA_REVISION else ""
        click.echo(f"{url} already has schema {now}{newer}")
    else:
        click.echo(f"{url}: schema {before or 'none'} → {now}")
    return 0


@click.command(epilog=examples("ganq db status", "ganq db status --json"))
@output.json_option
def status(as_json: bool) -> int:
    """Show the schema version of the database; exit code 1 if this version cannot use it."""
    from pathlib import Path

    from jobs.errors import SchemaMismatchError
    from storage.db.engine import SCHEMA_REVISION, Database
    from storage.settings import Settings, redact

    settings = Settings.load()
    missing = settings.is_sqlite and not Path(settings.database_url.removeprefix("sqlite:///")).exists()
    found, schema_mismatch = None, None
    if not missing:
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
        click.echo(f"{url} has schema {found}, which this version requires")
    elif usable:
        click.echo(f"{url} has schema {found}, which is newer than {SCHEMA_REVISION} and compatible")
    else:
        click.echo(
            f"{url} has {f'schema {found}' if found else 'no tables'}; ganq requires {SCHEMA_REVISION}"
        )
        click.echo(f"  → {(schema_mismatch.hint if schema_mismatch else None) or 'run: ganq db upgrade'}")
    return 0 if usable else 1
