"""The heartbeat thread: how often it asks the job table."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from machine import until
from tables import job_row

from storage.db.workers import WorkerStore
from worker.supervisor.heartbeat import Heartbeat

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.rows import Lease, WorkerIdentity
    from storage.db.store import JobStore
    from storage.settings import Settings


@pytest.mark.parametrize(("live", "least", "most"), [(1, 10, 100), (200, 10, 100), (1_000_000, 1, 6)])
def test_many_workers_send_progress_less_often_but_at_least_as_often_as_heartbeats(
    live: int,
    least: int,
    most: int,
    database: "Database",
    store: "JobStore",
    settings: "Settings",
    running_job_factory: "Callable[..., Lease]",
    worker_identity: "WorkerIdentity",
) -> None:
    often = replace(settings, progress_seconds=0.02, cancel_poll_seconds=0.02, heartbeat_seconds=0.5)
    lease = running_job_factory()
    heartbeat = Heartbeat(
        store, WorkerStore(database, worker_identity), often,
        lambda *_: None, lambda _: None, lambda _: None, live_workers=lambda: live,
    )  # fmt: skip
    heartbeat.begin(lease)
    heartbeat.start()
    ends_at = time.monotonic() + 2.0
    while time.monotonic() < ends_at:
        heartbeat.set_progress({"done": 1})
        time.sleep(0.01)
    heartbeat.stop()
    heartbeat.join(5)
    assert least <= job_row(database, lease.job_id)["hb_seq"] <= most


def test_a_worker_among_many_reads_a_stop_request_within_a_heartbeat(
    database: "Database",
    store: "JobStore",
    settings: "Settings",
    running_job_factory: "Callable[..., Lease]",
    worker_identity: "WorkerIdentity",
) -> None:
    lease = running_job_factory()
    seen: list[str] = []
    heartbeat = Heartbeat(
        store, WorkerStore(database, worker_identity), replace(settings, heartbeat_seconds=0.5),
        lambda event, _: seen.append(event), lambda _: None, lambda _: None, live_workers=lambda: 1_000_000,
    )  # fmt: skip
    heartbeat.begin(lease)
    heartbeat.start()
    store.request_cancel(lease.job_id)
    until(lambda: seen == ["cancel"], within_s=5, what="the request is read")
    heartbeat.stop()
    heartbeat.join(5)


def test_a_heartbeat_among_many_workers_is_not_late_because_of_the_pace(
    database: "Database",
    store: "JobStore",
    settings: "Settings",
    running_job_factory: "Callable[..., Lease]",
    worker_identity: "WorkerIdentity",
) -> None:
    slow = replace(settings, cancel_poll_seconds=1.0, heartbeat_seconds=10.0)
    heartbeat = Heartbeat(
        store, WorkerStore(database, worker_identity), slow,
        lambda *_: None, lambda _: None, lambda _: None, live_workers=lambda: 1400,
    )  # fmt: skip
    assert heartbeat.pause_s() == 7.0
    heartbeat.begin(running_job_factory())
    heartbeat._sent_at -= 7.0
    assert heartbeat.pause_s() <= 3.0, "10 s after the last one"
    heartbeat._sent_at -= 60.0
    assert heartbeat.pause_s() == 1.0, "a database that is away is not asked without a pause"
