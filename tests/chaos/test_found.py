"""What the random mode has found, each as a test of its own, so that it stays mended."""

import psutil
import pytest
from machine import Ganq, part, put_to_sleep, until
from tables import job_row

from storage.db.engine import Database


@pytest.mark.tier2
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_no_second_worker_begins_while_the_supervisor_of_a_killed_one_still_drains(
    ganq: Ganq, database: Database, small: list[str]
) -> None:
    """F43: the lock of a GPU went with the launcher, and its place had two runners for a while."""
    slow = {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": "train.stepped=sleep:2@3+"}
    worker = ganq.start_worker(**slow)
    job = ganq.json("submit", "train", *small, "--epochs", "9")["id"]
    until(lambda: (job_row(database, job)["progress"] or {}).get("done"), what="the job's first step")
    supervisor = part(worker, "worker.supervisor.loop")
    assert supervisor is not None
    put_to_sleep([supervisor], database)  # so that it cannot have drained before the second one asks
    worker.kill()
    worker.wait()
    try:
        second = ganq.start_worker()
        assert second.wait(30) == 1
        assert "already holds worker w1" in ganq.log()
    finally:
        supervisor.resume()
    psutil.wait_procs([supervisor], timeout=30)
    ganq.start_worker()
    until(lambda: job_row(database, job)["attempt"] == 2, what="the next worker")
