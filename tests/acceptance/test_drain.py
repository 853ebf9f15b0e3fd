"""A worker is drained from another machine: it returns its job, exits, and stays away."""

import pytest
from machine import Ganq, until

pytestmark = pytest.mark.tier2


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_drained_worker_returns_its_job_and_exits(ganq: Ganq, redis_url: str, small: list[str]) -> None:
    worker = ganq.start_worker("w1")
    job = ganq.json("submit", "train", *small, "--epochs", "100000")["id"]
    until(lambda: ganq.peek(job)["state"] == "running", what="a start")
    assert f"would be drained; it returns job {job}" in ganq("drain", "w1", "--dry-run")
    assert ganq.run("drain", "nobody").returncode == 3
    said = ganq("drain", "w1", "--wait", "--timeout", "60")
    assert f"worker w1: drain requested; it returns job {job}" in said
    assert worker.wait(30) == 0
    assert (ganq.peek(job)["state"], ganq.peek(job)["crash_count"]) == ("queued", 0)
    assert ganq.json("workers")[0]["state"] == "stopped"
    assert ganq("drain", "--all") == "no worker matches\n"
    # Who takes its name later was not asked.
    again = ganq.start_worker("w1")
    until(lambda: ganq.peek(job)["state"] == "running", what="the next attempt")
    until(lambda: ganq.json("workers")[0]["state"] == "busy", what="its report")
    assert again.poll() is None
