"""
A machine that starts no process and no thread for some seconds (a pids limit), while one of ours is killed.

Whoever must start another tries again until it works, with one line each time; no job pays for it.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from machine import Ganq, part, the_part, until
from sqlalchemy import Connection, select
from tables import event_types, job_row
from users import limited_user, no_more_processes, processes_again, runtime_folders, why_not

from storage.db.tables import attempt

if TYPE_CHECKING:
    from services import Redis

    from storage.db.engine import Database

UID = 64003
sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
SHORT = "cannot be started: BlockingIOError"


@pytest.fixture(autouse=True)
def _can_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    if (why := why_not(*limited_user(UID), "prlimit", "--nproc=1000:", "true")) is not None:
        pytest.skip(why)
    folders = runtime_folders(request, UID)
    yield
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def outcomes(database: "Database", job: int) -> list[Any]:
    def ask(conn: Connection) -> list[Any]:
        rows = select(attempt.c.outcome).where(attempt.c.job_id == job).order_by(attempt.c.number)
        return list(conn.execute(rows).scalars())

    return database.read(ask)


def held_training(ganq: Ganq, small: list[str]) -> int:
    """
    A training that lasts, before its worker is there.

    The workers' account reads the data by its capabilities, of which submit knows nothing: it would refuse.
    """
    asked = ("submit", "train", *small, "--epochs", "100000", "--checkpoint-seconds", "0.5", "--hold")
    return int(ganq.json(*asked)["id"])


def begin(ganq: Ganq, job: int) -> None:
    """Let a held training run until it has a checkpoint."""
    ganq("release", str(job))
    until(lambda: ganq.steps(job), what="a checkpoint")


def goes_on(ganq: Ganq, database: "Database", job: int) -> None:
    newest = max(ganq.steps(job))
    until(lambda: max(ganq.steps(job)) > newest, what="another checkpoint")
    ganq("cancel", str(job))
    until(lambda: job_row(database, job)["finished_at"], what="the cancel")


def workers(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The children of a process that run `ganq worker`, without the supervisor and the carrier of the log."""
    return [one for one in psutil.Process(process.pid).children() if "cli.main" in one.cmdline()]


def occurrences(log: str, what: str) -> int:
    """How often a log says this, in one line each time; and it shows no traceback, whole or in pieces."""
    assert "Traceback" not in log
    assert "celery.redirected" not in log
    return sum(what in line for line in log.splitlines())


@pytest.mark.tier2
@sqlite_only
def test_a_supervisor_that_cannot_be_started_again_is_tried_until_it_can(
    ganq: Ganq, database: "Database", small: list[str]
) -> None:
    job = held_training(ganq, small)
    launcher = ganq.start_worker(within=limited_user(UID))
    begin(ganq, job)
    supervisor = the_part(launcher, "worker.supervisor.loop")
    no_more_processes(launcher.pid, UID)
    supervisor.kill()
    until(lambda: occurrences(ganq.log(), "cannot start the supervisor") >= 3, what="three tries")
    assert launcher.poll() is None
    processes_again(launcher.pid, UID)
    until(lambda: job_row(database, job)["attempt"] == 2, what="the next attempt")
    goes_on(ganq, database, job)
    assert occurrences(ganq.log(), "cannot start the supervisor (BlockingIOError: ") >= 3


@pytest.mark.tier2
@sqlite_only
def test_a_runner_that_cannot_be_started_costs_its_job_nothing_and_no_other_is_claimed(
    ganq: Ganq, database: "Database", small: list[str]
) -> None:
    job = held_training(ganq, small)
    worker = ganq.start_worker(within=limited_user(UID))
    begin(ganq, job)
    supervisor, runner = (the_part(worker, one) for one in ("worker.supervisor.loop", "worker.runner.main"))
    no_more_processes(supervisor.pid, UID)
    runner.kill()
    until(
        lambda: occurrences(ganq.log(), "no runner can be started (BlockingIOError: ") >= 3,
        what="three tries",
    )
    row = job_row(database, job)
    assert (row["state"], row["error_code"]) == ("queued", "PROCESS_UNAVAILABLE")
    assert row["crash_count"] == 0
    assert outcomes(database, job) == ["retried"], "it was claimed by a worker without a runner"
    assert supervisor.is_running()
    processes_again(supervisor.pid, UID)
    until(lambda: job_row(database, job)["attempt"] == 2, what="the next attempt")
    goes_on(ganq, database, job)


@pytest.mark.tier2
@sqlite_only
def test_a_job_that_gets_no_thread_is_tried_again_and_not_counted_as_a_crash(
    ganq: Ganq, database: "Database", small: list[str]
) -> None:
    job = held_training(ganq, small)
    worker = ganq.start_worker(within=limited_user(UID))
    begin(ganq, job)
    runner = the_part(worker, "worker.runner.main")
    no_more_processes(runner.pid, UID)  # a checkpoint is written by a thread
    until(lambda: "retried" in event_types(database, job), what="the end of that attempt")
    assert outcomes(database, job)[0] == "retried"
    goes_on(ganq, database, job)
    assert job_row(database, job)["crash_count"] == 0


@pytest.mark.tier2
@sqlite_only
def test_celerys_pool_process_comes_back_when_it_can(
    ganq: Ganq, database: "Database", small: list[str], redis_server: "Redis"
) -> None:
    job = held_training(ganq, small)
    launcher = ganq.start_worker(within=limited_user(UID), GANQ_REDIS_URL=redis_server.url)
    until(lambda: part(launcher, "worker.runner.main"), what="the worker")

    def pool() -> psutil.Process | None:
        return next(iter(workers(launcher)), None)  # a fork of the launcher

    first = until(pool, what="Celery's process")
    no_more_processes(launcher.pid, UID)
    first.kill()
    until(lambda: occurrences(ganq.log(), "restarting it") >= 2, what="two tries")
    processes_again(launcher.pid, UID)
    second = until(pool, what="Celery's process again")
    assert second != first
    assert occurrences(ganq.log(), "BlockingIOError") >= 2
    begin(ganq, job)
    goes_on(ganq, database, job)


@sqlite_only
def test_the_parent_of_several_workers_starts_each_again_when_it_can(
    ganq: Ganq, database: "Database"
) -> None:
    parent = ganq.start_worker(within=limited_user(UID), options=("--cpu-workers", "2"))
    until(lambda: len(ganq.present()) == 2, what="two workers")
    child = workers(parent)[0]
    no_more_processes(parent.pid, UID)
    child.kill()
    until(lambda: occurrences(ganq.log(), "cannot start the worker w1-cpu") >= 2, what="two tries")
    assert parent.poll() is None
    processes_again(parent.pid, UID)
    until(lambda: len(workers(parent)) == 2, what="two children")


@pytest.mark.tier2
@sqlite_only
def test_the_local_stack_starts_its_redis_and_its_worker_again_when_it_can(ganq: Ganq) -> None:
    del ganq.env["GANQ_REDIS_URL"]
    up = ganq.start_up(within=limited_user(UID))
    until(lambda: "ganq is up" in ganq.log("up"), what="the stack")

    def child(*words: str) -> psutil.Process | None:
        children = psutil.Process(up.pid).children()
        return next((one for one in children if all(word in " ".join(one.cmdline()) for word in words)), None)

    for words in (("redis-server",), ("cli.main", "worker")):
        first = until(lambda words=words: child(*words), what=words[0])
        no_more_processes(up.pid, UID)
        first.kill()
        before = occurrences(ganq.log("up"), SHORT)
        until(lambda n=before: occurrences(ganq.log("up"), SHORT) >= n + 2, what="tries")
        processes_again(up.pid, UID)
        until(lambda words=words, first=first: child(*words) not in (None, first), what=f"another {words[0]}")
    assert up.poll() is None


def test_a_thread_that_cannot_be_started_is_tried_until_it_can() -> None:
    code = """
import logging, resource, sys, threading
from worker.host.starting import until_started

class Again(logging.Handler):
    def emit(self, record):
        print(record.getMessage())
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))

hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
log = logging.getLogger()
log.addHandler(Again())
thread = threading.Thread(target=print, args=("it runs",))
until_started(thread.start, "the thread heartbeat", log)
thread.join()
"""
    command = [*limited_user(UID), sys.executable, "-c", code]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "cannot start the thread heartbeat (RuntimeError: can't start new thread); trying again in 0.5 s",
        "it runs",
    ]
    assert time.monotonic() - began >= 0.5
