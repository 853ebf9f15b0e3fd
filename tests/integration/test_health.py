"""`ganq health` with real workers: busy, stopped, killed, draining, and with the database away."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from machine import Ganq, part, until

from worker.host import live_supervisors as health

if TYPE_CHECKING:
    from services import Redis

    from storage.db.engine import Database
    from storage.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture
def backend() -> str:
    """One is enough: health asks no database, except where a test brings its own."""
    return "sqlite"


@pytest.fixture
def ask(ganq: Ganq) -> Callable[..., Any]:
    """Runs `ganq health --json` as a container's engine does: (exit code, the workers' conditions)."""

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        done = ganq.run("health", "--json", *arguments)
        told = json.loads(done.stdout)
        assert told["healthy"] is (done.returncode == 0)
        return done.returncode, told["workers"]

    return run


@pytest.fixture
def ready(ganq: Ganq, ask: Callable[..., Any]) -> Callable[..., "tuple[subprocess.Popen[bytes], int]"]:
    """Starts a worker and waits until it is well: (its process, its supervisor's id)."""

    def start(name: str = "w1", **env: str) -> "tuple[subprocess.Popen[bytes], int]":
        worker = ganq.start_worker(name, **env)
        until(lambda: ask("--worker", name)[0] == 0, what="a healthy worker")
        supervisor = part(worker, "worker.supervisor.loop")
        assert supervisor is not None
        return worker, supervisor.pid

    return start


@pytest.fixture
def stopped(request: pytest.FixtureRequest) -> Iterator[Callable[[int], psutil.Process]]:
    """Stops a process as kill -STOP does; it goes on at the end of the test."""
    processes: list[psutil.Process] = []

    def stop(pid: int) -> psutil.Process:
        processes.append(psutil.Process(pid))
        processes[-1].suspend()
        return processes[-1]

    yield stop
    for one in processes:
        if one.is_running():
            one.resume()


def test_an_idle_a_busy_and_a_draining_worker_are_healthy_and_one_that_left_is_not(
    ganq: Ganq,
    small: list[str],
    ready: Callable[..., tuple[subprocess.Popen[bytes], int]],
    ask: Callable[..., Any],
) -> None:
    worker, supervisor = ready()
    _, (idle,) = ask()
    assert (idle["status"], idle["state"], idle["pid"]) == ("healthy", "idle", supervisor)
    job = ganq.json("submit", "train", *small, "--epochs", "2000", "--save-every", "1000")["id"]
    until(lambda: ask()[1][0]["state"] == "busy", what="a busy worker")
    code, (busy,) = ask()
    assert (code, busy["status"], busy["job_id"]) == (0, "healthy", job)
    assert ganq("health") == f"healthy: w1 is busy with job {job}\n"
    worker.send_signal(signal.SIGTERM)
    worker.wait(timeout=30)
    code, (left,) = ask()
    assert code == 1
    assert "has stopped" in left["why"]
    assert not list(runtime_of(ganq).glob("live-*")), "a worker that left has cleaned up"


def test_a_draining_worker_says_so_and_is_healthy(
    ganq: Ganq,
    small: list[str],
    ready: Callable[..., tuple[subprocess.Popen[bytes], int]],
    ask: Callable[..., Any],
    stopped: Callable[[int], psutil.Process],
) -> None:
    worker, _ = ready(GANQ_DRAIN_SECONDS="8")
    ganq.json("submit", "train", *small, "--epochs", "2000", "--save-every", "1000")
    until(lambda: ask()[1][0]["state"] == "busy", what="a busy worker")
    runner = part(worker, "worker.runner.main")
    assert runner is not None
    stopped(runner.pid)  # so that the drain takes its time
    worker.send_signal(signal.SIGTERM)
    until(lambda: ask()[1][0].get("state") == "draining", within_s=8, what="a draining worker")
    code, (told,) = ask()
    assert (code, told["status"]) == (0, "healthy")
    assert told["draining_s"] >= 0


def test_a_stopped_supervisor_is_unhealthy_within_its_five_seconds_and_well_again_after(
    ganq: Ganq,
    ready: Callable[..., tuple[subprocess.Popen[bytes], int]],
    ask: Callable[..., Any],
    stopped: Callable[[int], psutil.Process],
) -> None:
    _, supervisor = ready()
    process = stopped(supervisor)
    began = time.monotonic()
    code, (told,) = ask()
    took = time.monotonic() - began
    assert code == 1
    assert f"process {supervisor} does not answer within 5 s: it is stopped" in told["why"]
    assert took < health.ANSWER_S + 4
    process.resume()
    assert ask()[0] == 0


@pytest.mark.tier2
def test_several_stopped_workers_take_no_longer_than_one_and_hide_no_healthy_one(
    ganq: Ganq,
    ready: Callable[..., tuple[subprocess.Popen[bytes], int]],
    ask: Callable[..., Any],
    stopped: Callable[[int], psutil.Process],
) -> None:
    for name in ("w1", "w2", "w3"):
        _, supervisor = ready(name)
        if name != "w2":
            stopped(supervisor)
    began = time.monotonic()
    code, told = ask()
    assert time.monotonic() - began < health.ANSWER_S + 4
    assert code == 1
    assert {one["worker"]: one["status"] for one in told} == {
        "w1": "unhealthy",
        "w2": "healthy",
        "w3": "unhealthy",
    }
    assert ask("--worker", "w2")[0] == 0
    assert ask("--worker", "w1")[0] == 1


def test_a_supervisor_that_was_killed_is_unhealthy_until_another_has_taken_its_place(
    ganq: Ganq,
    ready: Callable[..., tuple[subprocess.Popen[bytes], int]],
    ask: Callable[..., Any],
    stopped: Callable[[int], psutil.Process],
) -> None:
    worker, supervisor = ready()
    stopped(worker.pid)  # whoever would start another
    psutil.Process(supervisor).kill()
    until(lambda: not psutil.pid_exists(supervisor) or ask()[0] == 1, what="its end")
    code, (told,) = ask()
    assert code == 1
    assert "supervisor" in told["why"]
    psutil.Process(worker.pid).resume()
    until(lambda: ask()[0] == 0, what="another supervisor")
    assert ask()[1][0]["pid"] != supervisor


def test_a_worker_that_was_killed_as_a_whole_is_unhealthy_and_its_successor_is_not(
    ganq: Ganq, ready: Callable[..., tuple[subprocess.Popen[bytes], int]], ask: Callable[..., Any]
) -> None:
    worker, supervisor = ready()
    psutil.Process(worker.pid).suspend()  # else it may start another supervisor in between
    for pid in (supervisor, worker.pid):
        psutil.Process(pid).kill()
    worker.wait(timeout=10)
    code, (told,) = ask()
    assert code == 1
    assert "was killed" in told["why"]
    ready("w1")
    assert [one["status"] for one in ask()[1]] == ["healthy"]


@pytest.mark.parametrize("how", ["halted", "silent"])
def test_a_database_that_is_away_makes_a_worker_degraded_and_no_worker_dead(
    ganq: Ganq,
    settings_env: dict[str, str],
    small: list[str],
    tmp_path: Path,
    how: str,
    ask: Callable[..., Any],
    ready: Callable[..., tuple[subprocess.Popen[bytes], int]],
) -> None:
    from services import Postgres, postgres_binaries

    binaries = postgres_binaries()
    assert binaries is not None
    with Postgres(binaries) as server:
        ganq.env["GANQ_DATABASE_URL"] = server.tcp_url(server.create())
        ganq("db", "upgrade")
        ready()
        job = ganq.json("submit", "train", *small, "--epochs", "3000", "--save-every", "1000")["id"]
        until(lambda: ask()[1][0]["state"] == "busy", what="a busy worker")
        with away(server, how):
            until(lambda: ask()[1][0]["status"] == "degraded", within_s=20, what="a degraded worker")
            code, (told,) = ask()
            assert (code, told["job_id"], told["state"]) == (0, job, "busy")
            assert "the job table has not answered for" in told["why"]
        until(lambda: ask()[1][0]["status"] == "healthy", what="a worker that speaks again")
        assert ganq.job(job)["state"] in ("running", "queued")
        ganq.stop()


class away:  # noqa: N801 - reads as a phrase
    """Postgres halted: it refuses. Or silent: it accepts and never answers, as behind half-open TCP."""

    def __init__(self, server: Any, how: str) -> None:
        self.server = server
        self.how = how

    def __enter__(self) -> None:
        if self.how == "halted":
            self.server.halt()
            return
        master = psutil.Process(self.server.process.pid)
        self.all = [master, *master.children(recursive=True)]
        for one in self.all:
            with suppress(psutil.NoSuchProcess):  # a backend that has just ended
                one.suspend()

    def __exit__(self, *_: object) -> None:
        if self.how == "halted":
            self.server.restart()
            return
        for one in reversed(self.all):
            with suppress(psutil.NoSuchProcess):
                one.resume()


def test_a_worker_whose_celery_and_redis_receive_nothing_is_healthy_because_it_polls(
    ganq: Ganq,
    redis_server: "Redis",
    redis_url: str,
    small: list[str],
    ready: Callable[..., tuple[subprocess.Popen[bytes], int]],
    ask: Callable[..., Any],
) -> None:
    ready()
    redis_server.halt()
    try:
        job = ganq.json("submit", "train", *small, "--epochs", "1", "--save-every", "1")["id"]
        until(lambda: ganq.peek(job)["state"] == "succeeded", what="a job found by polling")
        assert ask()[0] == 0
    finally:
        redis_server.restart()


def test_health_starts_as_fast_as_status_and_loads_no_database(
    ganq: Ganq, ready: Callable[..., tuple[subprocess.Popen[bytes], int]]
) -> None:
    ready()
    program = (
        "import sys; from cli.main import main; code = main(['health'])\n"
        "assert {'torch', 'celery', 'redis', 'numpy', 'sqlalchemy', 'pydantic'}.isdisjoint(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ganq.env, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def runtime_of(ganq: Ganq) -> Path:
    from storage.settings import Settings

    return Settings.load(
        {name: value for name, value in ganq.env.items() if name.startswith("GANQ_")}
    ).runtime


def test_a_worker_of_another_host_is_judged_by_the_job_table(
    ganq: Ganq, settings: "Settings", database: "Database", ask: Callable[..., Any]
) -> None:
    from storage.db.rows import WorkerIdentity
    from storage.db.workers import WorkerStore

    who = WorkerIdentity("far", "elsewhere", "cpu", "boot", 1, 1, ("default",), "0.1.0")
    WorkerStore(database, who).report("idle")
    code, (told,) = ask("--worker", "far")
    assert (code, told["why"]) == (0, "is idle, by the job table")
    assert ask()[0] == 1, f"{socket.gethostname()} has none"
