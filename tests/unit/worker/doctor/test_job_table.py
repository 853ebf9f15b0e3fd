"""`ganq doctor` reports problems and what to do about them: the job table."""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from worker.doctor import job_table
from worker.doctor.check import Finding
from worker.doctor.facts import Facts
from worker.doctor.job_table import check_job_table

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.engine import Database
    from storage.db.rows import Job
    from storage.settings import Settings


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """SQLite, unless the test asks for Postgres."""
    return str(getattr(request, "param", "sqlite"))


def look(settings: "Settings") -> list[Finding]:
    facts = Facts()
    found = list(check_job_table(settings, facts))
    facts.close()
    return found


def test_an_older_schema_fails_with_the_command(ganq: "Ganq", database: "Database") -> None:
    database.write(lambda conn: conn.execute(text("UPDATE alembic_version SET version_num = '0000'")))
    result = ganq("doctor")
    assert result.code == 1
    assert "→ run: ganq db upgrade" in result.out


def test_a_file_that_is_no_database_fails_with_one_finding(ganq: "Ganq", settings: "Settings") -> None:
    Path(settings.database_url.removeprefix("sqlite:///")).write_bytes(b"no database" * 1000)
    result = ganq("doctor", "--json")
    assert result.code == 1
    (reported,) = result.findings()["database"]
    assert "is not a SQLite database" in reported["message"]
    assert reported["hint"] == "move it away, or restore a backup"


def test_sqlite_on_a_network_file_system_fails(ganq: "Ganq", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.db.engine.filesystem_type", lambda folder: "nfs4")
    result = ganq("doctor")
    assert result.code == 1
    assert "SQLite cannot be used on nfs4" in result.out


def test_an_sqlite_with_the_wal_defect_is_reported_with_its_protection(
    ganq: "Ganq", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.doctor.job_table.WAL_RESET_FIXED", (99, 0, 0))
    (reported,) = ganq("doctor", "--json").findings()["sqlite"]
    assert reported["level"] == "ok" or sqlite3.sqlite_version_info >= (3, 51, 3)
    assert "fixed in 99.0.0" in reported["message"] or "99.0.0" in reported["hint"]


def test_an_sqlite_with_the_wal_defect_and_no_guard_fails(
    ganq: "Ganq", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.doctor.job_table.WAL_RESET_FIXED", (99, 0, 0))
    monkeypatch.setattr("storage.db.sqlite.WAL_RESET_FIXED", (3, 0, 0))  # as if it had none
    (reported,) = ganq("doctor", "--json").findings()["sqlite"]
    assert reported["level"] == "error"
    assert "checkpoints by itself every 4000 pages" in reported["message"]


def test_a_job_table_that_anyone_can_write_fails(ganq: "Ganq", settings: "Settings") -> None:
    Path(settings.database_url.removeprefix("sqlite:///")).chmod(0o666)
    result = ganq("doctor")
    assert result.code == 1
    assert "is writable by all users, who then control ganq" in result.out


def test_a_process_that_holds_the_write_lock_fails_and_is_not_waited_for(
    ganq: "Ganq", settings: "Settings", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_table, "LOCKED_S", 0.3)
    path = settings.database_url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        result = ganq("doctor")
        assert time.monotonic() - began < 5
        holder.execute("ROLLBACK")
    assert result.code == 1
    assert "has held the lock" in result.out
    assert f"fuser -v {path}" in result.out


def test_a_large_wal_is_a_warning(
    ganq: "Ganq", monkeypatch: pytest.MonkeyPatch, database: "Database", job_factory: "Callable[..., Job]"
) -> None:
    monkeypatch.setattr("worker.doctor.job_table.LARGE_WAL_BYTES", 0)
    job_factory()
    reported = ganq("doctor", "--json").findings()["sqlite"]
    assert [one["level"] for one in reported] == ["ok", "warn"]
    assert "WAL has grown" in reported[1]["message"]


def test_a_database_that_this_user_cannot_write_fails(ganq: "Ganq", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.doctor.job_table.os.access", lambda path, mode: False)
    result = ganq("doctor")
    assert result.code == 1
    assert "cannot be written by this user" in result.out


def test_a_clock_that_is_off_is_a_warning_with_the_direction(
    ganq: "Ganq", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.db.queries.Queries.now", lambda self: __import__("time").time() + 3600)
    (clock,) = ganq("doctor", "--json").findings()["clock"]
    assert clock["level"] == "warn"
    assert "3,600 s behind" in clock["message"]


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
@pytest.mark.parametrize("commit", ["on", "off"])
def test_postgres_is_named_and_a_careless_one_is_a_warning(
    settings: "Settings", database: "Database", commit: str
) -> None:
    name = database.engine.url.database
    database.write(
        lambda conn: conn.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = {commit}"))
    )
    reported = look(settings)
    assert any(one.message.startswith("Postgres ") and one.level == "ok" for one in reported)
    assert any("synchronous_commit" in one.message for one in reported) is (commit == "off")
    assert any("fsync is off" in one.message and one.level == "warn" for one in reported)  # as tests have it


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_a_postgres_with_few_connections_left_is_a_warning(
    settings: "Settings", database: "Database"
) -> None:
    (spare,) = [one for one in look(settings) if "connections" in one.message]
    assert spare.level == "ok"
    name = database.engine.url.database
    database.write(lambda conn: conn.execute(text(f"ALTER DATABASE {name} CONNECTION LIMIT 3")))
    (few,) = [one for one in look(settings) if "connections" in one.message]
    assert few.level == "warn"
    assert "of 3 connections of this database are in use" in few.message


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_a_postgres_beyond_this_machine_without_tls_is_a_warning(
    settings: "Settings", database: "Database", monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any("encrypted" in one.message for one in look(settings))
    monkeypatch.setattr(job_table, "_is_local", lambda url: False)  # the tests' own listens on this machine
    (reported,) = [one for one in look(settings) if "encrypted" in one.message]
    assert reported.level == "warn"


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("postgresql+psycopg://a:b@127.0.0.1:5432/ganq", True),
        ("postgresql+psycopg://a@/ganq?host=/run/postgresql", True),
        ("postgresql+psycopg://a:b@localhost/ganq", True),
        ("postgresql+psycopg://a:b@db.example.org/ganq", False),
        ("postgresql+psycopg://a:b@10.0.0.7/ganq", False),
    ],
)
def test_what_is_on_this_machine_needs_no_tls(url: str, local: bool) -> None:
    assert job_table._is_local(url) is local


def test_a_postgres_that_is_not_there_fails(ganq: "Ganq", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANQ_DATABASE_URL", "postgresql://ganq:s3cret@127.0.0.1:1/ganq")
    result = ganq("doctor", "--json")
    assert result.code == 1
    assert "cannot be reached" in result.findings()["database"][0]["message"]
    assert "s3cret" not in result.out
