"""A person with one GPU that is training asks for 64 images, and has them in seconds."""

import time

import pytest
from machine import Ganq, attempt_folder, until, weights

pytestmark = pytest.mark.slow


@pytest.mark.tier2_on("postgres")
def test_images_come_in_seconds_while_a_training_runs_which_ends_with_the_same_bits(
    ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    options = [*small, "--epochs", "300", "--save-every", "100"]
    ganq.start_worker()
    model = ganq.json("submit", "train", *small, "--epochs", "1", "--name", "model", "--wait")["id"]
    plain = ganq.json("submit", "train", *options, "--wait")["id"]
    training = ganq.json("submit", "train", *options)["id"]
    until(lambda: (ganq.peek(training)["progress"] or {}).get("epoch", 0) >= 2, what="two epochs")

    images = ganq.json("submit", "generate", "--from", str(model), "--count", "64", "--wait")
    waited_s = images["started_at"] - images["created_at"]
    print(f"64 images began {waited_s:.2f} s after they were asked for")
    assert images["state"] == "succeeded"
    assert ganq.job(training)["state"] in ("queued", "running"), "it had ended before it had to yield"

    assert ganq.run("wait", str(training), "--timeout", "120").returncode == 0
    job = ganq.job(training)
    assert [one["outcome"] for one in job["attempts"]] == ["requeued", "succeeded"]
    assert (job["yields"], job["bit_exact"]) == (1, True)
    final = [attempt_folder(ganq, one) / "checkpoints" / "final" for one in (plain, training)]
    assert weights(final[0]) == weights(final[1])


@pytest.mark.tier2_on("postgres")
def test_a_training_with_no_preempt_is_left_alone(ganq: Ganq, redis_url: str, small: list[str]) -> None:
    ganq.start_worker()
    ganq("submit", "train", *small, "--epochs", "1", "--name", "model", "--wait")
    training = ganq.json("submit", "train", *small, "--epochs", "100000", "--no-preempt")["id"]
    until(lambda: ganq.peek(training)["state"] == "running", what="a start")
    images = ganq.json("submit", "generate", "--from", "model", "--count", "64")["id"]
    time.sleep(3)
    assert ganq.job(images)["state"] == "queued"
    assert ganq.job(training)["attempt"] == 1
    ganq("cancel", str(training))
    assert ganq.run("wait", str(images), "--timeout", "60").returncode == 0
