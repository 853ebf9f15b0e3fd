"""A supervisor whose main loop is stuck keeps no job by its heartbeats alone."""

import json
import time
from typing import TYPE_CHECKING

import pytest
from machine import Ganq, part, until

if TYPE_CHECKING:
    from services import Postgres

pytestmark = pytest.mark.slow
STUCK_S = 2.0
ENV = {"GANQ_STUCK_SECONDS": str(STUCK_S), "GANQ_ENABLE_FAILPOINTS": "1"}


@pytest.mark.tier2_on("postgres")
def test_no_heartbeat_is_sent_for_a_loop_that_is_stuck(ganq: Ganq, small: list[str]) -> None:
    worker = ganq.start_worker("w1", GANQ_FAILPOINTS="supervisor.registered=sleep:600", **ENV)
    job = ganq.json(
        "submit", "train", *small, "--epochs", "40", "--save-every", "1000", "--checkpoint-seconds", "0.5"
    )["id"]
    until(lambda: len(ganq.steps(job)) > 0, what="a checkpoint, after which the loop is stuck")
    stuck = part(worker, "worker.supervisor.loop")
    assert stuck is not None
    ganq.start_worker("w2", **ENV)
    try:
        _passes_on(ganq, job)
    finally:
        stuck.kill()  # no signal but this reaches it


def _passes_on(ganq: Ganq, job: int) -> None:
    until(lambda: ganq.peek(job)["state"] == "succeeded", within_s=60, what="the job's end elsewhere")
    assert ganq.peek(job)["worker"] == "w2"
    assert "no heartbeat: the main loop has been stuck for" in ganq.log("w1")
    reported = json.loads(ganq("health", "--json", code=1))
    result = [
        one["why"] for one in reported["workers"] if one["status"] == "unhealthy" and one["worker"] == "w1"
    ]
    assert any("its main loop has been stuck" in why for why in result), reported


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
@pytest.mark.tier2
def test_a_loop_that_waits_for_the_database_is_not_stuck(
    ganq: Ganq, small: list[str], backend: str, postgres: "Postgres", settings_env: dict[str, str]
) -> None:
    """The outage is longer than GANQ_STUCK_SECONDS, and costs no attempt."""
    ganq.start_worker("w1", **ENV)
    job = ganq.json(
        "submit", "train", *small, "--epochs", "200", "--save-every", "1000", "--checkpoint-seconds", "0.2"
    )["id"]
    until(lambda: len(ganq.steps(job)) > 0, what="a first checkpoint")
    postgres.halt()
    try:
        time.sleep(3 * STUCK_S)
    finally:
        postgres.restart()
    assert ganq.peek(job)["state"] == "running", "it was at work all the time"
    ganq.start_worker("w2", **ENV)
    until(lambda: ganq.peek(job)["state"] == "succeeded", within_s=90, what="the job's end")
    assert ganq.peek(job)["attempt"] == 1
