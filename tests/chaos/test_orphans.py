"""
The parent of several workers is killed: they save their jobs and leave, and the next set waits for them.
"""

import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import psutil
import pytest
from machine import LATER, Ganq, the_part, until
from tables import job_row

from storage.settings import Settings
from worker.host.embedded_redis import EmbeddedRedis

if TYPE_CHECKING:
    from storage.db.engine import Database

pytestmark = [
    pytest.mark.parametrize("backend", ["sqlite"], indirect=True),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores"),
]
PAIR = ("--cpu-workers", "2")


def training(ganq: Ganq, small: list[str], *options: str) -> int:
    """A training that lasts, with at least one checkpoint."""
    job = int(ganq.json("submit", "train", *small, "--epochs", "100000", *options)["id"])
    until(lambda: job_row(ganq.table, job)["progress"], what="progress")
    return job


def family(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def killed(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Kill a parent, and return those that it leaves behind."""
    left = family(process)
    process.kill()
    process.wait()
    return left


def test_workers_whose_parent_is_killed_save_their_jobs_and_leave(
    ganq: Ganq, database: "Database", small: list[str], redis_url: str
) -> None:
    parent = ganq.start_worker("old", options=PAIR)
    until(lambda: len(ganq.present()) == 2, what="two workers")
    job = training(ganq, small)
    left = killed(parent)
    _, alive = psutil.wait_procs(left, timeout=60)
    for one in alive:
        one.kill()
    assert not alive, "they live on without their parent"
    row = ganq.job(job)
    assert row["state"] == "queued"
    assert [one["outcome"] for one in row["attempts"]] == ["requeued"], "its work was not saved"


@pytest.mark.tier2
def test_the_next_set_waits_for_the_one_whose_parent_was_killed(
    ganq: Ganq, database: "Database", small: list[str], redis_url: str
) -> None:
    parent = ganq.start_worker("pair", options=PAIR)
    until(lambda: len(ganq.present()) == 2, what="two workers")
    job = training(ganq, small)
    # The worker that has the job takes its time to leave.
    busy = next(one for one in family(parent) if "worker.runner.main" in one.cmdline() and _works(one))
    busy.suspend()
    left = killed(parent)
    again = ganq.start_worker("pair", options=PAIR)
    try:
        until(lambda: "is draining: waiting until it has exited" in ganq.log("pair"), what="the wait")
        others = [one for one in family(again) if not any("log_relay" in part for part in one.cmdline())]
        assert not others, "a second set beside the first"
    finally:
        busy.resume()
    psutil.wait_procs(left, timeout=60)
    until(lambda: job_row(database, job)["attempt"] == 2, what="the next set's attempt")
    assert again.poll() is None
    ganq("cancel", str(job))
    until(lambda: job_row(database, job)["finished_at"], what="the cancel")


def _works(runner: psutil.Process) -> bool:
    return any("log.txt" in one.path for one in runner.open_files())


def test_a_second_set_beside_a_living_one_is_refused(
    ganq: Ganq, database: "Database", redis_url: str
) -> None:
    ganq.start_worker("pair", options=PAIR)
    until(lambda: len(ganq.present()) == 2, what="two workers")
    again = ganq.start_worker("pair", options=PAIR)
    assert again.wait(60) == 1
    assert "another worker of this machine already holds worker pair-cpu" in ganq.log("pair")
    assert "Traceback" not in ganq.log("pair")


@pytest.mark.tier2
def test_a_worker_waits_for_the_one_of_its_name_whose_launcher_was_killed(
    ganq: Ganq, database: "Database", small: list[str], redis_url: str
) -> None:
    launcher = ganq.start_worker("w1")
    job = training(ganq, small)
    runner = the_part(launcher, "worker.runner.main")
    runner.suspend()
    left = killed(launcher)
    again = ganq.start_worker("w1")
    try:
        until(lambda: "is draining: waiting until it has exited" in ganq.log("w1"), what="the wait")
    finally:
        runner.resume()
    psutil.wait_procs(left, timeout=60)
    until(lambda: job_row(database, job)["attempt"] == 2, what="the next attempt")
    assert again.poll() is None
    ganq("cancel", str(job))
    until(lambda: job_row(database, job)["finished_at"], what="the cancel")


@LATER
def test_ganq_up_that_was_killed_and_started_again_is_one_stack(
    ganq: Ganq, database: "Database", small: list[str]
) -> None:
    del ganq.env["GANQ_REDIS_URL"]
    up = ganq.start_up(options=PAIR)
    until(lambda: len(ganq.present()) == 2, what="two workers")
    job = training(ganq, small)
    left = killed(up)
    again = ganq.start_up(options=PAIR)
    _, alive = psutil.wait_procs(left, timeout=60)
    for one in alive:
        one.kill()
    assert not alive, "they live on without their parent"
    until(lambda: job_row(database, job)["attempt"] == 2, what="the next attempt")
    assert ganq.job(job)["attempts"][0]["outcome"] == "requeued"
    assert again.poll() is None, ganq.log("up")
    ganq("cancel", str(job))
    until(lambda: job_row(database, job)["finished_at"], what="the cancel")
    time.sleep(1.5)  # the old Redis may have taken the new one's socket with it
    assert EmbeddedRedis(Settings.load(ganq.env))._answers()
    again.send_signal(signal.SIGTERM)
    assert again.wait(60) == 0


@pytest.mark.tier2
def test_a_supervisor_comes_back_though_the_folder_of_its_sockets_was_deleted(
    ganq: Ganq, database: "Database", small: list[str], redis_url: str
) -> None:
    launcher = ganq.start_worker("w1")
    job = training(ganq, small)
    shutil.rmtree(Settings.load(ganq.env).runtime)
    the_part(launcher, "worker.supervisor.loop").kill()
    until(lambda: job_row(database, job)["attempt"] == 2, what="the next attempt")
    assert "Traceback" not in ganq.log("w1")
    ganq("cancel", str(job))
    until(lambda: job_row(database, job)["finished_at"], what="the cancel")
