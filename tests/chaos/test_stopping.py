"""
Jobs that are to stop, and jobs that do not move: cancels, SIGTERM, time limits, hangs, crash loops.

Rows F8, F10, F11, F36 and F39 of docs/fault-matrix.md, with real workers on real jobs that
are met at a point of the test's choice.
"""

import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from chaos.invariants import assert_invariants, look, table_violations
from machine import LATER, Ganq, part, until
from results import add_model
from tables import beat_of, job_row, without_backoff

from jobs.errors import InvalidTransitionError, LeaseLostError
from jobs.kinds import SPEC_VERSION, kind_named
from jobs.specs import GenerateSpec, Spec, TrainSpec
from storage.db.engine import Database
from storage.db.store import JobStore
from storage.settings import Settings
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from storage.db.rows import Lease

sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


TRAIN_POINTS = [
    "supervisor.claimed",
    "runner.assigned",
    "train.data_open",
    "train.built",
    "train.stepped",
    "folder.begun",
    "folder.written",
    "folder.renamed",
    "supervisor.before_register",
    "supervisor.registered",
]
GENERATE_POINTS = [
    "generate.loaded",
    "generate.drawn",
    "images.written",
    "images.synced",
    "images.images_renamed",
    "images.renamed",
    "images.published",
    "runner.worked",
    "supervisor.before_finish",
    "supervisor.finished",
]
PUBLISHED = set(GENERATE_POINTS[3:-1])
"""All images are drawn: the wish may come too late, and either end is the truth."""


def armed(tmp_path: Path, entries: dict[str, str]) -> dict[str, str]:
    """
    Return the environment of workers in which each failpoint acts once, in whichever process comes first.
    """
    fired = tmp_path / "fired"
    fired.mkdir(exist_ok=True)
    return {
        "GANQ_ENABLE_FAILPOINTS": "1",
        "GANQ_FAILPOINTS": ";".join(f"{name}={action}" for name, action in entries.items()),
        "GANQ_FAILPOINTS_FIRED": str(fired),
    }


def attempts(ganq: Ganq, job: int) -> list[str]:
    return [one["outcome"] for one in ganq.job(job)["attempts"]]


def log_of(ganq: Ganq, job: int, attempt: int) -> str:
    return (Path(ganq.env["GANQ_VOLUME"]) / "jobs" / f"{job:06d}" / f"a{attempt}" / "log.txt").read_text()


# --- F39: cancels -------------------------------------------------------------------------------


def stopped_runner(worker: "subprocess.Popen[bytes]") -> psutil.Process | None:
    """Return the runner of a worker if it has stopped itself at a failpoint."""
    one = part(worker, "worker.runner.main")
    return one if one is not None and one.status() == psutil.STATUS_STOPPED else None


def accept(store: JobStore, spec: Spec) -> int:
    """Submit as `ganq submit` does, but in this process."""
    kind = kind_named(spec.kind)
    return store.submit(
        kind=spec.kind,
        spec=spec.to_json(),
        spec_version=SPEC_VERSION,
        submit_key=secrets.token_hex(16),
        user="tester",
        priority=kind.priority,
    ).id


def cancelled_at(
    ganq: Ganq, database: Database, store: JobStore, folder: Path, points: list[str], long: Spec, short: Spec
) -> None:
    """Cancel one job per failpoint while its worker is stopped there; the worker survives."""
    # A supervisor that is stopped may hold SQLite's write lock in another thread: it sleeps instead,
    # and for less than a lease, or the job would be requeued before it wakes.
    how = {point: "sleep:1@1+" if point.startswith("supervisor.") else "stop@1+" for point in points}
    worker = ganq.start_worker(**armed(folder, how))
    marks = folder / "fired"
    heard_s = 2 * Settings.load(ganq.env).cancel_poll_seconds
    for point in points:
        (marks / point).touch()  # as if it had acted already
    slowest = 0.0
    for point in points:
        (marks / point).unlink()
        job = accept(store, long)
        until(lambda point=point: (marks / point).exists(), what=point)
        stopped = how[point].startswith("stop")
        process = until(lambda: stopped_runner(worker), what=point) if stopped else None
        asked = time.monotonic()
        try:
            wished = store.request_cancel(job)
        except InvalidTransitionError:
            assert point in {*PUBLISHED, "supervisor.finished"}
        else:
            assert wished.state == "running", "a wish is no end"
        if process is not None:
            time.sleep(heard_s)  # a thousand small images are generated before a stop request is read
            with suppress(
                psutil.NoSuchProcess
            ):  # it was stopped for longer than its grace period, and killed
                process.resume()
        until(lambda job=job: job_row(database, job)["finished_at"], what=f"the end of job {job} at {point}")
        slowest = max(slowest, time.monotonic() - asked)
        row = job_row(database, job)
        allowed = {"succeeded"} if point == "supervisor.finished" else {"cancelled"}
        assert row["state"] in (allowed | {"succeeded"} if point in PUBLISHED else allowed), point
        assert (row["result"] is None) == (row["state"] == "cancelled")
        assert row["attempt"] == 1
        assert_invariants(database, Volume(Path(ganq.env["GANQ_VOLUME"])))
    assert worker.poll() is None
    last = accept(store, short)
    until(lambda: job_row(database, last)["state"] == "succeeded", what="a job after all these")
    print(f"F39: cancelled at {len(points)} points; the slowest had ended {slowest:.1f} s after the wish")


@sqlite_only
@pytest.mark.tier2
def test_f39_a_training_is_cancelled_at_every_point(
    ganq: Ganq, database: Database, store: JobStore, faces: Path, tmp_path: Path
) -> None:
    tiny = {"size": 16, "ngf": 4, "ndf": 4, "nz": 8, "batch": 16, "device": "cpu"}
    long, short = (TrainSpec.create(data=str(faces), epochs=n, save_every=1, **tiny) for n in (10_000, 1))
    cancelled_at(ganq, database, store, tmp_path, TRAIN_POINTS, long, short)


@pytest.mark.tier2
@sqlite_only
def test_f39_a_generation_is_cancelled_at_every_point(
    ganq: Ganq, database: Database, store: JobStore, settings: Settings, tmp_path: Path
) -> None:
    source = add_model(settings)
    long, short = (
        GenerateSpec.create(source=source, count=n, micro_batch=4, grid=4, device="cpu") for n in (1000, 4)
    )
    cancelled_at(ganq, database, store, tmp_path, GENERATE_POINTS, long, short)


ENDINGS = {
    "succeed": lambda store, lease, beat: store.succeed(lease, {"image_count": 1}),
    "release": lambda store, lease, beat: store.release(lease, "drain"),
    "crash": lambda store, lease, beat: store.crashed(lease, "killed"),
    "cancel_done": lambda store, lease, beat: store.cancel_done(lease),
    "rescue": lambda store, lease, beat: store.requeue_lost(beat, "silent", within_s=60.0),
}


def raced(
    store: JobStore, running_job_factory: "Callable[..., Lease]", database: Database, ending: str
) -> str:
    """Start a cancel and an end of a job together; return the job's state."""
    lease = running_job_factory()
    beat = beat_of(store, lease.job_id)
    start = threading.Barrier(2)
    refused: list[Exception] = []

    def end() -> None:
        start.wait()
        try:
            ENDINGS[ending](store, lease, beat)
        except LeaseLostError as exc:
            refused.append(exc)

    other = threading.Thread(target=end)
    other.start()
    start.wait()
    with suppress(InvalidTransitionError):
        store.request_cancel(lease.job_id)
    other.join()
    assert not refused, f"{ending} was refused because of a mere wish"
    found = job_row(database, lease.job_id)["state"]
    return str(found)


@pytest.mark.parametrize("ending", ENDINGS)
def test_f39_a_cancel_that_races_with_an_end_leaves_one_of_the_two(
    store: JobStore, running_job_factory: "Callable[..., Lease]", database: Database, ending: Any
) -> None:
    # A job that was requeued before the request was cancelled in the queue.
    expected = {"succeeded"} if ending == "succeed" else {"cancelled"}
    assert {raced(store, running_job_factory, database, ending) for _ in range(40)} == expected
    assert not list(table_violations(look(database)))


# --- F8: SIGTERM, and more of it ----------------------------------------------------------------


@pytest.mark.tier2
@sqlite_only
def test_f08_a_second_sigterm_does_not_wait_for_a_job_that_cannot_stop(
    ganq: Ganq, database: Database, small: list[str], tmp_path: Path
) -> None:
    stuck = armed(tmp_path, {"train.stepped": "sleep:300@8"})
    worker = ganq.start_worker("stuck", **stuck, GANQ_DRAIN_SECONDS="200", GANQ_STALL_SECONDS="0")
    options = [*small, "--epochs", "3", "--save-every", "1", "--checkpoint-seconds", "0.001"]
    job = int(ganq.json("submit", "train", *options)["id"])
    until(lambda: (tmp_path / "fired" / "train.stepped").exists(), what="the step that takes long")
    worker.send_signal(signal.SIGTERM)
    time.sleep(1.5)  # an immediate second one is the same signal, forwarded
    assert worker.poll() is None
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) in (0, -signal.SIGTERM)
    row = job_row(database, job)
    assert (row["state"], row["crash_count"]) == ("queued", 0)
    assert_invariants(database, Volume(Path(ganq.env["GANQ_VOLUME"])))
    ganq.start_worker("heir")
    until(lambda: job_row(database, job)["state"] == "succeeded", what="the end")
    assert attempts(ganq, job) == ["requeued", "succeeded"]
    assert "resuming at step" in log_of(ganq, job, 2)
    assert_invariants(database, Volume(Path(ganq.env["GANQ_VOLUME"])))


@pytest.mark.tier2
@sqlite_only
def test_f08_killed_while_it_drains_loses_nothing(
    ganq: Ganq, database: Database, small: list[str], tmp_path: Path
) -> None:
    stuck = armed(tmp_path, {"train.stepped": "sleep:300@8"})
    worker = ganq.start_worker("stuck", **stuck, GANQ_DRAIN_SECONDS="200", GANQ_STALL_SECONDS="0")
    options = [*small, "--epochs", "3", "--save-every", "1", "--checkpoint-seconds", "0.001"]
    job = int(ganq.json("submit", "train", *options)["id"])
    until(lambda: (tmp_path / "fired" / "train.stepped").exists(), what="the step that takes long")
    family = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    worker.send_signal(signal.SIGTERM)
    until(lambda: "draining" in ganq.log("stuck"), what="the drain")
    for one in family:
        one.kill()
    worker.wait()
    ganq.start_worker("heir")
    until(lambda: job_row(database, job)["state"] == "succeeded", what="the end")
    assert attempts(ganq, job) == ["lost", "succeeded"]
    assert_invariants(database, Volume(Path(ganq.env["GANQ_VOLUME"])))


# --- F10, F11: standing still -------------------------------------------------------------------


@pytest.mark.tier2
@sqlite_only
def test_f10_a_worker_that_pauses_for_less_than_its_lease_continues(
    ganq: Ganq, database: Database, small: list[str]
) -> None:
    ganq.env["GANQ_LEASE_SECONDS"] = "30"
    worker = ganq.start_worker("pauses")
    job = int(ganq.json("submit", "train", *small, "--epochs", "100000")["id"])
    until(lambda: (job_row(database, job)["progress"] or {}).get("done"), what="the first steps")
    ganq.start_worker("reaps")
    until(lambda: len(ganq.present()) == 2, what="the worker that reaps")
    parts = [part(worker, f"worker.{one}") for one in ("supervisor", "runner")]
    for one in parts:
        assert one is not None
        one.suspend()
    time.sleep(3.0)
    for one in reversed(parts):
        assert one is not None
        one.resume()
    beats = job_row(database, job)["hb_seq"]
    until(lambda: job_row(database, job)["hb_seq"] > beats + 2, what="its beats")
    row = job_row(database, job)
    assert (row["state"], row["attempt"]) == ("running", 1)
    ganq("cancel", str(job))
    until(lambda: job_row(database, job)["state"] == "cancelled", what="the cancel")


@sqlite_only
@pytest.mark.parametrize("how", ["hang", pytest.param("sleep", marks=LATER)])
@pytest.mark.tier2
def test_f11_a_run_that_hangs_is_noticed_dumped_killed_and_tried_again(
    ganq: Ganq, database: Database, small: list[str], tmp_path: Path, how: str
) -> None:
    """'hang' holds the interpreter as a kernel launch that never returns does; heartbeats continue."""
    hangs = armed(tmp_path, {"train.stepped": f"{how}:600@8"})
    worker = ganq.start_worker(**hangs, GANQ_STALL_SECONDS="4")
    options = [*small, "--epochs", "3", "--save-every", "1"]
    job = int(ganq.json("submit", "train", *options)["id"])
    until(lambda: (tmp_path / "fired" / "train.stepped").exists(), what="the step that hangs")
    hung = part(worker, "worker.runner.main")
    assert hung is not None
    until(lambda: job_row(database, job)["attempt"] == 2, what="the next attempt")
    assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE, "it still holds the GPU"
    until(lambda: job_row(database, job)["state"] == "succeeded", what="the end")
    assert attempts(ganq, job) == ["crashed", "succeeded"]
    reported = log_of(ganq, job, 1)
    assert "stalled" in reported
    assert 'train.py", line' in reported, "no stacks"
    assert_invariants(database, Volume(Path(ganq.env["GANQ_VOLUME"])))


# --- F36: crash loop -----------------------------------------------------------------------------


@pytest.mark.tier2
@sqlite_only
def test_f36_a_job_that_kills_its_worker_each_time_fails_and_affects_no_other(
    ganq: Ganq, database: Database, settings: Settings, small: list[str]
) -> None:
    add_model(settings)
    ganq.start_worker(GANQ_ENABLE_FAILPOINTS="1", GANQ_FAILPOINTS="train.stepped=kill@2")
    looping = int(ganq.json("submit", "train", *small, "--epochs", "3", "--no-preempt")["id"])
    child = int(ganq.json("submit", "generate", "--from", str(looping), "--count", "4")["id"])
    other = int(ganq.json("submit", "generate", "--from", "m", "--count", "4")["id"])
    with without_backoff(database, crashes_count=True):
        until(lambda: job_row(database, looping)["finished_at"], what="the end of the looping")
    row = job_row(database, looping)
    assert (row["state"], row["error_code"], row["attempt"]) == ("failed", "CRASH_LOOP", 3)
    assert attempts(ganq, looping) == ["crashed"] * 3
    assert job_row(database, child)["error_code"] == "DEPENDENCY_FAILED"
    until(lambda: job_row(database, other)["state"] == "succeeded", what="the other job")
    assert job_row(database, other)["attempt"] == 1
    assert_invariants(database, Volume(Path(ganq.env["GANQ_VOLUME"])))


# --- time limits --------------------------------------------------------------------------------


@pytest.mark.tier2
@sqlite_only
def test_a_time_limit_holds_over_all_attempts_and_leaves_a_checkpoint_to_continue_from(
    ganq: Ganq, database: Database, small: list[str]
) -> None:
    ganq.start_worker()
    ganq("submit", "train", *small, "--epochs", "1", "--wait")  # so that its runner is warm
    options = [*small, "--epochs", "100000", "--checkpoint-seconds", "0.2"]
    job = int(ganq.json("submit", "train", *options, "--time-limit", "15s")["id"])
    until(lambda: ganq.steps(job), what="a checkpoint")
    ganq_worker = ganq.workers[-1]
    runner = part(ganq_worker, "worker.runner.main")
    assert runner is not None
    runner.kill()
    with without_backoff(database):
        until(lambda: job_row(database, job)["finished_at"], what="the end of its time")
    row = job_row(database, job)
    assert (row["state"], row["error_code"]) == ("failed", "TIME_LIMIT")
    assert attempts(ganq, job) == ["crashed", "failed"]
    assert row["ran_s"] >= 15.0
    assert f"--continue {job}" in row["error_hint"]
    assert_invariants(database, Volume(Path(ganq.env["GANQ_VOLUME"])))
    epochs = ganq.json("checkpoints", str(job))[-1]["epoch"] + 1
    again = int(ganq.json("submit", "train", "--continue", str(job), "--epochs", str(epochs))["id"])
    until(lambda: job_row(database, again)["state"] == "succeeded", what="what goes on from it")
