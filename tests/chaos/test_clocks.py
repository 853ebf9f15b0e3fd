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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from machine import LATER, Ganq, postgres_later, until
from sqlalchemy import text
from tables import Claimer, set_columns

from jobs.errors import DiskFullError
from storage.db.backoff import BACKOFF_S, Wait, remaining
from storage.db.workers import WorkerStore
from worker.supervisor.reaper import Reaper

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease, WorkerIdentity
    from storage.db.store import JobStore
    from storage.settings import Settings

HOURS = {"ahead": 7200.0, "back": -7200.0}


@dataclass
class Clock:
    """A wall clock that a test can set while a process reads it."""

    file: Path
    so: Path

    @property
    def env(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.so), "WALLCLOCK_OFFSET": str(self.file)}

    def set(self, offset: float) -> None:
        """Set the clock to this many seconds from the true time."""
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
    result = subprocess.run(
        [sys.executable, "-c", ask],
        env={**os.environ, **found.env},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert abs(float(result[0]) - time.time() - 7200) < 60, "the wall clock is not shifted"
    assert abs(float(result[1]) - time.monotonic()) < 60, "the monotonic clock is shifted, too"
    found.set(0.0)
    return found


def assert_history_never_runs_backwards(ganq: Ganq, job: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = ganq.json("events", str(job))
    times = [one["at"] for one in events]
    assert times == sorted(times), [(one["type"], one["at"]) for one in events]
    return events


def newest(ganq: Ganq, job: int) -> int:
    """Return the step of the newest checkpoint."""
    return int(ganq.json("checkpoints", str(job))[-1]["step"])


@postgres_later
@pytest.mark.slow
@pytest.mark.tier2
def test_a_workers_clock_may_jump_both_ways_while_another_reaps(
    ganq: Ganq, small: list[str], clock: Clock
) -> None:
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
            f"requeued when the clock was set to {offset:+.0f} s"
        )
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")
    assert_history_never_runs_backwards(ganq, job)


@pytest.mark.tier2
@postgres_later
@pytest.mark.slow
@pytest.mark.parametrize("way", ["ahead", pytest.param("back", marks=LATER)])
def test_a_reapers_clock_that_is_wrong_takes_no_job_and_stalls_none(
    ganq: Ganq, small: list[str], clock: Clock, way: str
) -> None:
    first = ganq.start_worker("right")
    job = ganq.json("submit", "train", *small, "--epochs", "100000", "--checkpoint-seconds", "0.5")["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    clock.set(HOURS[way])
    ganq.start_worker("wrong", **clock.env)
    until(lambda: len(ganq.present()) == 2, what="the worker whose clock is wrong")
    time.sleep(3.0)
    assert ganq.job(job)["attempt"] == 1, "a live job was requeued"
    # It does requeue the job of a dead worker, and resumes it; the next worker has the right clock.
    first.kill()
    until(lambda: ganq.peek(job)["attempt"] == 2, what="the rescue")
    ganq.start_worker("right2")
    short = ganq.json("submit", "train", *small, "--epochs", "1")["id"]
    assert ganq.run("wait", str(short), "--timeout", "60").returncode == 0
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")
    assert_history_never_runs_backwards(ganq, job)


@pytest.mark.tier2
@pytest.mark.slow
@pytest.mark.parametrize("way", HOURS)
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_clients_clock_changes_nothing(ganq: Ganq, small: list[str], clock: Clock, way: str) -> None:
    """On SQLite the client's clock is the table's clock: its entries must not delay other workers."""
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
def test_a_backoff_noted_before_the_clock_went_back_is_waited_for_as_long_as_it_was(
    database: "Database",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    claim: Claimer,
    queries: "Queries",
    ahead_s: int,
) -> None:
    lease = running_job_factory()
    store.fail(lease, DiskFullError("no room"))
    set_columns(database, lease.job_id, not_before=queries.now() + ahead_s)
    assert claim.or_none() is None
    assert store.due_notifications(again_s=120, limit=5) == []
    assert 0 < (store.due_in() or 0) <= BACKOFF_S[0]
    time.sleep(BACKOFF_S[0] + 0.1)
    assert store.due_notifications(again_s=120, limit=5) == [(lease.job_id, "default")]
    again = claim()
    assert again is not None
    assert again.job_id == lease.job_id


def test_a_backoff_noted_by_a_clock_that_is_behind_lasts_all_the_same(
    database: "Database",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    claim: Claimer,
    queries: "Queries",
) -> None:
    """So does one whose reader's clock has jumped ahead: it was not there when this worker last looked."""
    assert claim.or_none() is None
    assert store.due_in() is None
    lease = running_job_factory()
    store.fail(lease, DiskFullError("no room"))
    set_columns(database, lease.job_id, not_before=queries.now() - 7200)
    time.sleep(0.6)  # the next poll
    assert claim.or_none() is None
    assert store.due_notifications(again_s=120, limit=5) == []
    time.sleep(BACKOFF_S[0])
    claim()


def test_a_wait_that_another_has_ended_and_that_began_again_is_not_cut_short(
    database: "Database",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    claim: Claimer,
) -> None:
    lease = running_job_factory()
    store.fail(lease, DiskFullError("no room"))
    assert claim.or_none() is None
    time.sleep(BACKOFF_S[0] + 0.05)
    set_columns(database, lease.job_id, not_before=None)  # another worker was sooner; and it failed again
    other = claim()
    assert other is not None
    store.fail(other, DiskFullError("no room"))
    assert claim.or_none() is None


WAITS = {
    "the clocks agree": (2.0, 5.0, 2.0),
    "it was written a moment ago, by the same clock": (1.7, 5.0, 1.7),
    "this clock is ahead": (-7200.0, 0.5, 1.5),
    "this clock is behind": (7200.0, 0.5, 2.0),
    "this clock is ahead, and the last look long ago": (-7200.0, 60.0, 0.0),
    "this is the first look": (-1.0, None, 0.0),
    "this is the first look, and this clock is behind": (7200.0, None, 2.0),
}


@pytest.mark.parametrize("case", WAITS)
def test_what_remains_of_a_wait_is_between_its_length_and_what_the_last_look_leaves(case: str) -> None:
    by_the_clock, gap_s, expected = WAITS[case]
    assert remaining(Wait((1, 0.0), by_the_clock, 1, 0, "DISK_FULL"), gap_s) == expected


@pytest.mark.tier2
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_workers_whose_clocks_differ_by_hours_retry_with_the_backoff(
    ganq: Ganq, small: list[str], tmp_path: Path, shim: Path
) -> None:
    ganq.start_worker("right")
    for name, offset in HOURS.items():
        file = tmp_path / f"clock-{name}"
        file.write_bytes(struct.pack("d", offset))
        ganq.start_worker(name, **Clock(file, shim).env)
    until(lambda: len(ganq.present()) == 3, what="the workers")
    volume = Path(ganq.env["GANQ_VOLUME"])
    volume.rename(volume.with_name("away"))
    volume.write_text("no folder")
    jobs = [ganq.json("submit", "train", *small, "--epochs", "1")["id"] for _ in range(2)]
    until(lambda: all(ganq.peek(one)["waits"] for one in jobs), what="the first failures")
    time.sleep(14.0)
    tries = [ganq.peek(one)["attempt"] for one in jobs]
    assert max(tries) <= 4, f"after 0, 2, 10 and 30 s: {tries}"
    assert min(tries) >= 2, tries
    volume.unlink()
    volume.with_name("away").rename(volume)
    assert ganq.run("wait", *map(str, jobs), "--timeout", "60").returncode == 0


# --- other uses of the clock --------------------------------------------------------------------


def test_users_take_turns_though_the_clock_of_one_worker_was_ahead(
    database: "Database",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    for _ in range(3):
        for user in ("ada", "ben"):
            job_factory(user=user)
    served = []
    for turn in range(6):
        lease = claim()
        served.append(lease.job.user)
        store.succeed(lease, {})
        if turn == 0:
            database.write(lambda conn: conn.execute(text("UPDATE share SET served_at = served_at + 7200")))
    assert served == ["ada", "ben"] * 3


def test_a_training_that_was_preempted_by_a_clock_ahead_is_not_kept_waiting_for_hours(
    database: "Database",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    queries: "Queries",
) -> None:
    training = running_job_factory(preemptible=True, priority=0)
    store.release(training, "preempt")
    job_factory(priority=10)
    set_columns(database, training.job_id, yielded_at=queries.now() + 7200)
    assert claim().job_id == training.job_id


def test_a_job_that_was_submitted_by_a_clock_ahead_still_preempts_a_training(
    database: "Database",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    worker_identity: "WorkerIdentity",
    make_identity: "Callable[..., WorkerIdentity]",
    queries: "Queries",
) -> None:
    """Idle workers count for some seconds after its submit, which lasted for hours."""
    training = running_job_factory(preemptible=True, priority=0)
    WorkerStore(database, make_identity("idle")).report("idle")
    urgent = job_factory(priority=10)
    kinds = ("train", "generate", "evaluate")
    assert store.request_preemption(training, worker_identity, kinds=kinds) is None, (
        "the idle worker takes it"
    )
    set_columns(database, urgent.id, created_at=queries.now() + 7200)
    assert store.request_preemption(training, worker_identity, kinds=kinds) == urgent.id


def test_a_clock_that_jumps_ahead_does_not_use_up_the_time_limit_of_a_lost_job(
    database: "Database",
    store: "JobStore",
    settings: "Settings",
    running_job_factory: "Callable[..., Lease]",
    queries: "Queries",
) -> None:
    reaper = Reaper(store, settings)
    reaper.boot = "another machine"
    reaper.tick(now=100.0)
    lease = running_job_factory(time_limit_s=3600.0)
    move = text("UPDATE attempt SET started_at = started_at - 7200")
    database.write(lambda conn: conn.execute(move))
    for tenths in range(1, 60):
        reaper.tick(now=100.0 + tenths / 10)
    found = queries.get(lease.job_id)
    assert found.state == "queued"
    assert found.ran_s == pytest.approx(settings.lease_seconds, abs=1.0)


def test_a_backoff_as_long_as_the_longest_is_waited_for(
    database: "Database",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    claim: Claimer,
    queries: "Queries",
) -> None:
    lease = running_job_factory()
    store.fail(lease, DiskFullError("no room"))
    set_columns(database, lease.job_id, not_before=queries.now() + 50)
    assert claim.or_none() is None


def test_a_notification_noted_before_the_clock_went_back_is_sent_again(
    database: "Database", store: "JobStore", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    made = job_factory()
    set_columns(database, made.id, rung_at=queries.now() + 7200)
    assert store.due_notifications(again_s=120, limit=5) == [(made.id, "default")]
    assert store.due_notifications(again_s=120, limit=5) == []


def test_a_history_written_before_the_clock_went_back_continues_after_it(
    database: "Database", store: "JobStore", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    from sqlalchemy import insert

    from storage.db.tables import event

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
def test_a_machine_that_slept_longer_than_a_lease_continues_where_it_was(
    ganq: Ganq, small: list[str], first_awake: str
) -> None:
    owner = ganq.start_worker("owner", GANQ_STALL_SECONDS="12")
    job = ganq.json("submit", "train", *small, "--epochs", "100000", "--checkpoint-seconds", "0.5")["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    reaper = ganq.start_worker("reaper")
    until(lambda: len(ganq.present()) == 2, what="the worker that reaps")
    families = {"owner": family(owner), "reaper": family(reaper)}
    for one in [*families["owner"], *families["reaper"]]:
        one.send_signal(signal.SIGSTOP)
    time.sleep(15.0)  # leases are 2 s here, and a runner that reports nothing for 12 s is stalled
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


def test_the_reapers_watch_begins_again_after_a_gap_of_its_own(
    settings: "Settings", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    running_job_factory()
    reaper = Reaper(store, settings)
    reaper.boot = "another machine"
    assert reaper.tick(now=100.0) == []
    assert reaper.tick(now=100.0 + settings.lease_seconds - 0.5 + reaper.max_gap_s) == []
    assert reaper.tick(now=100.0 + settings.lease_seconds + reaper.max_gap_s) == [], "the gap did not count"


@pytest.mark.tier2
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a time namespace needs root")
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_workers_in_different_time_namespaces_do_not_take_each_other_for_dead(
    ganq: Ganq, small: list[str]
) -> None:
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
