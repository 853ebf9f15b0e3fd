"""`ganq backup` and `ganq restore`, after the original was destroyed."""

import gzip
import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machine import Ganq, until
from services import Postgres

from storage.db.backup import TABLE, open_backup
from storage.db.rows import Job, Lease
from storage.settings import Settings


@pytest.fixture
def destroy(
    settings: Settings, backend: str, request: pytest.FixtureRequest, ganq: Ganq
) -> Callable[[], None]:
    """Destroys the job table: the file, or the database in the server, of which an empty one remains."""

    def run() -> None:
        if ganq._table is not None:
            ganq._table.dispose()
            ganq._table = None
        if backend == "sqlite":
            for path in (settings.home / "ganq.db").parent.glob("ganq.db*"):
                path.unlink()
            return
        server: Postgres = request.getfixturevalue("postgres")
        name = settings.database_url.partition("?")[0].rpartition("/")[2]
        server.drop(name)
        server.sql(f"CREATE DATABASE {name}")

    return run


def rows(folder: Path) -> str:
    return hashlib.sha256(gzip.decompress((open_backup(folder).folder / TABLE).read_bytes())).hexdigest()


@pytest.mark.slow
@pytest.mark.tier2_on("sqlite")
def test_jobs_continue_after_the_job_table_was_destroyed_and_restored(
    ganq: Ganq, redis_url: str, small: list[str], destroy: Callable[[], None], tmp_path: Path
) -> None:
    worker = ganq.start_worker()
    trained = ganq.json("submit", "train", *small, "--epochs", "2", "--name", "model")["id"]
    ganq("wait", str(trained))
    long = ganq.json("submit", "train", *small, "--epochs", "400", "--keep-last", "1000", "--priority", "5")[
        "id"
    ]
    until(lambda: ganq.steps(long), what="a checkpoint")
    queued = ganq.json("submit", "generate", "--from", "model", "--count", "6", "--priority", "0")["id"]
    ganq("backup", "saved")
    events = ganq("events", str(trained))
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    until(lambda: ganq.run("health").returncode == 1, what="the worker's end")

    destroy()
    told = ganq("restore", "saved")
    assert "restored 3 jobs" in told
    assert "1 ran then: the first worker requeues them" in told
    assert "missing" not in told
    assert ganq("events", str(trained)) == events
    ganq("backup", "again")
    assert rows(tmp_path / "again") == rows(tmp_path / "saved")

    ganq.start_worker("w2")
    until(lambda: ganq.peek(long)["attempt"] == 2, what="the job that ran at the time of the backup")
    ganq("cancel", str(long))
    ganq("wait", str(queued))
    assert ganq.peek(queued)["state"] == "succeeded"
    assert ganq.json("submit", "generate", "--from", "model", "--count", "2")["id"] == queued + 1


def test_a_backup_of_sqlite_can_be_restored_into_postgres(
    ganq: Ganq,
    postgres: Postgres,
    job_factory: Callable[..., Job],
    running_job_factory: Callable[..., Lease],
    tmp_path: Path,
) -> None:
    running_job_factory()
    for number in range(3):
        job_factory(name=f"größe {number}")
    ganq("backup", "saved")
    name = postgres.create()
    ganq.env["GANQ_DATABASE_URL"] = postgres.url(name)
    ganq("restore", "saved")
    ganq("backup", "again")
    assert ganq.json("status", "4")["spec"] == {"data": "/pictures"} | ganq.json("status", "4")["spec"]
    assert rows(tmp_path / "again") == rows(tmp_path / "saved")
    postgres.drop(name)


def test_a_job_table_with_jobs_is_refused_and_stays_as_it_is(
    ganq: Ganq, job_factory: Callable[..., Job], tmp_path: Path
) -> None:
    job_factory()
    ganq("backup", "saved")
    job_factory()
    done = ganq.run("restore", "saved")
    assert done.returncode == 2
    assert "the job table is not empty: it has 2 jobs, which stay as they are" in done.stderr
    assert len(ganq.json("status")) == 2


@pytest.mark.slow
def test_a_job_table_that_a_worker_uses_is_refused(ganq: Ganq, redis_url: str) -> None:
    ganq("backup", "saved")
    ganq.start_worker()
    until(lambda: ganq.present(), what="the worker")
    done = ganq.run("restore", "saved")
    assert done.returncode == 2
    assert "worker w1 uses this job table" in done.stderr
    assert "Traceback" not in done.stderr


def damaged(folder: Path) -> None:
    table = folder / "table.jsonl.gz"
    table.write_bytes(gzip.compress(gzip.decompress(table.read_bytes()).replace(b"queued", b"failed")))


def torn(folder: Path) -> None:
    table = folder / "table.jsonl.gz"
    table.write_bytes(table.read_bytes()[:-20])


def without_its_end(folder: Path) -> None:
    (folder / "backup.json").unlink()


def of_another_schema(folder: Path) -> None:
    about = json.loads((folder / "backup.json").read_text())
    (folder / "backup.json").write_text(json.dumps({**about, "schema": "0001"}))


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damaged, "is damaged: its SHA-256 differs"),
        (torn, "is damaged: its SHA-256 differs"),
        (without_its_end, "contains no backup"),
        (of_another_schema, "the backup has schema 0001"),
    ],
)
def test_a_backup_that_is_not_whole_is_refused_before_anything_changes(
    ganq: Ganq,
    job_factory: Callable[..., Job],
    destroy: Callable[[], None],
    harm: Callable[[Path], None],
    message: str,
    tmp_path: Path,
) -> None:
    job_factory()
    ganq("backup", "saved")
    destroy()
    shutil.copytree(tmp_path / "saved", tmp_path / "harmed")
    harm(tmp_path / "harmed")
    done = ganq.run("restore", "harmed")
    assert done.returncode in (1, 2, 3)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "restored 1 jobs" in ganq("restore", "saved")


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_an_existing_folder_is_not_overwritten(ganq: Ganq, job_factory: Callable[..., Job]) -> None:
    job_factory()
    ganq("backup", "saved")
    done = ganq.run("backup", "saved")
    assert done.returncode == 2
    assert "exists" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_files_that_are_missing_on_the_volume_are_listed(
    ganq: Ganq, redis_url: str, small: list[str], destroy: Callable[[], None]
) -> None:
    worker = ganq.start_worker()
    ganq("submit", "train", *small, "--epochs", "1", "--wait")
    worker.send_signal(signal.SIGTERM)
    worker.wait(60)
    ganq("backup", "saved")
    destroy()
    lost: Any = Path(ganq.env["GANQ_VOLUME"]) / "jobs" / "000001" / "a1" / "checkpoints" / "final"
    shutil.rmtree(lost)
    done = ganq.run("restore", "saved")
    assert done.returncode == 1
    assert f"missing on the volume: {lost}" in done.stdout
