"""Job tables with many queued trainings, on SQLite and on Postgres."""

import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sqlalchemy import Connection, text

from jobs.kinds import SPEC_VERSION
from jobs.specs import TrainSpec
from storage.db.engine import Database
from storage.db.schema import open_database, upgrade
from storage.db.store import JobStore
from storage.db.tables import job
from storage.settings import Settings
from tests.services import Postgres, postgres_binaries


def full_tables(work: Path, jobs: int, users: int) -> Iterator[tuple[str, dict[str, str]]]:
    """
    Fill a job table on each database.

    Yields:
        ('SQLite', its GANQ_* variables), then the same for a Postgres that runs until the next step.

    Raises:
        RuntimeError: Postgres is not installed.
    """
    binaries = postgres_binaries()
    if binaries is None:
        raise RuntimeError("this needs Postgres (the dev packages carry it)")
    sqlite = {"GANQ_HOME": str(work / f"table-{secrets.token_hex(3)}")}
    fill(Settings.load(sqlite), jobs, users)
    yield "SQLite", sqlite
    with Postgres(binaries, fsync=True) as postgres:
        other = {"GANQ_HOME": str(work / f"table-{secrets.token_hex(3)}")}
        other["GANQ_DATABASE_URL"] = postgres.url(postgres.create())
        fill(Settings.load(other), jobs, users)
        yield "Postgres", other


def fill(settings: Settings, jobs: int, users: int = 1, *, preemptible: bool = False) -> None:
    """Insert queued trainings into a new table, in sweeps of 10,000, for users in turn."""
    if not settings.is_sqlite:
        empty = Database(settings)
        upgrade(empty)
        empty.dispose()
    database = open_database(settings, create=settings.is_sqlite)
    store = JobStore(database)
    spec = TrainSpec.create(data="/pictures", recipe="sngan").to_json()
    for part in range(jobs // 10_000):
        store.submit_sweep(
            [spec] * 10_000,
            names=[f"job-{part}-{place}" for place in range(10_000)],
            submit_key=secrets.token_hex(16),
            kind="train",
            spec_version=SPEC_VERSION,
            user=f"user{part % users}",
            will_notify=10_000,
            preemptible=preemptible,
        )
    database.dispose()


def growing_tables(work: Path, sizes: Sequence[int], users: int) -> Iterator[tuple[str, int, dict[str, str]]]:
    """
    Yield (database, jobs, its GANQ_* variables) for each database and size; sizes are multiples of the first.

    Raises:
        RuntimeError: Postgres is not installed.
    """
    for name, env in full_tables(work, sizes[0], users):
        for size in sizes:
            if size > sizes[0]:
                multiply(Settings.load(env), sizes[0], size // sizes[0])
            yield name, size, env


def multiply(settings: Settings, first: int, times: int) -> None:
    """Repeat the first jobs until there are `times` as many, faster than they are submitted."""
    copied = [one.name for one in job.columns if one.name != "id"]
    changed = {"submit_key": "substr(submit_key, 1, 58) || '.'"}
    changed |= {"name": "name || '-'", "sweep": "sweep || '.'"}
    names = ", ".join(f'"{name}"' for name in copied)
    values = ", ".join(
        f"{changed[name]} || CAST(:n AS TEXT)" if name in changed else f'"{name}"' for name in copied
    )
    database = Database(settings)

    def again(conn: Connection, number: int) -> None:
        if not database.is_sqlite:
            conn.execute(text("SET LOCAL statement_timeout = 0"))
        before = conn.execute(text("SELECT max(id) FROM job")).scalar_one()
        conn.execute(
            text(f"INSERT INTO job ({names}) SELECT {values} FROM job WHERE id <= :first"),
            {"n": str(number), "first": first},
        )
        conn.execute(
            text(
                "INSERT INTO event (job_id, at, type)"
                " SELECT id, created_at, 'submitted' FROM job WHERE id > :before"
            ),
            {"before": before},
        )

    for number in range(1, times):
        database.write(partial(again, number=number), patience_s=300)
    if not database.is_sqlite:  # autovacuum does it a minute later
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(text("SET statement_timeout = 0"))
            conn.execute(text("VACUUM ANALYZE"))
    database.dispose()
