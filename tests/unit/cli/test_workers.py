"""`ganq workers`: which job a row shows, and how a row goes."""

from collections.abc import Callable

from unit.conftest import Ganq

from storage.db.engine import Database
from storage.db.rows import Lease, WorkerIdentity
from storage.db.store import JobStore
from storage.db.tables import worker
from storage.db.workers import WorkerStore


def died(database: Database, name: str) -> None:
    """Let a worker's last report be two minutes old."""
    seen = worker.update().where(worker.c.name == name).values(seen_at=worker.c.seen_at - 120)
    database.write(lambda conn: conn.execute(seen))


def test_a_dead_worker_shows_no_job_that_ended_elsewhere(
    ganq: Ganq,
    database: Database,
    store: JobStore,
    make_identity: Callable[..., WorkerIdentity],
    running_job_factory: Callable[..., Lease],
) -> None:
    lease = running_job_factory(make_identity("w1"))
    WorkerStore(database, make_identity("w1")).report("busy", lease.job_id)
    (row,) = ganq("workers", "--json").json()
    assert row["job_id"] == lease.job_id
    died(database, "w1")
    store.succeed(lease, {})
    (row,) = ganq("workers", "--json").json()
    assert (row["status"], row["job_id"]) == ("unresponsive", None)


def test_a_worker_that_has_ended_is_forgotten_and_a_live_one_is_not(
    ganq: Ganq, database: Database, make_identity: Callable[..., WorkerIdentity]
) -> None:
    for name in ("alive", "dead"):
        WorkerStore(database, make_identity(name)).report("idle")
    died(database, "dead")
    assert ganq("workers", "--forget", "dead").out == "worker dead: forgotten\n"
    refused = ganq("workers", "--forget", "alive")
    assert refused.code == 1
    assert "worker alive is alive" in refused.err
    gone = ganq("workers", "--forget", "dead")
    assert gone.code == 3
    assert "there is no worker dead" in gone.err
    assert [row["name"] for row in ganq("workers", "--json").json()] == ["alive"]
