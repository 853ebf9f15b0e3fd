"""Job tables with many queued trainings, on SQLite and on Postgres."""

import secrets
from collections.abc import Iterator
from pathlib import Path

from jobs.kinds import SPEC_VERSION
from jobs.specs import TrainSpec
from storage.db.engine import Database
from storage.db.schema import open_database, upgrade
from storage.db.store import JobStore
from storage.settings import Settings
from tests.services import Postgres, postgres_binaries


def full_tables(work: Path, jobs: int, users: int) -> Iterator[tuple[str, dict[str, str]]]:
    """
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


def fill(settings: Settings, jobs: int, users: int = 1) -> None:
    """Queue so many trainings in a new table, in sweeps of 10,000, of so many users in turn."""
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
        )
    database.dispose()
