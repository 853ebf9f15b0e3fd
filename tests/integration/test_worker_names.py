"""A worker's name belongs to one live worker, whichever machines and containers share a job table."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from machine import Ganq, until

from jobs.errors import WorkerNameTakenError
from storage.db.engine import Database
from storage.db.workers import WorkerStore

if TYPE_CHECKING:
    from storage.db.queries import Queries

MACHINE = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


# --- the rows ------------------------------------------------------------------------------


@pytest.fixture
def report(database: Database, make_identity: Any) -> Callable[..., WorkerStore]:
    """A worker's view of the table; each has a process of its own, on a machine of its own."""

    def make(pid: int, **intervals: float) -> WorkerStore:
        return WorkerStore(database, make_identity("w1", pid=pid, boot_id=f"boot-{pid}"), **intervals)

    return make


def pid_of_row(queries: Any) -> int:
    (row,) = queries.workers()
    return int(row.pid)


def test_the_first_of_two_live_workers_keeps_its_name_and_the_second_learns_of_it(
    report: Callable[..., WorkerStore], queries: "Queries"
) -> None:
    first, second = report(1), report(2)
    first.report("starting")
    assert not first.name_disputed
    second.report("starting")
    assert second.name_disputed, "the first has just spoken, and may live"
    first.report("idle")
    assert pid_of_row(queries) == 1
    with pytest.raises(WorkerNameTakenError) as caught:
        second.report("idle")
    assert "process 1" in caught.value.message
    assert "--name" in (caught.value.hint or "")
    second.report("stopped")
    (row,) = queries.workers()
    assert (row.pid, row.state) == (1, "idle"), "the second leaves the first's row alone"


def test_a_restarted_worker_has_its_name_at_once_and_keeps_it(
    report: Callable[..., WorkerStore], queries: "Queries"
) -> None:
    report(1).report("idle")  # and is killed
    second = report(2, heartbeat_seconds=0.0)
    second.report("starting")
    assert pid_of_row(queries) == 2
    second.report("idle")
    assert not second.name_disputed


def test_a_worker_that_exited_cleanly_is_known_as_stopped(report: Callable[..., WorkerStore]) -> None:
    first, second = report(1), report(2)
    first.report("idle")
    first.report("stopped")
    second.report("starting")
    assert not second.name_disputed


def test_a_worker_that_was_away_for_a_lease_has_lost_its_name_to_the_one_in_its_place(
    report: Callable[..., WorkerStore], queries: "Queries"
) -> None:
    first, second = report(1, lease_seconds=0.0), report(2)
    first.report("idle")
    second.report("starting")
    with pytest.raises(WorkerNameTakenError):
        first.report("idle")
    second.report("idle")
    assert pid_of_row(queries) == 2


def test_a_worker_whose_namesake_has_stopped_takes_its_row_back(
    report: Callable[..., WorkerStore], queries: "Queries"
) -> None:
    first, second = report(1, lease_seconds=0.0), report(2)
    first.report("idle")
    second.report("starting")
    second.report("stopped")
    first.report("idle")
    assert pid_of_row(queries) == 1


def test_a_row_that_was_deleted_meanwhile_is_made_again(
    report: Callable[..., WorkerStore], queries: "Queries", database: Database
) -> None:
    from sqlalchemy import delete

    from storage.db.tables import worker

    one = report(1)
    one.report("idle")
    database.write(lambda conn: conn.execute(delete(worker)))
    one.report("busy", 7)
    assert pid_of_row(queries) == 1


def test_beside_a_worker_of_an_older_version_the_new_one_gives_way(
    report: Callable[..., WorkerStore], queries: "Queries", database: Database
) -> None:
    """It writes its row whoever's it is."""
    from sqlalchemy import update

    from storage.db.tables import worker

    one = report(2)
    one.report("starting")
    database.write(lambda conn: conn.execute(update(worker).values(pid=1, boot_id="boot-1", state="idle")))
    with pytest.raises(WorkerNameTakenError):
        one.report("idle")


# --- machines ------------------------------------------------------------------------------


@pytest.fixture
def start_on_machine(ganq: Ganq, tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Starts a worker in a container of its own with a host name that others have, too."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")

    def start(number: int, *options: str) -> "subprocess.Popen[bytes]":
        home = tmp_path / f"home-{number}"
        home.mkdir(exist_ok=True)
        with open(ganq.folder / f"machine-{number}.log", "ab") as log:
            worker = subprocess.Popen(
                [
                    *(*MACHINE, "sh", "-c", 'hostname trainer && exec "$@"', "sh"),
                    *(sys.executable, "-P", "-m", "cli.main", "worker", "--gpus", "none", *options),
                ],
                env={**ganq.env, "GANQ_HOME": str(home)},
                cwd=ganq.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ganq.workers.append(worker)
        return worker

    yield start
    for worker in ganq.workers:
        kill(worker)  # a SIGTERM goes to unshare, which ignores it


def kill(worker: "subprocess.Popen[bytes]") -> None:
    """Kill a container: all of its processes, without a word to the job table."""
    worker.kill()  # --kill-child kills its process 1, and the kernel the rest
    worker.wait()


@pytest.mark.tier2_on("postgres")
def test_two_machines_with_one_host_name_have_two_workers(
    ganq: Ganq, small: list[str], start_on_machine: Callable[..., subprocess.Popen[bytes]]
) -> None:
    start_on_machine(1)
    until(lambda: ganq.present() == ["trainer-cpu"], what="the first")
    (first,) = ganq.json("workers")
    start_on_machine(2)
    until(lambda: sorted(ganq.present()) == ["trainer-cpu", "trainer-cpu-2"], what="the second")
    jobs = [ganq.json("submit", "train", *small, "--epochs", "3000")["id"] for _ in range(2)]
    until(lambda: len({ganq.job(job)["worker"] for job in jobs} - {None}) == 2, what="both at work")
    assert "now named trainer-cpu-2" in (ganq.folder / "machine-2.log").read_text()
    by_name = {row["name"]: row for row in ganq.json("workers")}
    assert by_name["trainer-cpu"]["started_at"] == first["started_at"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_second_worker_with_a_given_name_ends_with_a_hint(
    ganq: Ganq, start_on_machine: Callable[..., subprocess.Popen[bytes]], backend: str
) -> None:
    first = start_on_machine(1, "--name", "w1")
    until(lambda: ganq.present() == ["w1"], what="the first")
    (before,) = ganq.json("workers")
    second = start_on_machine(2, "--name", "w1")
    assert second.wait(timeout=30) == 1
    log = (ganq.folder / "machine-2.log").read_text()
    assert "another worker named w1 is alive" in log
    assert "start this one with another --name" in log
    assert "Traceback" not in log
    until(lambda: ganq.json("workers")[0]["started_at"] == before["started_at"], what="the first's row")
    assert first.poll() is None
    assert ganq.present() == ["w1"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_container_that_was_killed_has_its_name_back_at_once(
    ganq: Ganq, small: list[str], start_on_machine: Callable[..., subprocess.Popen[bytes]], backend: str
) -> None:
    ganq.env["GANQ_HEARTBEAT_SECONDS"], ganq.env["GANQ_LEASE_SECONDS"] = "1", "60"
    worker = start_on_machine(1)
    until(lambda: ganq.present() == ["trainer-cpu"], what="the worker")
    (before,) = ganq.json("workers")
    kill(worker)
    start_on_machine(1)

    def restarted() -> bool:
        (row,) = ganq.json("workers")
        return bool(row["started_at"] > before["started_at"])

    until(restarted, what="the row of the new one")
    done = ganq.run("submit", "train", *small, "--epochs", "1", "--wait")
    assert done.returncode == 0, done.stderr
    assert ganq.job(1)["worker"] == "trainer-cpu"
    assert [row["name"] for row in ganq.json("workers")] == ["trainer-cpu"]
