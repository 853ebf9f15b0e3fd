"""
Workers that cannot see each other in /proc requeue no running job, and dead ones are noticed at once.

hidepid=2 hides the processes of other users, as hardened machines do; a PID namespace with the /proc of
its host, as some containers have, shows other processes under the same ids.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
import pytest
from machine import Ganq, until
from tables import job_row
from users import HIDEPID, runtime_folders, user, why_not

if TYPE_CHECKING:
    from storage.db.engine import Database

sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
INSIDE = ("unshare", "--pid", "--fork", "--kill-child")
"""Without --mount-proc: /proc stays that of the machine."""
FREE_IDS = ("sh", "-c", 'echo 31000 > /proc/sys/kernel/ns_last_pid && "$@"', "sh")
"""So that the container's processes have ids that are (most likely) no process's of the machine."""


@pytest.fixture(autouse=True)
def _can_hide(request: pytest.FixtureRequest) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("namespaces and other users need root")
    for command in ((*HIDEPID, *user(64001), "true"), (*INSIDE, "true")):
        if (why := why_not(*command)) is not None:
            pytest.skip(why)
    folders = runtime_folders(request, 64001, 64002)
    yield
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def running(ganq: Ganq, database: "Database", small: list[str]) -> int:
    """A training that lasts and has started."""
    job = int(ganq.json("submit", "train", *small, "--epochs", "100000", "--checkpoint-seconds", "0.5")["id"])
    until(lambda: ganq.steps(job) or job_row(database, job)["attempt"] > 1, what="a checkpoint")
    assert job_row(database, job)["attempt"] == 1, "it was requeued"
    return job


def supervisor_of(worker: "subprocess.Popen[bytes]") -> psutil.Process:
    for one in psutil.Process(worker.pid).children(recursive=True):
        if "worker.supervisor.loop" in one.cmdline():
            return one
    raise AssertionError("no supervisor")


@pytest.mark.tier2
@sqlite_only
def test_workers_of_two_users_who_cannot_see_each_other_share_a_machine(
    ganq: Ganq, database: "Database", small: list[str]
) -> None:
    first = ganq.start_worker("ada", within=(*HIDEPID, *user(64001)))
    job = running(ganq, database, small)
    ganq.start_worker("bob", within=(*HIDEPID, *user(64002)))
    until(lambda: len(ganq.present()) == 2, what="bob")
    time.sleep(2.0)
    assert job_row(database, job)["attempt"] == 1, ganq.log("bob")
    assert "requeued: " not in ganq.log("bob") + ganq.log("ada")

    supervisor_of(first).kill()
    killed = time.monotonic()
    until(lambda: job_row(database, job)["attempt"] == 2, what="the rescue")
    assert "(process" in ganq.log("bob") + ganq.log("ada"), "it was the lease"
    assert time.monotonic() - killed < 60
    ganq("cancel", str(job))
    until(lambda: job_row(database, job)["finished_at"], what="the cancel")


@sqlite_only
def test_a_worker_in_a_container_that_sees_its_hosts_proc_keeps_its_job(
    ganq: Ganq, database: "Database", small: list[str]
) -> None:
    container = ganq.start_worker(within=(*INSIDE, *FREE_IDS))
    try:
        job = running(ganq, database, small)
        time.sleep(3.0)
        assert job_row(database, job)["attempt"] == 1, ganq.log()
        assert "requeued: " not in ganq.log()
        ganq("cancel", str(job))
        until(lambda: job_row(database, job)["finished_at"], what="the cancel")
    finally:
        for one in psutil.Process(container.pid).children(recursive=True):  # unshare passes no signal on
            if "cli.main" in one.cmdline() and one.cmdline()[0] != "sh":  # init of its namespace: takes none
                one.terminate()
                break


def in_container(code: str) -> str:
    done = subprocess.run(
        [*INSIDE, sys.executable, "-c", f"import os\nfrom worker.host.process import *\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_another_processs_start_is_not_read_for_that_of_the_same_id() -> None:
    """In the namespace this process's id is 1, which in /proc is the machine's init."""
    assert in_container("print(proc_is_ours(), start_ticks(os.getpid()), has_died(os.getpid(), 7))") == (
        "False 0 False"
    )
    assert in_container("print(has_died(54321, 0), describe_state(1))") == "True not visible in /proc"
    assert in_container("import os; print(bool(boot_id()))") == "True"


def test_without_proc_no_process_is_of_this_boot() -> None:
    hidden = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
    code = "import os\nfrom worker.host.process import *\nprint([boot_id()], has_died(os.getpid(), 7))"
    done = subprocess.run([*hidden, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[''] False"
