"""A training that ends after a time, although its worker is killed in between, and goes on from there."""

import pytest
from machine import Ganq, attempt_folder, part, until, weights
from tables import without_backoff

pytestmark = pytest.mark.tier2


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_time_counts_over_all_attempts_and_the_run_continues_to_the_same_bits(
    ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    worker = ganq.start_worker()
    options = [*small, "--epochs", "300", "--save-every", "100"]
    plain = ganq.json("submit", "train", *options, "--wait")["id"]
    long = [*small, "--epochs", "100000", "--save-every", "10000", "--checkpoint-seconds", "0.3"]
    job = ganq.json("submit", "train", *long, "--stop-after", "8s")["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    assert 0 < ganq.job(job)["eta_seconds"] <= 8
    runner = part(worker, "worker.runner.main")
    assert runner is not None
    runner.kill()
    with without_backoff(ganq.table):
        assert ganq.run("wait", str(job), "--timeout", "120").returncode == 0
    ended = ganq.job(job)
    assert [one["outcome"] for one in ended["attempts"]] == ["crashed", "succeeded"]
    assert ended["result"]["stop_after"] == "8s"
    assert 8 <= ganq.peek(job)["ran_s"] < 30
    assert ended["inputs"]["stop_step"] == ended["result"]["step"] == ganq.steps(job)[-1]
    assert "stopped after 8s" in ganq("status", str(job))

    short = ganq.json("submit", "train", *options, "--stop-after", "100", "--wait")
    assert (short["progress"]["epoch"], short["state"]) == (100, "succeeded")
    again = ganq.json("submit", "train", "--continue", str(short["id"]), "--wait")["id"]
    final = [attempt_folder(ganq, one) / "checkpoints" / "final" for one in (plain, again)]
    assert weights(final[0]) == weights(final[1])
    used = ganq.run("submit", "train", "--continue", str(again), "--epochs", "400", "--stop-after", "9")
    assert (used.returncode, "--stop-after 9-epochs adds none" in used.stderr) == (2, True)
