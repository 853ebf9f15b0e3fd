"""
Clocks that jump and machines that sleep: F40 and F41 of the fault matrix.

wallclock.c shifts the wall clock of one process while it runs; the monotonic clock stays,
as it does when NTP or a person sets a clock.
"""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from machine import LATER, Ganq, postgres_later, until
from tables import set_columns

from jobs.errors import DiskFullError
from worker.recovery import Reaper

HOURS = {"ahead": 7200.0, "back": -7200.0}


@dataclass
class Clock:
    """A wall clock that a test can set while a process looks at it."""

    file: Path
    so: Path

    @property
    def env(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.so), "WALLCLOCK_OFFSET": str(self.file)}

    def set(self, offset: float) -> None:
        """Seconds from the true time."""
        with open(self.file, "r+b") as file:  # in place: the process has it mapped
            file.write(struct.pack("d", offset))


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("shifting a process's clock needs Linux and a C compiler (cc)")
    so = tmp_path_factory.mktemp("clock") / "wallclock.so"
    source = Path(__file__).with_name("wallclock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", so, source, "-lm"], check=True)
    return so


@pytest.fixture
def clock(tmp_path: Path, shim: Path) -> Clock:
    found = Clock(tmp_path / "clock", shim)
    found.file.write_bytes(struct.pack("d", 7200.0))
    ask = "import time; time.sleep(0.01); print(time.time(), time.monotonic())"
    said = subprocess.run(
        [sys.executable, "-c", ask],
        env={**os.environ, **found.env},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert abs(float(said[0]) - time.time() - 7200) < 60, "the wall clock is not shifted"
    assert abs(float(said[1]) - time.monotonic()) < 60, "the monotonic clock is shifted, too"
    found.set(0.0)
    return found


def assert_history_never_runs_backwards(ganq: Ganq, job: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = ganq.json("events", str(job))
    times = [one["at"] for one in events]
    assert times == sorted(times), [(one["type"], one["at"]) for one in events]
    return events


def newest(ganq: Ganq, job: int) -> int:
    """The step of the newest checkpoint."""
    return int(ganq.json("checkpoints", str(job))[-1]["step"])


@postgres_later
@pytest.mark.slow
def test_a_workers_clock_may_jump_both_ways_while_another_reaps(ganq: Ganq, small, clock: Clock) -> None:
    ganq.start_worker("jumps", **clock.env)
    job = ganq.json("submit", "train", *small, "--epochs", "100000", "--checkpoint-seconds", "0.5")["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    ganq.start_worker("reaps")
    until(lambda: len(ganq.present()) == 2, what="the worker that reaps")
    for offset in (HOURS["ahead"], HOURS["back"], 0.0):
        clock.set(offset)
        step = newest(ganq, job)
        time.sleep(3.0)  # more than a lease
        until(lambda step=step: newest(ganq, job) > step, what="a checkpoint")
        found = ganq.job(job)
        assert (found["state"], found["attempt"]) == ("running", 1), (
            f"taken back when the clock was set to {offset:+.0f} s"
        )
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")
    assert_history_never_runs_backwards(ganq, job)


@pytest.mark.tier2
@postgres_later
@pytest.mark.slow
@pytest.mark.parametrize("way", ["ahead", pytest.param("back", marks=LATER)])
def test_a_reapers_clock_that_is_wrong_takes_no_job_and_stalls_none(
    ganq: Ganq, small, clock: Clock, way: str
) -> None:
    first = ganq.start_worker("right")
    job = ganq.json("submit", "train", *small, "--epochs", "100000", "--checkpoint-seconds", "0.5")["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    clock.set(HOURS[way])
    ganq.start_worker("wrong", **clock.env)
    until(lambda: len(ganq.present()) == 2, what="the worker whose clock is wrong")
    time.sleep(3.0)
    assert ganq.job(job)["attempt"] == 1, "a live job was taken back"
    # It does take back what is dead, and goes on with it; the next one runs on the right clock.
    first.kill()
    until(lambda: ganq.peek(job)["attempt"] == 2, what="the rescue")
    ganq.start_worker("right2")
    short = ganq.json("submit", "train", *small, "--epochs", "1")["id"]
    assert ganq.run("wait", str(short), "--timeout", "60").returncode == 0
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")
    assert_history_never_runs_backwards(ganq, job)


@pytest.mark.slow
@pytest.mark.parametrize("way", HOURS)
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_clients_clock_changes_nothing(ganq: Ganq, small, clock: Clock, way: str) -> None:
    """On SQLite the client's clock is the table's clock: what it writes there must stall nobody."""
    ganq.start_worker("right")
    until(lambda: ganq.present(), what="the worker")
    clock.set(HOURS[way])
    client = Ganq({**ganq.env, **clock.env}, ganq.folder)
    begun = time.monotonic()
    job = client.json("submit", "train", *small, "--epochs", "1")["id"]
    assert client.run("wait", str(job), "--timeout", "60").returncode == 0
    assert time.monotonic() - begun < 45
    assert client.job(job)["state"] == "succeeded"
    assert client.run("status").returncode == 0
    assert client.run("health").returncode in (0, 1)
    assert_history_never_runs_backwards(ganq, job)


@pytest.mark.parametrize("ahead_s", [7200, 302])
def test_a_backoff_noted_before_the_clock_went_back_is_not_waited_for(
    database, store, running_job_factory, claim, queries, ahead_s
) -> None:
    lease = running_job_factory()
    store.fail(lease, DiskFullError("no room"))
    set_columns(database, lease.job_id, not_before=queries.now() + ahead_s)
    assert store.due_bells(again_s=120, limit=5) == [(lease.job_id, "default")]
    again = claim()
    assert again is not None
    assert again.job_id == lease.job_id


def test_a_backoff_as_long_as_the_longest_is_waited_for(
    database, store, running_job_factory, claim, queries
) -> None:
    lease = running_job_factory()
    store.fail(lease, DiskFullError("no room"))
    set_columns(database, lease.job_id, not_before=queries.now() + 50)
    assert claim() is None


def test_a_bell_noted_before_the_clock_went_back_is_rung_again(database, store, job_factory, queries) -> None:
    made = job_factory()
    set_columns(database, made.id, rung_at=queries.now() + 7200)
    assert store.due_bells(again_s=120, limit=5) == [(made.id, "default")]
    assert store.due_bells(again_s=120, limit=5) == []


def test_a_history_written_before_the_clock_went_back_goes_on_after_it(database, store, job_factory, queries):
    from sqlalchemy import insert

    from storage.models import event

    made = job_factory()
    late = queries.now() + 7200
    database.write(
        lambda conn: conn.execute(insert(event).values(job_id=made.id, at=late, type="claimed", attempt=1))
    )
    store.request_cancel(made.id)
    assert [one.at for one in queries.events(made.id)][-2:] == [late, late]


# --- F41: suspend -------------------------------------------------------------------------------


def family(worker: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    here = psutil.Process(worker.pid)
    return [here, *here.children(recursive=True)]


@pytest.mark.tier2
@postgres_later
@pytest.mark.slow
@pytest.mark.parametrize("first_awake", ["owner", pytest.param("reaper", marks=LATER)])
def test_a_machine_that_slept_longer_than_a_lease_goes_on_where_it_was(
    ganq: Ganq, small, first_awake: str
) -> None:
    owner = ganq.start_worker("owner", GANQ_STALL_SECONDS="12")
    job = ganq.json("submit", "train", *small, "--epochs", "100000", "--checkpoint-seconds", "0.5")["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    reaper = ganq.start_worker("reaper")
    until(lambda: len(ganq.present()) == 2, what="the worker that reaps")
    families = {"owner": family(owner), "reaper": family(reaper)}
    for one in [*families["owner"], *families["reaper"]]:
        one.send_signal(signal.SIGSTOP)
    time.sleep(15.0)  # leases are 2 s here, and a runner that is silent for 12 s is taken as hung
    step = ganq.json("checkpoints", str(job))[-1]["step"]
    last = "reaper" if first_awake == "owner" else "owner"
    for name in (first_awake, last):
        for one in reversed(families[name]):
            one.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    until(lambda: ganq.steps(job)[-1] > step, what="a checkpoint after the sleep")
    found = ganq.job(job)
    assert (found["state"], found["attempt"]) == ("running", 1), found["attempts"]
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")


def test_the_reapers_watch_begins_anew_after_a_gap_of_its_own(settings, store, running_job_factory) -> None:
    running_job_factory()
    reaper = Reaper(store, settings)
    reaper.boot = "another machine"
    assert reaper.tick(now=100.0) == []
    assert reaper.tick(now=100.0 + settings.lease_seconds - 0.5 + reaper.patience_s) == []
    assert reaper.tick(now=100.0 + settings.lease_seconds + reaper.patience_s) == [], "the gap did not count"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a time namespace needs root")
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_workers_in_different_time_namespaces_do_not_take_each_other_for_dead(ganq: Ganq, small) -> None:
    """There, /proc shows other start times for the same process."""
    unshare = shutil.which("unshare")
    probe = subprocess.run(
        [unshare or "false", "-T", "--boottime", "7200", "--monotonic", "7200", "true"], check=False
    )
    if probe.returncode != 0:
        pytest.skip("no time namespaces here")
    ganq.start_worker("here")
    job = ganq.json("submit", "train", *small, "--epochs", "100000")["id"]
    until(lambda: ganq.peek(job)["state"] == "running", what="a start")
    log = open(ganq.folder / "there.log", "ab")  # noqa: SIM115 - the worker keeps writing to it
    command = [unshare or "", "-T", "--boottime", "7200", "--monotonic", "7200", sys.executable]
    there = subprocess.Popen(
        [*command, "-P", "-m", "cli.main", "worker", "--gpus", "none", "--name", "there"],
        env=ganq.env,
        cwd=ganq.folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    log.close()
    ganq.workers.append(there)
    until(lambda: len(ganq.present()) == 2, what="the worker in another time")
    time.sleep(3.0)
    found = ganq.job(job)
    assert (found["state"], found["attempt"]) == ("running", 1), found["attempts"]
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")
