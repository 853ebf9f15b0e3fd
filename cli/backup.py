"""`ganq backup` and `ganq restore`: save the job table, and bring it back into an empty one."""

import time
from pathlib import Path

import click

from cli.ui import output
from cli.ui.lazy import examples

MISSING_SHOWN = 5
DIR = click.Path(file_okay=False, path_type=Path)


@click.command(epilog=examples("ganq backup /backup/2026-11-29", "ganq backup nightly --json"))
@click.argument("folder", metavar="DIR", type=DIR)
@output.json_option
def backup(folder: Path, as_json: bool) -> int:
    """
    Save the job table to the new folder DIR; workers may run meanwhile.

    The backup contains all rows of SQLite or Postgres in one snapshot, and volume.txt, the
    list of folders on the volume that they refer to. Copy the volume after it, e.g. with
    rsync -a --recursive --files-from=DIR/volume.txt VOLUME TARGET.
    """
    from cli.session import clean_up_on_sigterm, open_session
    from storage.db.backup import backup as make

    clean_up_on_sigterm()
    session = open_session()
    made = make(session.database, folder.absolute())
    if as_json:
        output.print_json({"folder": str(made.folder), "schema": made.schema, "rows": made.rows})
    else:
        click.echo(f"{made.folder}: {made.rows['job']} jobs, {sum(made.rows.values())} rows")
        click.echo("copy the volume now: its files are not in the backup")
    return 0


@click.command(
    epilog=examples(
        "ganq restore /backup/2026-11-29",
        "GANQ_DATABASE_URL=postgresql://ganq@db/ganq ganq restore nightly",
    )
)
@click.argument("folder", metavar="DIR", type=DIR)
@output.json_option
def restore(folder: Path, as_json: bool) -> int:
    """
    Restore the backup DIR into an empty job table, of SQLite or Postgres.

    A job table that has jobs, or that a worker uses, is refused and not changed. Jobs that
    ran at the time of the backup are requeued by the first worker. Files that are missing on
    the volume are listed; the exit code is 1 then.
    """
    from pathlib import Path

    from storage.db import schema
    from storage.db.backup import missing_on_volume, open_backup
    from storage.db.backup import restore as insert
    from storage.db.engine import Database
    from storage.reachable import require_answer
    from storage.settings import Settings

    found = open_backup(folder.absolute())  # before a table is created
    settings = Settings.load()
    require_answer(settings.volume)
    if settings.is_sqlite and not Path(settings.database_url.removeprefix("sqlite:///")).exists():
        database = schema.open_database(settings, create=True)
    else:
        database = Database(settings)
        schema.upgrade(database)
    try:
        insert(database, found)
    finally:
        database.dispose()
    missing = missing_on_volume(found, settings.volume)
    if as_json:
        output.print_json({"rows": found.rows, "running": found.running, "missing": missing})
        return 1 if missing else 0
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.made_at))
    click.echo(f"restored {found.rows['job']} jobs of {when}")
    if found.running:
        click.echo(f"{found.running} ran then: the first worker requeues them")
    for path in missing[:MISSING_SHOWN]:
        click.echo(f"missing on the volume: {settings.volume / path}")
    if missing:
        click.echo(
            f"{len(missing)} folders are missing: copy them from the volume's backup, then run ganq doctor"
        )
    return 1 if missing else 0
