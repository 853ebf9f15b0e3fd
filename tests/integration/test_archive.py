"""What `ganq gc --rows` moves to the archive, what stays, and how the archive is read (SCALE 9)."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from machine import Ganq
from sqlalchemy import insert
from tables import set_columns
from volumes import Files

from jobs.errors import TrainingDivergedError
from storage.db.engine import Database
from storage.db.queries import Filter, Queries
from storage.db.rows import Lease
from storage.db.tables import end_dependency
from storage.gc import archive
from storage.gc.archive import archive_rows, archives, read_archive
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from storage.db.store import JobStore
    from storage.settings import Settings

OLD = 1000.0


@pytest.fixture
def volume(settings: "Settings") -> Volume:
    found = Volume(settings.volume)
    found.ensure()
    return found


@pytest.fixture
def ended(
    store: "JobStore", database: Database, running_job_factory: Callable[..., Lease]
) -> Callable[..., int]:
    """Return the id of a job that failed long ago and has nothing but its log."""

    def make(**columns: Any) -> int:
        lease = running_job_factory()
        store.fail(lease, TrainingDivergedError("the loss is not finite"))
        set_columns(database, lease.job_id, finished_at=OLD, **columns)
        return lease.job_id

    return make


def ids(database: Database) -> list[int]:
    return sorted(one.id for one in Queries(database).stream(Filter(parts=True)))


def test_labels_go_to_the_archive_with_their_job(
    ended: Callable[..., int],
    store: "JobStore",
    database: Database,
    volume: Volume,
    settings: "Settings",
    tmp_path: Path,
) -> None:
    job_id = ended()
    store.set_labels(job_id, {"project": "faces"})
    assert archive_rows(database, volume, age_s=0.0).jobs == 1
    assert Queries(database).labels_of([job_id]) == {}
    found, notes = read_archive(settings, volume, database, tmp_path)
    assert (Queries(found).labels_of([job_id]), notes) == ({job_id: {"project": "faces"}}, [])
    found.dispose()


def test_old_jobs_leave_the_table_and_are_read_from_the_archive_as_they_were(
    ended: Callable[..., int], database: Database, volume: Volume, settings: "Settings", tmp_path: Path
) -> None:
    jobs = [ended() for _ in range(3)]
    recent = ended()
    set_columns(database, recent, finished_at=Queries(database).now())
    queries = Queries(database)
    before = {one: (queries.get(one), queries.events(one), queries.attempts(one)) for one in jobs}
    done = archive_rows(database, volume, age_s=86400.0)
    assert (done.jobs, dict(done.kept)) == (3, {})
    assert ids(database) == [recent]
    found, notes = read_archive(settings, volume, database, tmp_path)
    archived = Queries(found)
    assert notes == []
    assert ids(found) == jobs
    for one in jobs:
        assert (archived.get(one), archived.events(one), archived.attempts(one)) == before[one]
    found.dispose()


def test_what_something_still_refers_to_stays_and_the_reason_is_counted(
    ended: Callable[..., int],
    store: "JobStore",
    database: Database,
    volume: Volume,
    running_job_factory: Callable[..., Lease],
) -> None:
    files = Files(store, volume)
    lease = running_job_factory()
    files.checkpoint(lease, 1)
    store.fail(lease, TrainingDivergedError("no"))
    set_columns(database, lease.job_id, finished_at=OLD)
    marked = ended(kept=1)
    named = ended(name="faces")
    retried = ended()
    live = running_job_factory()
    set_columns(database, live.job_id, retry_of=retried)
    done = archive_rows(database, volume, age_s=86400.0, keep_named=True)
    assert dict(done.kept) == {
        "has results (--jobs deletes them)": 1,
        "marked by ganq keep": 1,
        "has a name": 1,
        "was retried by a job that stays": 1,
    }
    assert done.jobs == 0
    assert ids(database) == sorted([lease.job_id, marked, named, retried, live.job_id])


def test_what_a_waiting_job_waits_for_stays(
    ended: Callable[..., int],
    store: "JobStore",
    database: Database,
    volume: Volume,
    running_job_factory: Callable[..., Lease],
) -> None:
    """Its row would go with the needed job, and the waiting one wait for ever."""
    needed, waiting = ended(), running_job_factory().job_id
    row = {"job_id": waiting, "needs": needed, "condition": "any"}
    database.write(lambda conn: conn.execute(insert(end_dependency), row))
    done = archive_rows(database, volume, age_s=86400.0)
    assert (done.jobs, dict(done.kept)) == (0, {"needed by a queued or running job": 1})
    assert needed in ids(database)


def test_a_parent_with_a_shard_that_runs_stays_with_all_its_shards(
    ended: Callable[..., int],
    database: Database,
    volume: Volume,
    running_job_factory: Callable[..., Lease],
) -> None:
    parent = ended()
    running = running_job_factory().job_id
    set_columns(database, running, part_of=parent)
    shard = ended(part_of=parent)
    done = archive_rows(database, volume, age_s=86400.0)
    assert (done.jobs, dict(done.kept)) == (0, {"has a shard that has not ended": 1})
    assert ids(database) == [parent, running, shard]


def test_the_folder_of_a_job_of_another_table_is_not_deleted(
    ended: Callable[..., int], database: Database, volume: Volume
) -> None:
    job = ended()
    volume.job(job).mkdir(parents=True)
    (volume.job(job) / "spec.json").write_text(json.dumps({"job": job, "submitted_at": 1.0, "spec": {}}))
    assert archive_rows(database, volume, age_s=86400.0).jobs == 1
    assert (volume.job(job) / "spec.json").exists()


def test_a_retry_goes_together_with_what_it_repeats(
    ended: Callable[..., int], database: Database, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "BATCH_SIZE", 1)
    first = ended()
    second = ended(retry_of=first)
    assert archive_rows(database, volume, age_s=86400.0).jobs == 2
    assert ids(database) == []
    assert len(archives(volume)) == 2, f"{first} and {second} are two batches"


def test_a_dry_run_moves_nothing(ended: Callable[..., int], database: Database, volume: Volume) -> None:
    job = ended()
    assert archive_rows(database, volume, age_s=86400.0, dry_run=True).jobs == 1
    assert ids(database) == [job]
    assert archives(volume) == []


@pytest.mark.parametrize("point", ["archive.written", "archive.rows_deleted"])
def test_a_kill_loses_no_job_and_shows_none_twice(
    point: str,
    ended: Callable[..., int],
    database: Database,
    volume: Volume,
    settings: "Settings",
    settings_env: dict[str, str],
    tmp_path: Path,
) -> None:
    jobs = [ended() for _ in range(3)]
    failing = {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": f"{point}=kill"}
    killed = subprocess.run(
        [sys.executable, "-m", "cli.main", "gc", "--rows", "--older-than", "1d", "--json"],
        env={**os.environ, **failing}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = ids(database)
    found, _ = read_archive(settings, volume, database, tmp_path)
    assert sorted(there + ids(found)) == jobs
    found.dispose()
    assert archive_rows(database, volume, age_s=86400.0).jobs == len(there)
    assert ids(database) == []


def test_a_file_that_is_torn_is_named_and_the_others_are_read(
    ended: Callable[..., int],
    database: Database,
    volume: Volume,
    settings: "Settings",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archive, "BATCH_SIZE", 1)
    first, second = ended(), ended()
    archive_rows(database, volume, age_s=86400.0)
    torn = archives(volume)[0]
    torn.write_bytes(torn.read_bytes()[:-20])
    found, notes = read_archive(settings, volume, database, tmp_path)
    assert ids(found) == [second]
    assert [str(torn) in one for one in notes] == [True]
    assert archive.archived_ids(volume) >= {second}
    found.dispose()
    assert first not in ids(database)


def test_a_user_archives_and_looks(
    ganq: Ganq, ended: Callable[..., int], database: Database, volume: Volume
) -> None:
    job = ended(name="faces")
    (volume.attempt(job, 1)).mkdir(parents=True)
    (volume.attempt(job, 1) / "log.txt").write_text("epoch 1\n")
    done = ganq.run("gc", "--rows", "--older-than", "90d", "--yes")
    assert "1 job archived" in done.stdout, done.stderr
    assert not volume.job(job).exists()
    assert ganq.run("status", str(job)).returncode == 3
    assert "faces" in ganq.run("status", "--archived").stdout
    assert ganq.json("status", str(job), "--archived")["error"]["code"] == "NAN_LOSS"
    assert ganq.json("status", "--archived", "--name", "nothing") == []
    assert ganq.run("gc", "--keep-named").returncode == 2
