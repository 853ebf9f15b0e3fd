"""
How soon a job is back when its worker dies: rows F4 to F7 of docs/fault-matrix.md.

Times are printed, and stand in docs/guarantees.md. With the intervals that a deployment has this
takes minutes, and so it is tier 2.
"""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from chaos.invariants import assert_invariants
from machine import Ganq, part, until
from sqlalchemy import update
from tables import job_row

from storage.db.tables import attempt
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from storage.db.engine import Database

sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
DEFAULTS = {
    "GANQ_HEARTBEAT_SECONDS": "10",
    "GANQ_PROGRESS_SECONDS": "2",
    "GANQ_CANCEL_POLL_SECONDS": "1",
    "GANQ_LEASE_SECONDS": "60",
    "GANQ_REAP_SECONDS": "2",
    "GANQ_POLL_SECONDS": "15",
    "GANQ_RENOTIFY_SECONDS": "120",
    "GANQ_DRAIN_SECONDS": "60",
}
"""Those of a deployment; a test in this file compares them with storage/settings.py."""


def slower_than_usual() -> float:
    """How much more a machine takes that does other things, too: load for each core, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def training(ganq: Ganq, small: list[str], *options: str) -> int:
    """A training that lasts, with at least one checkpoint."""
    submit = ["submit", "train", *small, "--epochs", "100000", "--checkpoint-seconds", "0.5", *options]
    job = int(ganq.json(*submit)["id"])
    until(lambda: ganq.steps(job), what="a checkpoint")
    return job


def end(ganq: Ganq, database: "Database", job: int) -> None:
    ganq("cancel", str(job))
    until(lambda: job_row(database, job)["finished_at"], what="the cancel")
    assert_invariants(database, Volume(Path(ganq.env["GANQ_VOLUME"])))


def test_the_intervals_of_these_measurements_are_the_defaults() -> None:
    from dataclasses import fields

    from storage.settings import Settings

    known = {f"GANQ_{one.name.upper()}": one.default for one in fields(Settings)}
    assert {name: float(value) for name, value in DEFAULTS.items()} == {
        name: known[name] for name in DEFAULTS
    }


def supervisor_dies(ganq: Ganq, database: "Database", small: list[str]) -> float:
    """Returns the seconds after which another worker has the job."""
    worker = ganq.start_worker("dies")
    job = training(ganq, small)
    ganq.start_worker("heir")
    until(lambda: len(ganq.present()) == 2, what="the heir")
    until(lambda: part(ganq.workers[-1], "worker.runner.main"), what="the heir's runner")
    supervisor, runner = (part(worker, f"worker.{one}") for one in ("supervisor", "runner"))
    assert supervisor is not None
    assert runner is not None
    supervisor.kill()
    killed = time.monotonic()
    until(lambda: job_row(database, job)["attempt"] == 2, what="the rescue")
    took = time.monotonic() - killed
    gone, _ = psutil.wait_procs([runner], timeout=10)
    assert gone, "a runner outlived its supervisor"
    row = ganq.job(job)
    assert row["attempts"][0]["outcome"] == "lost"
    end(ganq, database, job)
    return took


@pytest.mark.tier2
@sqlite_only
def test_f04_a_supervisor_that_is_killed_takes_its_runner_along_and_its_job_continues(
    ganq: Ganq, database: "Database", small: list[str]
) -> None:
    supervisor_dies(ganq, database, small)


@pytest.mark.tier2
def test_f04_a_dead_process_is_noticed_within_three_seconds(
    ganq: Ganq, database: "Database", small: list[str], backend: str
) -> None:
    ganq.env |= DEFAULTS
    took = supervisor_dies(ganq, database, small)
    print(f"F4 {backend}: another worker had the job {took:.2f} s after its supervisor was killed")
    assert took <= 3.0 * slower_than_usual()


@pytest.mark.tier2
def test_f05_a_lost_host_is_noticed_within_75_seconds(
    ganq: Ganq, database: "Database", small: list[str], backend: str
) -> None:
    """Its processes and its runtime folder are gone, and nobody here can look them up: another boot."""
    ganq.env |= DEFAULTS
    tmpdir = ganq.folder / "t"
    tmpdir.mkdir()
    worker = ganq.start_worker("gone", TMPDIR=str(tmpdir))
    job = training(ganq, small)
    database.write(
        lambda conn: conn.execute(
            update(attempt).where(attempt.c.job_id == job).values(boot_id="another machine")
        )
    )
    ganq.start_worker("heir")
    until(lambda: len(ganq.present()) == 2, what="the heir")
    time.sleep(2.5)
    family = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    for one in family:
        one.kill()
    killed = time.monotonic()
    worker.wait()
    shutil.rmtree(tmpdir, ignore_errors=True)
    until(lambda: job_row(database, job)["attempt"] == 2, within_s=200, what="the rescue")
    took = time.monotonic() - killed
    print(f"F5 {backend}: another worker had the job {took:.1f} s after its machine was gone")
    assert took >= 50, "that was not the lease"
    assert took <= 75 * slower_than_usual()
    end(ganq, database, job)


@pytest.mark.tier2
def test_f07_a_worker_drains_within_its_minute(
    ganq: Ganq, database: "Database", small: list[str], backend: str
) -> None:
    ganq.env |= DEFAULTS
    worker = ganq.start_worker()
    job = training(ganq, small, "--checkpoint-seconds", "300")
    step = ganq.steps(job)[-1]
    worker.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert worker.wait(120) in (0, -signal.SIGTERM)
    took = time.monotonic() - asked
    print(f"F7 {backend}: a training worker had left {took:.2f} s after SIGTERM")
    assert took <= 60
    row = job_row(database, job)
    assert (row["state"], row["crash_count"]) == ("queued", 0)
    assert ganq.steps(job)[-1] > step, "it left without saving"
    end(ganq, database, job)
