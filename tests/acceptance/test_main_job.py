"""The main job, end to end, as a user types it: submit, train, generate, status; on both databases."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from machine import Ganq, attempt_folder, part, until, weights
from PIL import Image
from results import verify_manifest

pytestmark = pytest.mark.slow


def test_train_then_generate_through_redis(ganq: Ganq, redis_url: str, small: list[str]) -> None:
    ganq.start_worker()
    train = ganq.json("submit", "train", *small, "--epochs", "2", "--save-every", "1", "--name", "tiny")["id"]
    generate = ganq.json("submit", "generate", "--count", "40", "--grid", "16")["id"]
    assert ganq.run("wait", str(train), str(generate), "--timeout", "90").returncode == 0
    trained, made = ganq.job(train), ganq.job(generate)
    assert trained["state"] == made["state"] == "succeeded"
    assert trained["bit_exact"] is True
    folder = attempt_folder(ganq, generate)
    assert verify_manifest(folder, manifest_sha256=made["result"]["manifest_sha256"]) == 40
    assert len(list((folder / "grids").iterdir())) == 3
    with Image.open(attempt_folder(ganq, train) / "samples" / "epoch-0002.png") as grid:
        assert grid.size[0] > 16 * 8
    spec = json.loads((folder.parent / "spec.json").read_text())
    assert spec["spec"]["count"] == 40


@pytest.mark.tier2_on("sqlite")
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(ganq: Ganq, small: list[str]) -> None:
    options = [*small, "--epochs", "40", "--save-every", "5", "--checkpoint-seconds", "0.3"]
    worker = ganq.start_worker()
    plain = ganq.json("submit", "train", *options)["id"]
    assert ganq.run("wait", str(plain), "--timeout", "120").returncode == 0
    killed = ganq.json("submit", "train", *options)["id"]
    until(lambda: len(ganq.steps(killed)) >= 1, what="a first checkpoint")
    runner = part(worker, "worker.runner.main")
    assert runner is not None
    runner.send_signal(signal.SIGKILL)
    until(lambda: ganq.peek(killed)["attempt"] == 2, what="a second attempt")
    until(lambda: len(list(attempt_folder(ganq, killed).glob("checkpoints/*"))) >= 1, what="its checkpoint")
    supervisor = part(worker, "worker.supervisor.loop")
    assert supervisor is not None
    supervisor.send_signal(signal.SIGKILL)
    assert ganq.run("wait", str(killed), "--timeout", "120").returncode == 0
    job = ganq.job(killed)
    assert job["attempt"] >= 2
    assert job["bit_exact"] is True
    final = [attempt_folder(ganq, one) / "checkpoints" / "final" for one in (plain, killed)]
    assert weights(final[0]) == weights(final[1])


@pytest.mark.tier2_on("postgres")
def test_sigterm_drains_and_another_worker_continues(ganq: Ganq, small: list[str]) -> None:
    first = ganq.start_worker("w1")
    job = ganq.json("submit", "train", *small, "--epochs", "2000", "--save-every", "1000")["id"]
    until(lambda: (ganq.peek(job)["progress"] or {}).get("epoch", 0) >= 2, what="two epochs")
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=30) == 0
    drained = ganq.job(job)
    assert drained["state"] == "queued"
    assert [one["outcome"] for one in drained["attempts"]] == ["requeued"]
    assert [one["kind"] for one in ganq.json("checkpoints", str(job))] == ["resume"]
    ganq.start_worker("w2")
    until(lambda: ganq.peek(job)["attempt"] == 2, what="the second worker's attempt")
    until(lambda: "resuming at step" in ganq("logs", str(job)), what="the resumed step")
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")


@pytest.mark.tier2_on("postgres")
def test_a_running_job_is_cancelled_within_seconds_and_the_worker_takes_the_next(
    ganq: Ganq, small: list[str]
) -> None:
    ganq.start_worker()
    long = ganq.json("submit", "train", *small, "--epochs", "100000")["id"]
    until(lambda: ganq.peek(long)["state"] == "running", what="a start")
    assert "cancel requested" in ganq("cancel", str(long))
    until(lambda: ganq.peek(long)["state"] == "cancelled", what="the cancel")
    short = ganq.json("submit", "train", *small, "--epochs", "1")["id"]
    assert ganq.run("wait", str(short), "--timeout", "60").returncode == 0
    assert ganq.run("cancel", str(long)).returncode == 1


@pytest.mark.tier2_on("postgres")
def test_without_redis_jobs_are_accepted_and_found_by_polling(ganq: Ganq, small: list[str]) -> None:
    ganq.start_worker()
    done = ganq.run("submit", "train", *small, "--epochs", "1", "--wait")
    assert done.returncode == 0, done.stderr
    assert "Redis does not answer" in done.stderr


@pytest.mark.tier2_on("postgres")
def test_images_do_not_depend_on_the_worker_or_on_a_kill(ganq: Ganq, small: list[str]) -> None:
    worker = ganq.start_worker()
    ganq("submit", "train", *small, "--epochs", "1", "--name", "m", "--wait")
    tiny = [
        "submit",
        "generate",
        "--from",
        "m",
        "--micro-batch",
        "1",
        "--grid",
        "0",
    ]  # slow enough to be caught
    whole = ganq.json(*tiny, "--count", "6000")["id"]
    until(lambda: (ganq.peek(whole)["progress"] or {}).get("done", 0) > 0, what="the first images")
    runner = part(worker, "worker.runner.main")
    assert runner is not None
    runner.send_signal(signal.SIGKILL)
    assert ganq.run("wait", str(whole), "--timeout", "90").returncode == 0
    assert ganq.job(whole)["attempt"] == 2
    piece = ganq.json(*tiny, "--seeds", "1000-1009,5999")["id"]
    assert ganq.run("wait", str(piece), "--timeout", "60").returncode == 0
    assert verify_manifest(attempt_folder(ganq, whole)) == 6000

    def hashes(job: int) -> dict[int, str]:
        lines = (attempt_folder(ganq, job) / "manifest.jsonl").read_text().splitlines()
        return {line["draw"]: line["sha256"] for line in map(json.loads, lines)}

    small_set, large_set = hashes(piece), hashes(whole)
    assert list(small_set) == [*range(1000, 1010), 5999]
    assert all(large_set[draw] == digest for draw, digest in small_set.items())


@pytest.mark.tier2_on("postgres")
def test_a_bad_data_set_fails_at_once_with_a_hint(ganq: Ganq, tmp_path: Path) -> None:
    ganq.start_worker()
    (tmp_path / "bad").mkdir()
    for i in range(20):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"no image")
    done = ganq.run("submit", "train", "--data", str(tmp_path / "bad"), "--batch", "16", "--wait")
    assert done.returncode == 1
    job = ganq.json("status")[0]
    assert (job["state"], job["error"]["code"], job["attempt"]) == ("failed", "BAD_DATASET", 1)
    assert "20 of 20" in job["error"]["message"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_second_worker_of_one_name_is_refused(ganq: Ganq, backend: str) -> None:
    ganq.start_worker()
    until(lambda: ganq.present(), what="the first worker")
    second = ganq.run("worker", "--gpus", "none", "--name", "w1")
    assert second.returncode == 1
    assert "already holds" in second.stderr


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_up_runs_the_whole_stack_and_leaves_nothing_behind(
    tmp_path: Path, faces: Path, backend: str, settings_env: dict[str, str]
) -> None:
    env = {key: value for key, value in settings_env.items() if key not in ("GANQ_REDIS_URL",)}
    ganq = Ganq(env, tmp_path)
    ganq.env.pop("GANQ_REDIS_URL", None)
    ganq.env["GANQ_HOME"] = str(tmp_path / "up")
    ganq.env.pop("GANQ_DATABASE_URL")
    ganq.env.pop("GANQ_VOLUME")
    import sys

    up = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli.main", "up", "--gpus", "none"],
        env=ganq.env,
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    ganq.workers.append(up)
    try:
        # Its tables are made a moment after the file.
        until(
            lambda: (done := ganq.run("workers", "--json")).returncode == 0 and json.loads(done.stdout),
            what="the stack",
        )
        options = ["--size", "16", "--ngf", "4", "--ndf", "4", "--batch", "16", "--epochs", "1"]
        done = ganq.run("submit", "train", "--data", str(faces), *options, "--wait")
        assert done.returncode == 0, done.stderr
        assert "Redis does not answer" not in done.stderr
        assert "/?token=" in ganq.run("open", "--print").stdout, "the page is served, too"
    finally:
        ganq.stop()
    assert up.returncode == 0
    assert ganq.run("open", "--print").returncode == 3, "the page has ended with the stack"


@pytest.mark.tier2
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_training_that_was_killed_preempted_and_continued_shows_one_folder_of_samples(
    ganq: Ganq, small: list[str]
) -> None:
    volume = Path(ganq.env["GANQ_VOLUME"])
    options = ["--epochs", "60", "--save-every", "5", "--checkpoint-seconds", "0.2", "--metric", "kid"]
    options += ["--name", "faces"]
    worker = ganq.start_worker()
    job = ganq.json("submit", "train", *small, *options)["id"]
    samples = volume / "jobs" / f"{job:06d}" / "samples"
    until(lambda: len(list(samples.glob("*.png"))) >= 2, what="two samples")
    runner = part(worker, "worker.runner.main")
    assert runner is not None
    runner.send_signal(signal.SIGKILL)
    until(lambda: ganq.peek(job)["attempt"] == 2, what="a second attempt")
    until(lambda: len(list(samples.glob("*.png"))) >= 4, what="more samples")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=30) == 0
    ganq.start_worker("w2")
    assert ganq.run("wait", str(job), "--timeout", "120").returncode == 0
    assert ganq.peek(job)["attempt"] == 3
    expected = {f"epoch-{epoch:04d}.png" for epoch in range(5, 65, 5)}
    assert {path.name for path in samples.glob("*.png")} == expected
    assert ganq("open", "faces", "--print") == f"{samples}\n"
    assert {path.name for path in (volume / "latest" / "faces" / "samples").glob("*.png")} == expected
    own = {path.name for path in (samples.parent / "a1" / "samples").glob("*.png")}
    assert own < expected, "the first attempt drew only some"
    logged = ganq("logs", "faces")
    assert logged.index("attempt 1") < logged.index("attempt 2") < logged.index("attempt 3")
    assert ganq.job(job)["paths"]["samples"] == str(samples)
    assert "verdict" in ganq("status", "faces")
    epochs = ganq.json("submit", "generate", "--from", "faces", "--count", "8", "--grid-epochs", "--wait")
    assert epochs["result"]["frames"] == len(expected)
