"""`ganq usage` sums the time of attempts, on both databases."""

from collections.abc import Callable

import pytest
from machine import Ganq
from sqlalchemy import update
from tables import Claimer

from storage.db.engine import Database
from storage.db.rows import Job, Lease, WorkerIdentity
from storage.db.store import JobStore
from storage.db.tables import attempt, utcnow

HOUR, DAY = 3600.0, 86400.0


@pytest.fixture
def ran(
    database: Database, job_factory: Callable[..., Job], claim: Claimer, store: JobStore
) -> Callable[..., int]:
    """Runs a job to its end, and moves the attempt into the past."""

    def run(who: WorkerIdentity, hours: float, ago_days: float = 1.0, **about: object) -> int:
        job_id = job_factory(**about).id
        lease = claim(who)
        assert lease is not None
        assert lease.job_id == job_id
        store.succeed(lease, {})
        start = utcnow() - ago_days * DAY
        moved = update(attempt).where(attempt.c.job_id == job_id)
        database.write(
            lambda conn: conn.execute(moved.values(started_at=start, ended_at=start + hours * HOUR))
        )
        return job_id

    return run


def test_hours_are_summed_by_user_and_gpu_hours_beside_them(
    ganq: Ganq, ran: Callable[..., int], make_identity: Callable[..., WorkerIdentity]
) -> None:
    cpu, gpu = make_identity("w1", device="cpu 0,1"), make_identity("w2", device="gpu0 NVIDIA H200")
    ran(cpu, 2.0, user="ada")
    ran(gpu, 3.0, user="ada", kind="generate")
    ran(gpu, 10.0, user="bob")
    found = ganq.json("usage")
    assert [(row["user"], row["jobs"], row["attempts"]) for row in found] == [("bob", 1, 1), ("ada", 2, 2)]
    assert [row["worker_hours"] for row in found] == pytest.approx([10.0, 5.0], abs=0.01)
    assert [row["gpu_hours"] for row in found] == pytest.approx([10.0, 3.0], abs=0.01)
    table = ganq("usage").splitlines()
    assert table[0].split() == ["USER", "JOBS", "ATTEMPTS", "WORKER-HOURS", "GPU-HOURS"]
    assert table[2].split() == ["ada", "2", "2", "5.00", "3.00"]
    assert {row["kind"]: row["jobs"] for row in ganq.json("usage", "--by", "kind")} == {
        "train": 2,
        "generate": 1,
    }


def test_only_the_part_within_the_time_counts(
    ganq: Ganq, ran: Callable[..., int], worker_identity: WorkerIdentity
) -> None:
    ran(worker_identity, 1.0, ago_days=40)
    ran(worker_identity, 4 * 24.0, ago_days=32)  # two of its four days are within thirty
    (row,) = ganq.json("usage", "--by", "queue")
    assert (row["queue"], row["jobs"]) == ("default", 1)
    assert row["worker_hours"] == pytest.approx(48.0, abs=0.1)
    assert ganq.json("usage", "--since", "1d") == []
    assert "no attempt ran in the last" in ganq("usage", "--since", "1d")


def test_each_attempt_counts_and_a_running_one_until_now(
    ganq: Ganq,
    database: Database,
    running_job_factory: Callable[..., Lease],
    store: JobStore,
    claim: Claimer,
) -> None:
    lease = running_job_factory()
    store.release(lease, "drain")
    claim()
    begun = update(attempt).values(started_at=utcnow() - HOUR)
    database.write(lambda conn: conn.execute(begun))
    (row,) = ganq.json("usage")
    assert (row["jobs"], row["attempts"]) == (1, 2)
    assert row["worker_hours"] == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_time_that_is_none_is_refused(ganq: Ganq) -> None:
    done = ganq.run("usage", "--since", "yesterday")
    assert done.returncode == 2
    assert "--since" in done.stderr
