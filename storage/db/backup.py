"""
Backup and restore of the job table, on SQLite and Postgres alike.

    DIR/table.jsonl.gz   all rows, in one snapshot; a backup of one database can be restored into the other
    DIR/volume.txt       what the rows refer to on the volume, one path a line: rsync --files-from takes it
    DIR/backup.json      version, schema, counts and the SHA-256 of both; written last

The files of the volume are not copied: there may be a hundred million.
"""

import gzip
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, select, text

from jobs.errors import ConfigError, NotFoundError, SchemaMismatchError
from storage.db import tables
from storage.db.engine import SCHEMA_REVISION, Database, schema_revision
from storage.db.queries import Queries
from storage.db.row_files import CHUNK, insert_rows, write_rows
from storage.version import version
from storage.volume.durable import raise_storage_error, sha256_file, write_json

FORMAT = 1
TABLE, VOLUME, ABOUT = "table.jsonl.gz", "volume.txt", "backup.json"


@dataclass(frozen=True)
class Backup:
    """A backup that is whole."""

    folder: Path
    schema: str
    rows: dict[str, int]
    running: int
    made_at: float
    ganq: str


def backup(database: Database, folder: Path) -> Backup:
    """
    Write a backup; workers may run meanwhile.

    Args:
        folder: does not exist yet.

    Raises:
        ConfigError: it exists.
        StorageError: it cannot be written; nothing is left there.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists", hint="name a folder that does not exist yet")
    temp = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        with _snapshot(database) as conn:
            schema = schema_revision(conn)
            if schema != SCHEMA_REVISION:  # unknown columns would be missing
                raise SchemaMismatchError(
                    f"the job table has schema {schema}, this ganq {SCHEMA_REVISION}",
                    hint="use the ganq of the workers",
                )
            rows = _write_rows(conn, temp / TABLE)
            running = conn.execute(select(func.count()).where(tables.job.c.state == "running")).scalar_one()
            _write_paths(conn, temp / VOLUME)
        about = {
            "format": FORMAT,
            "ganq": version(),
            "schema": schema,
            "made_at": time.time(),
            "rows": rows,
            "running": running,
            "sha256": {name: sha256_file(temp / name) for name in (TABLE, VOLUME)},
        }
        write_json(temp / ABOUT, about)
        temp.rename(folder)
    except OSError as exc:
        shutil.rmtree(temp, ignore_errors=True)
        raise_storage_error(exc, folder)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    return open_backup(folder)


@contextmanager
def _snapshot(database: Database) -> Iterator[Connection]:
    """Open a read transaction that sees one moment of all tables."""
    options: dict[str, Any] = {"ganq_read": True}
    if not database.is_sqlite:
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with database.engine.execution_options(**options).begin() as conn:
        if not database.is_sqlite:
            conn.execute(text("SET LOCAL statement_timeout = 0"))
        yield conn


def _write_rows(conn: Connection, path: Path) -> dict[str, int]:
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        streamed = conn.execution_options(yield_per=CHUNK)
        return {table.name: write_rows(streamed, file, table) for table in tables.metadata.sorted_tables}


def _write_paths(conn: Connection, path: Path) -> None:
    """Write the folders of all attempts that have a checkpoint or a result."""
    checkpoints = select(tables.checkpoint.c.path).order_by(tables.checkpoint.c.path)
    results = (
        select(tables.job.c.id, tables.job.c.attempt)
        .where(tables.job.c.state == "succeeded", tables.job.c.attempt > 0)
        .order_by(tables.job.c.id)
    )
    with open(path, "w", encoding="utf-8") as file:
        for row in conn.execute(results):
            file.write(f"jobs/{row.id:06d}/a{row.attempt}\n")
        for row in conn.execute(checkpoints):
            file.write(f"{row.path}\n")


def open_backup(folder: Path) -> Backup:
    """
    Check that a backup is whole.

    Raises:
        NotFoundError: there is no backup.
        ConfigError: it is damaged, or of another format.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        sums, found = about["sha256"], {name: sha256_file(folder / name) for name in (TABLE, VOLUME)}
        opened = Backup(
            folder, about["schema"], about["rows"], about["running"], about["made_at"], about["ganq"]
        )
        known = about["format"] == FORMAT
    except FileNotFoundError as exc:
        raise NotFoundError(
            f"{folder} contains no backup", hint="name a folder that ganq backup wrote"
        ) from exc
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"the backup {folder} cannot be read: {exc}", hint="use another backup") from exc
    if not known:
        raise ConfigError(
            f"{folder} was written by a newer ganq ({opened.ganq})", hint="install that version"
        )
    if damaged := [name for name, digest in found.items() if digest != sums.get(name)]:
        raise ConfigError(f"{folder / damaged[0]} is damaged: its SHA-256 differs", hint="use another backup")
    return opened


def restore(database: Database, found: Backup) -> None:
    """
    Insert a backup into an empty job table of the same schema: all rows, or none.

    Raises:
        ConfigError: the table is not empty, or a worker uses it.
        SchemaMismatchError: the backup has another schema.
    """
    if found.schema != SCHEMA_REVISION:
        raise SchemaMismatchError(
            f"the backup has schema {found.schema}, this ganq {SCHEMA_REVISION}",
            hint=f"restore it with ganq {found.ganq}, then run ganq db upgrade with this version",
        )
    _require_no_workers(database)
    with database.engine.begin() as conn:
        if not database.is_sqlite:
            conn.execute(text("SET LOCAL statement_timeout = 0"))
            conn.execute(text("LOCK TABLE job IN EXCLUSIVE MODE"))
        number = conn.execute(select(func.count()).select_from(tables.job)).scalar_one()
        if number:
            raise ConfigError(
                f"the job table is not empty: it has {number} jobs, which stay as they are",
                hint="restore into a new database (GANQ_DATABASE_URL), or move this one away first",
            )
        for table in reversed(tables.metadata.sorted_tables):
            conn.execute(delete(table))
        _insert_rows(conn, found)
        if not database.is_sqlite:
            _advance_sequences(conn)


def _require_no_workers(database: Database) -> None:
    alive = [one for one in Queries(database).workers() if one.state != "stopped" and one.silent_s < 60.0]
    if alive:
        raise ConfigError(
            f"worker {alive[0].name} uses this job table", hint="stop all workers, then restore"
        )


def _insert_rows(conn: Connection, found: Backup) -> None:
    with gzip.open(found.folder / TABLE, "rt", encoding="utf-8") as file:
        counts = insert_rows(conn, file)
    if counts != {name: number for name, number in found.rows.items() if number}:
        raise ConfigError(
            f"{found.folder / TABLE} does not have the rows that it should", hint="use another backup"
        )


def _advance_sequences(conn: Connection) -> None:
    """Advance the sequences of Postgres beyond the restored ids."""
    for table in tables.metadata.sorted_tables:
        if "id" in table.c:
            sequence = conn.execute(
                text("SELECT pg_get_serial_sequence(:name, 'id')"), {"name": table.name}
            ).scalar()
            highest = conn.execute(select(func.max(table.c.id))).scalar()
            if sequence is not None and highest is not None:
                conn.execute(
                    text("SELECT setval(:sequence, :highest)"), {"sequence": sequence, "highest": highest}
                )


def missing_on_volume(found: Backup, volume: Path) -> list[str]:
    """Return what the rows refer to and the volume does not have."""
    with open(found.folder / VOLUME, encoding="utf-8") as file:
        return [path for line in file if not (volume / (path := line.rstrip("\n"))).exists()]
