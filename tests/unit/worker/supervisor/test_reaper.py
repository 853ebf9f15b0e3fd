"""The reaper requeues jobs of dead or unresponsive workers, by its own clock, and no others."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import update
from tables import Claimer, set_columns

from jobs.errors import DatabaseUnavailableError
from jobs.states import JobState
from storage.db.store.reap import BUCKETS, WatchShare
from storage.db.tables import attempt, worker
from storage.db.workers import WorkerStore
from worker.host.process import boot_id, start_ticks
from worker.supervisor.reaper import MAX_FULL_WATCHERS, WATCHERS, Reaper, Recovery, watch_share

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease, WorkerIdentity
    from storage.db.store import JobStore
    from storage.settings import Settings

HERE: dict[str, Any] = {"host": socket.gethostname(), "boot_id": boot_id()}


@pytest.fixture
def reaper(store: "JobStore", settings: "Settings") -> Reaper:
    return Reaper(store, settings)


def test_a_job_without_heartbeats_is_requeued_after_the_lease_and_not_before(
    reaper: Reaper,
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    settings: "Settings",
) -> None:
    lease = running_job_factory()
    # It reads more often than its longest permitted gap (three reap intervals).
    looks = [100.0 + step * settings.reap_seconds for step in range(1000)]
    silent = [now for now in looks if now - 100.0 < settings.lease_seconds]
    assert all(reaper.tick(now=now) == [] for now in silent)
    assert reaper.tick(now=looks[len(silent)]) == [lease.job_id]
    assert queries.get(lease.job_id).state is JobState.QUEUED
    assert queries.attempts(lease.job_id)[0]["outcome"] == "lost"


def test_a_job_with_heartbeats_is_never_requeued(
    reaper: Reaper,
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    settings: "Settings",
) -> None:
    lease = running_job_factory()
    for step in range(40):
        store.heartbeat(lease, None)
        assert reaper.tick(now=step * settings.reap_seconds) == []
    assert 40 * settings.reap_seconds > 2 * settings.lease_seconds
    assert queries.get(lease.job_id).state is JobState.RUNNING


def test_a_reaper_that_was_paused_restarts_its_observation(
    reaper: Reaper, queries: "Queries", running_job_factory: "Callable[..., Lease]", settings: "Settings"
) -> None:
    lease = running_job_factory()
    reaper.tick(now=0.0)
    assert reaper.tick(now=1000 * settings.lease_seconds) == []
    assert queries.get(lease.job_id).state is JobState.RUNNING


def test_a_table_that_refuses_writes_gives_its_workers_a_whole_lease_afterwards(
    reaper: Reaper,
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    settings: "Settings",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reads succeed (a file or a server became read-only), but no heartbeat can be written."""
    lease = running_job_factory()
    looks = [100.0 + step * settings.reap_seconds for step in range(1000)]
    silent = [now for now in looks if now - 100.0 < settings.lease_seconds]
    for now in silent:
        reaper.tick(now=now)

    def refuse(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailableError("the table cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(store, "requeue_lost", refuse)
        with pytest.raises(DatabaseUnavailableError):
            reaper.tick(now=looks[len(silent)])
    assert reaper.tick(now=looks[len(silent) + 1]) == []
    assert queries.get(lease.job_id).state is JobState.RUNNING


def test_ten_reapers_requeue_a_job_once(
    store: "JobStore", queries: "Queries", running_job_factory: "Callable[..., Lease]", settings: "Settings"
) -> None:
    lease = running_job_factory()
    reapers = [Reaper(store, settings) for _ in range(10)]
    for step in range(15):
        for one in reapers:
            one.tick(now=step * settings.reap_seconds)
    events = [one.type for one in queries.events(lease.job_id)]
    assert events.count("lost") == 1
    assert queries.get(lease.job_id).attempt == 1


def _short_lived_process() -> tuple[int, int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ticks = start_ticks(process.pid)
        assert ticks > 0
    return process.pid, ticks


def test_a_dead_owner_on_this_machine_is_noticed_at_once(
    reaper: Reaper,
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    pid, ticks = _short_lived_process()
    lease = running_job_factory(make_identity("dead", **HERE, pid=pid, start_ticks=ticks))
    assert reaper.tick() == [lease.job_id]
    assert queries.get(lease.job_id).state is JobState.QUEUED


def test_a_living_owner_is_left_alone(
    reaper: Reaper,
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    me = os.getpid()
    running_job_factory(make_identity("alive", **HERE, pid=me, start_ticks=start_ticks(me)))
    assert reaper.tick() == []


def test_a_reused_process_id_does_not_pass_for_the_owner(
    reaper: Reaper,
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    me = os.getpid()
    lease = running_job_factory(make_identity("old", **HERE, pid=me, start_ticks=1))
    assert reaper.tick() == [lease.job_id]


def test_a_process_of_another_machine_is_not_looked_up_here(
    reaper: Reaper,
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    pid, ticks = _short_lived_process()
    running_job_factory(
        make_identity("far", host=HERE["host"], boot_id="another-machine", pid=pid, start_ticks=ticks)
    )
    assert reaper.tick() == []


def test_a_job_with_a_cancel_request_is_cancelled_when_its_worker_dies(
    reaper: Reaper,
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    pid, ticks = _short_lived_process()
    lease = running_job_factory(make_identity("dead", **HERE, pid=pid, start_ticks=ticks))
    store.request_cancel(lease.job_id)
    reaper.tick()
    assert queries.get(lease.job_id).state is JobState.CANCELLED


def test_machines_started_from_one_snapshot_do_not_look_up_each_others_processes(
    reaper: Reaper,
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    """They share their boot and their namespaces; their host names differ."""
    pid, ticks = _short_lived_process()
    running_job_factory(make_identity("far", host="clone", boot_id=boot_id(), pid=pid, start_ticks=ticks))
    assert reaper.tick() == []


def test_a_worker_that_could_not_read_its_own_start_is_judged_by_its_process_id_alone(
    reaper: Reaper,
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    running_job_factory(make_identity("alive", **HERE, start_ticks=0))
    pid, _ = _short_lived_process()
    assert reaper.tick() == []
    dead = running_job_factory(make_identity("dead", **HERE, pid=pid, start_ticks=0))
    assert reaper.tick() == [dead.job_id]


def test_a_process_that_has_ended_and_was_not_reaped_is_dead(
    reaper: Reaper,
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        lease = running_job_factory(
            make_identity("dead", **HERE, pid=process.pid, start_ticks=start_ticks(process.pid))
        )
        assert reaper.tick() == []
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert reaper.tick() == [lease.job_id]


def test_a_job_that_is_lost_again_and_again_waits_and_says_so(
    reaper: Reaper,
    store: "JobStore",
    database: "Database",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
    caplog: pytest.LogCaptureFixture,
) -> None:
    pid, ticks = _short_lived_process()
    dead = make_identity("dead", **HERE, pid=pid, start_ticks=ticks)
    job = running_job_factory(dead).job_id
    for _ in range(2):
        assert reaper.tick() == [job]
        assert claim(dead).job_id == job, "twice it is offered at once"

    for pause_s in (2.0, 10.0, 30.0, 60.0, 60.0):
        assert reaper.tick() == [job]
        assert claim.or_none(dead) is None
        row = queries.get(job)
        assert row.state is JobState.QUEUED
        assert row.error_code == "WORKER_LOST"
        assert "(process" in (row.error_message or "")
        assert "times within 5 minutes" in (row.error_message or "")
        reported = queries.events(job)[-1]
        assert reported.detail is not None
        assert (reported.type, reported.detail["pause_s"]) == ("lost", pause_s)
        assert 0 < (store.due_in() or 0) <= pause_s
        assert f"it waits {pause_s:.0f} s" in caplog.text
        caplog.clear()
        set_columns(database, job, not_before=None)
        assert claim(dead).job_id == job


def test_a_job_that_is_lost_now_and_then_is_offered_at_once(
    reaper: Reaper,
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    pid, ticks = _short_lived_process()
    dead = make_identity("dead", **HERE, pid=pid, start_ticks=ticks)
    job = running_job_factory(dead).job_id
    for _ in range(4):
        assert reaper.tick() == [job]
        database.write(lambda conn: conn.execute(update(attempt).values(ended_at=attempt.c.ended_at - 400)))
        assert claim(dead).job_id == job


def test_the_dispatcher_notifies_as_often_as_there_are_idle_workers_and_busy_ones_never(
    database: "Database",
    settings: "Settings",
    job_factory: "Callable[..., Job]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    queued = {job_factory().id for _ in range(9)}
    job_factory(queue="other")
    sent: list[tuple[str, int]] = []
    recovery = Recovery(
        database,
        settings,
        WorkerStore(database, make_identity("me")),
        lambda queue, job: sent.append((queue, job)),
        lambda: None,
        lambda exc: None,
    )

    def report(name: str, state: str) -> None:
        WorkerStore(database, make_identity(name)).report(state)

    report("busy", "busy")
    report("gone", "stopped")
    recovery.dispatch()
    assert sent == []

    report("w1", "idle")
    report("w2", "idle")
    recovery.dispatch()
    assert len(sent) == 2
    assert {queue for queue, _ in sent} == {"default"}
    assert {job for _, job in sent} < queued

    database.write(lambda conn: conn.execute(update(worker).values(seen_at=0.0)))
    recovery.dispatch()
    assert len(sent) == 2, "neither has reported within a lease"


LIVE = [(f"node{number // 4}-gpu{number % 4}", f"node{number // 4}") for number in range(100)]


def test_each_running_job_is_watched_by_three_supervisors_and_by_those_of_its_machine() -> None:
    shares = {name: watch_share(name, LIVE) for name, _ in LIVE}
    for bucket in range(BUCKETS):
        assert sum(bucket in share.buckets for share in shares.values() if share) == WATCHERS
    assert all(share is not None and len(share.workers) == 4 for share in shares.values())
    few = LIVE[:MAX_FULL_WATCHERS]
    assert {watch_share(name, few) for name, _ in few} == {None}, "so few watch all"
    assert watch_share("unknown", LIVE) is None


def test_a_worker_that_leaves_takes_no_watch_from_the_others() -> None:
    """What a supervisor has observed of a job would be lost, and the job found late."""
    others = LIVE[1:]
    for name, _ in others:
        before, after = watch_share(name, LIVE), watch_share(name, others)
        assert before is not None
        assert after is not None
        assert set(before.buckets) <= set(after.buckets)


def test_each_machine_watches_a_bucket_once_and_three_supervisors_lead() -> None:
    shares = {name: watch_share(name, LIVE) for name, _ in LIVE}
    for bucket in range(BUCKETS):
        watchers = [name for name, share in shares.items() if share and bucket in share.buckets]
        assert len({name.partition("-")[0] for name in watchers}) == WATCHERS
    assert sum(share.leads for share in shares.values() if share) == WATCHERS


def test_with_fewer_machines_than_watchers_each_job_has_as_many_watchers() -> None:
    two_hosts = [(f"w{number}", f"node{number % 2}") for number in range(40)]
    shares = [watch_share(name, two_hosts) for name, _ in two_hosts]
    for bucket in range(BUCKETS):
        assert sum(bucket in share.buckets for share in shares if share) == WATCHERS


def test_many_supervisors_look_less_often_and_still_within_a_lease(
    store: "JobStore", settings: "Settings"
) -> None:
    reaper = Reaper(store, replace(settings, lease_seconds=60.0, heartbeat_seconds=10.0))
    paces = {}
    for reaper.live in (1, 200, 400, 5000):
        paces[reaper.live] = reaper.pause_s(2.0)
    assert paces == {1: 2.0, 200: 2.0, 400: 4.0, 5000: 5.0}


def test_a_started_supervisor_looks_at_all_running_jobs_once(
    store: "JobStore",
    database: "Database",
    settings: "Settings",
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    """It may be the one that died a moment ago, and be of no bucket that others would miss."""
    for number in range(MAX_FULL_WATCHERS + 1):
        WorkerStore(database, make_identity(f"w{number}", host=f"node{number}")).report("idle")
    pid, ticks = _short_lived_process()
    lost = running_job_factory(make_identity("w0", **HERE, pid=pid, start_ticks=ticks))
    reaper = Reaper(store, replace(settings, lease_seconds=60.0), "w0")
    reaper.tick()
    assert reaper.share is not None
    assert lost.job_id not in {row.job_id for row in store.running()}


def test_workers_of_another_version_are_given_no_share(
    store: "JobStore", database: "Database", make_identity: "Callable[..., WorkerIdentity]"
) -> None:
    """They may not know of shares: what only they watched, nobody would."""
    for name, version in (("old", "0.2.0"), ("new", "0.3.0"), ("mine", "0.3.0")):
        WorkerStore(database, make_identity(name, version=version)).report("idle")
    live = store.live_workers("mine", within_s=60)
    assert sorted(name for name, _ in live) == ["mine", "new"]
    assert store.live_workers("unknown", within_s=60) == []


def test_a_share_of_the_running_jobs_is_read_by_bucket_and_by_machine(
    store: "JobStore",
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    ids = [running_job_factory(make_identity(f"w{number}")).job_id for number in range(5)]
    WorkerStore(database, make_identity("w3")).report("busy", ids[3])
    share = WatchShare((ids[1] % BUCKETS,), ("w3",))
    assert {row.job_id for row in store.running(share)} == {ids[1], ids[3]}
    assert {row.job_id for row in store.running()} == set(ids)
    assert store.running(WatchShare((), ())) == []
