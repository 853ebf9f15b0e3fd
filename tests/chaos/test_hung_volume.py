"""A volume that does not answer (an NFS server or FUSE daemon that is gone) holds no job and no command."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from machine import LATER, Ganq, part, postgres_later, until
from mounts import HangingMount, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
on_sqlite = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)

HUNG_S = 2.0
ENV = {"GANQ_VOLUME_SECONDS": str(HUNG_S), "GANQ_ENABLE_FAILPOINTS": "1"}
ENDLESS = ["--epochs", "100000", "--save-every", "100000", "--checkpoint-seconds", "0.5"]


@pytest.fixture(params=[False, pytest.param(True, marks=LATER)], ids=["killable", "unkillable"])
def deep(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def mount(ganq: Ganq, deep: bool) -> Iterator[HangingMount]:
    """The volume of this machine's commands and workers, seen through FUSE."""
    with HangingMount(Path(ganq.env["GANQ_VOLUME"]), ganq.folder / "mounted", deep=deep) as mounted:
        yield mounted
        mounted.go_on()
        for worker in ganq.workers:  # before the mount goes
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in ganq.workers:
            worker.wait(timeout=30)


only_killable = pytest.mark.parametrize("deep", [False], indirect=True, ids=["killable"])


def _start(ganq: Ganq, mount: HangingMount, name: str = "w1", **env: str) -> "subprocess.Popen[bytes]":
    """A worker whose volume can hang."""
    return ganq.start_worker(name, **{**ENV, "GANQ_VOLUME": str(mount.place), **env})


def _train(ganq: Ganq, small: list[str], *options: str) -> int:
    job: int = ganq.json("submit", "train", *small, *options)["id"]
    return job


def _runs(ganq: Ganq, job: int, name: str = "w1") -> None:
    def running() -> bool:
        row = ganq.peek(job)
        return row["worker"] == name and bool(row["progress"]) and len(ganq.steps(job)) > 0

    until(running, what=f"job {job} at work on {name}")


def _state(ganq: Ganq, name: str = "w1") -> str:
    from storage.db.queries import Queries

    return next(one.state for one in Queries(ganq.table).workers() if one.name == name)


@postgres_later
@pytest.mark.tier2_on("postgres")
def test_a_job_leaves_a_worker_whose_volume_hangs(ganq: Ganq, small: list[str], mount: HangingMount) -> None:
    hung = _start(ganq, mount)
    job = _train(ganq, small, "--epochs", "120", "--save-every", "1000", "--checkpoint-seconds", "0.5")
    _runs(ganq, job)
    mount.hang()
    ganq.start_worker("w2")
    until(lambda: ganq.peek(job)["worker"] == "w2", within_s=40, what="the job on the other worker")
    until(lambda: ganq.peek(job)["state"] == "succeeded", within_s=60, what="its end")
    history = ganq.json("status", str(job))["attempts"]
    assert "has not answered" in history[0]["error_message"]
    assert ganq.peek(job)["crash_count"] == 0, "that counts against no job"
    assert _state(ganq) == "volume hung"
    mount.go_on()
    until(lambda: _state(ganq) == "idle", within_s=30, what="a worker that is well again")
    ganq.workers[-1].send_signal(signal.SIGTERM)
    ganq.workers[-1].wait(timeout=30)
    again = _train(ganq, small, "--epochs", "1")
    until(lambda: ganq.peek(again)["state"] == "succeeded", within_s=60, what="work on it")
    assert ganq.peek(again)["worker"] == "w1"
    assert hung.poll() is None


@on_sqlite
def test_an_idle_worker_whose_volume_hangs_claims_nothing_and_says_so(
    ganq: Ganq, small: list[str], redis_url: str, mount: HangingMount
) -> None:
    _start(ganq, mount)
    until(lambda: ganq.present() and _state(ganq) == "idle", what="a worker")
    mount.hang()
    until(lambda: _state(ganq) == "volume hung", within_s=20, what="its word")
    job = _train(ganq, small, "--epochs", "1")
    time.sleep(2.0)
    assert ganq.peek(job)["attempt"] == 0
    (about,) = ganq.json("health")["workers"]
    assert about["status"] == "degraded"
    assert f"volume {mount.place} has not answered for" in about["why"]
    assert "volume hung" in ganq("workers")
    ganq.start_worker("w2")
    until(lambda: ganq.peek(job)["state"] == "succeeded", within_s=60, what="the job's end")
    assert ganq.peek(job)["worker"] == "w2"


@pytest.mark.tier2
@on_sqlite
def test_cancel_ends_a_job_whose_volume_hangs(ganq: Ganq, small: list[str], mount: HangingMount) -> None:
    """Long before it would be given back."""
    _start(ganq, mount, GANQ_VOLUME_SECONDS="600")
    job = _train(ganq, small, *ENDLESS)
    _runs(ganq, job)
    mount.hang()
    time.sleep(1.0)
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", within_s=40, what="cancelled")


@pytest.mark.tier2
@on_sqlite
def test_sigterm_ends_a_worker_whose_volume_hangs(ganq: Ganq, small: list[str], mount: HangingMount) -> None:
    worker = _start(ganq, mount)
    job = _train(ganq, small, *ENDLESS)
    _runs(ganq, job)
    mount.hang()
    time.sleep(0.5)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=40) == 0
    assert ganq.peek(job)["state"] == "queued"


@pytest.mark.tier2
@on_sqlite
@pytest.mark.parametrize("deep", [True], indirect=True, ids=["unkillable"])
def test_a_runner_that_cannot_be_killed_is_named_and_not_waited_for(
    ganq: Ganq, small: list[str], mount: HangingMount
) -> None:
    # Time for the runner to reach its next checkpoint, in which it can no longer be killed.
    worker = _start(ganq, mount, GANQ_VOLUME_SECONDS=str(3 * HUNG_S))
    job = _train(ganq, small, *ENDLESS)
    _runs(ganq, job)
    runner = part(worker, "worker.runner.main")
    assert runner is not None
    mount.hang()
    until(lambda: ganq.peek(job)["state"] == "queued", within_s=40, what="the job given back")
    # A zombie, if its first thread has died and another waits for the volume.
    assert runner.status() in (psutil.STATUS_DISK_SLEEP, psutil.STATUS_ZOMBIE)
    assert f"the runner (process {runner.pid}) does not die" in ganq.log()
    ganq("cancel", str(job))
    mount.go_on()
    until(
        lambda: part(worker, "worker.runner.main") not in (None, runner), within_s=30, what="another runner"
    )
    again = _train(ganq, small, "--epochs", "1")
    until(lambda: ganq.peek(again)["state"] == "succeeded", within_s=60, what="work on it")


@pytest.mark.tier2
@on_sqlite
def test_commands_do_not_wait_for_a_volume_that_hangs(
    ganq: Ganq, small: list[str], mount: HangingMount
) -> None:
    ganq.start_worker("w2")
    job = _train(ganq, small, "--epochs", "1")
    until(lambda: ganq.peek(job)["state"] == "succeeded", what="a job with results")
    ganq.env = {**ganq.env, "GANQ_VOLUME": str(mount.place)}
    mount.hang()

    def asked(*arguments: str) -> "subprocess.CompletedProcess[str]":
        began = time.monotonic()
        done = ganq.run(*arguments)
        assert time.monotonic() - began < 45
        return done

    page = asked("status", str(job))
    assert page.returncode == 0
    assert f"the volume {mount.place} does not answer" in page.stdout
    assert json.loads(asked("status", str(job), "--json").stdout)["state"] == "succeeded"
    assert asked("status").returncode == 0
    for command in (
        ("open", str(job)),
        ("logs", str(job)),
        ("dataset", "list"),
        ("gc", "--dry-run"),
        ("export", str(job), "--out", str(ganq.folder / "exported")),
    ):
        done = asked(*command)
        assert done.returncode == 1, command
        assert f"the volume {mount.place} does not answer" in done.stderr, command
    doctor = asked("doctor")
    assert f"the volume {mount.place} does not answer" in doctor.stdout
    refused = asked("worker", "--gpus", "none", "--name", "w3")
    assert refused.returncode == 1
    assert f"the volume {mount.place} does not answer" in refused.stderr


@on_sqlite
@only_killable
def test_doctor_names_workers_whose_volume_hangs(ganq: Ganq, mount: HangingMount) -> None:
    _start(ganq, mount)
    until(lambda: ganq.present() and _state(ganq) == "idle", what="a worker")
    mount.hang()
    until(lambda: _state(ganq) == "volume hung", within_s=20, what="its word")
    found: list[dict[str, Any]] = json.loads(ganq.run("doctor", "--json").stdout)["findings"]
    assert any("w1" in str(one) and "volume" in str(one) and "does not answer" in str(one) for one in found)
