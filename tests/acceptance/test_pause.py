"""A training is paused and resumed, with its worker there and with it away, and ends with the same bits."""

import signal

import pytest
from machine import Ganq, attempt_folder, until, weights

pytestmark = pytest.mark.tier2


def test_a_paused_training_frees_its_worker_and_ends_with_the_same_bits(
    ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    options = [*small, "--epochs", "300", "--save-every", "100"]
    worker = ganq.start_worker()
    plain = ganq.json("submit", "train", *options, "--wait")["id"]
    training = ganq.json("submit", "train", *options)["id"]
    until(lambda: (ganq.peek(training)["progress"] or {}).get("epoch", 0) >= 2, what="two epochs")

    said = ganq("pause", str(training), "--reason", "demo", "--wait", "--timeout", "60")
    assert "saves a checkpoint and stops" in said
    assert f"job {training}: paused, epoch" in said
    paused = ganq.job(training)
    assert (paused["state"], paused["status"], paused["held"]) == ("queued", "paused", True)
    assert [one["detail"]["reason"] for one in paused["events"] if one["type"] == "pause_requested"] == [
        "demo"
    ]
    # Its worker takes other jobs, and is not kept by this one when it leaves.
    assert ganq.json("submit", "train", *small, "--epochs", "1", "--wait")["state"] == "succeeded"
    assert ganq.peek(training)["attempt"] == 1

    ganq("resume", str(training))
    until(lambda: ganq.peek(training)["attempt"] == 2, what="the next attempt")
    until(lambda: ganq.peek(training)["state"] == "running", what="it runs")
    worker.send_signal(signal.SIGTERM)
    worker.wait(60)
    assert "; ganq resume" in ganq("pause", str(training))  # no worker is needed for that
    ganq.start_worker("heir")
    assert ganq.json("submit", "train", *small, "--epochs", "1", "--wait")["state"] == "succeeded"
    assert (ganq.peek(training)["state"], ganq.peek(training)["held"]) == ("queued", 1)

    ganq("resume", str(training))
    assert ganq.run("wait", str(training), "--timeout", "120").returncode == 0
    job = ganq.job(training)
    assert [one["outcome"] for one in job["attempts"]] == ["requeued", "requeued", "succeeded"]
    assert job["bit_exact"] is True
    final = [attempt_folder(ganq, one) / "checkpoints" / "final" for one in (plain, training)]
    assert weights(final[0]) == weights(final[1])
