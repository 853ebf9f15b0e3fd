"""`ganq worker --exit-when-idle`: works while there are jobs, then drains and exits with 0."""

import time

import pytest
from machine import Ganq, postgres_later, until

pytestmark = pytest.mark.slow


@postgres_later
def test_a_worker_exits_with_0_when_no_job_was_claimable_for_so_long(
    ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    first = ganq.json("submit", "train", *small, "--epochs", "1")["id"]
    worker = ganq.start_worker(options=("--gpus", "none", "--exit-when-idle", "3"))
    until(lambda: ganq.peek(first)["state"] == "succeeded", what="the first job")
    second = ganq.json("submit", "train", *small, "--epochs", "1")["id"]  # it is not idle for that long
    until(lambda: ganq.peek(second)["state"] == "succeeded", what="the second job")
    ended = time.monotonic()
    assert worker.wait(60) == 0
    assert time.monotonic() - ended >= 2.0
    assert "no job for 3 s: this worker exits" in ganq.log()
    assert "does not end" not in ganq.log()


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_jobs_of_other_queues_do_not_keep_a_worker_from_exiting(
    ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    ganq("submit", "train", *small, "--queue", "other")
    worker = ganq.start_worker(options=("--gpus", "none", "--exit-when-idle", "1"))
    assert worker.wait(60) == 0


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_several_workers_of_one_command_exit_when_all_are_idle(ganq: Ganq, redis_url: str) -> None:
    fleet = ganq.start_worker(options=("--cpu-workers", "2", "--exit-when-idle", "1s"))
    assert fleet.wait(90) == 0
    assert ganq.log().count("this worker exits") == 2


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_time_that_is_none_is_refused(ganq: Ganq) -> None:
    for wrong in ("0", "-5", "soon"):
        done = ganq.run("worker", "--exit-when-idle", wrong)
        assert done.returncode == 2
        assert "--exit-when-idle" in done.stderr
