"""The heartbeat thread: how often it asks the job table."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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

Among = Callable[..., Heartbeat]


@pytest.fixture
def among(
    database: "Database", store: "JobStore", settings: "Settings", worker_identity: "WorkerIdentity"
) -> Among:
    """Return the heartbeat thread, not yet started, of a worker among so many live ones."""

    def build(
        live: int, *, on_request: Callable[[str], None] = lambda _: None, **intervals: Any
    ) -> Heartbeat:
        return Heartbeat(
            store,
            WorkerStore(database, worker_identity),
            replace(settings, **intervals),
            lambda request, _: on_request(request),
            lambda _: None,
            lambda _: None,
            live_workers=lambda: live,
        )

    return build


@pytest.mark.parametrize(("live", "least", "most"), [(1, 10, 100), (200, 10, 100), (1_000_000, 1, 6)])
def test_many_workers_send_progress_less_often_but_at_least_as_often_as_heartbeats(
    live: int,
    least: int,
    most: int,
    database: "Database",
    among: Among,
    running_job_factory: "Callable[..., Lease]",
) -> None:
    lease = running_job_factory()
    heartbeat = among(live, progress_seconds=0.02, cancel_poll_seconds=0.02, heartbeat_seconds=0.5)
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
    store: "JobStore", among: Among, running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    seen: list[str] = []
    heartbeat = among(1_000_000, on_request=seen.append, heartbeat_seconds=0.5)
    heartbeat.begin(lease)
    heartbeat.start()
    store.request_cancel(lease.job_id)
    until(lambda: seen == ["cancel"], within_s=5, what="the request is read")
    heartbeat.stop()
    heartbeat.join(5)


def test_a_heartbeat_among_many_workers_is_not_late_because_of_the_pace(
    among: Among, running_job_factory: "Callable[..., Lease]"
) -> None:
    heartbeat = among(1400, cancel_poll_seconds=1.0, heartbeat_seconds=10.0)
    assert heartbeat.pause_s() == 7.0
    heartbeat.begin(running_job_factory())
    heartbeat._sent_at -= 7.0
    assert heartbeat.pause_s() <= 3.0, "10 s after the last one"
    heartbeat._sent_at -= 60.0
    assert heartbeat.pause_s() == 1.0, "a database that is away is not asked without a pause"
