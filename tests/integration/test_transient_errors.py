"""From one job to the next: the end of one and the claim of another in one transaction."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from machine import until
from sqlalchemy import Connection, bindparam, event, insert, select, text
from tables import (
    Claimer,
    beat_of,
    event_types,
    first_answer_lost,
    job_row,
    open_attempts,
    set_columns,
)

from jobs.errors import LeaseLostError
from jobs.kinds import SPEC_VERSION
from jobs.states import JobState, Outcome
from storage.db.queries import Filter
from storage.db.store import Claim, claim
from storage.db.store.waiting import Extras
from storage.db.tables import event as event_table
from storage.db.tables import quota

if TYPE_CHECKING:
    from machine import Ganq

    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease, WorkerIdentity
    from storage.db.store import JobStore


@pytest.fixture
def end(store: "JobStore", worker_identity: "WorkerIdentity") -> Any:
    """Ends a job with success, as a worker does that goes on to the next."""

    def act(lease: Any, result: Any = None, next_one: Any = None, **how: Any) -> Any:
        next_one = next_one or Claim(worker_identity, ("train", "generate"), SPEC_VERSION)
        return store.succeed_and_claim(lease, result or {}, next_one, **how)

    return act


def test_the_job_has_ended_and_the_next_is_taken(
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
    end: Any,
) -> None:
    lease, waiting = running_job_factory(), job_factory()

    taken = end(lease, {"image_count": 4, "bit_exact": True})

    ended, begun = queries.get(lease.job_id), queries.get(waiting.id)
    assert (ended.state, ended.result, ended.bit_exact) == (
        JobState.SUCCEEDED,
        {"image_count": 4, "bit_exact": True},
        True,
    )
    assert (taken.job_id, taken.attempt, taken.token != lease.token) == (waiting.id, 1, True)
    assert (begun.state, begun.worker) == (JobState.RUNNING, taken.job.worker)
    assert event_types(database, lease.job_id) == ["submitted", "claimed", "succeeded"]
    assert event_types(database, waiting.id) == ["submitted", "claimed"]
    assert (open_attempts(database, lease.job_id), open_attempts(database, waiting.id)) == (0, 1)


def test_the_end_leaves_what_an_end_leaves(
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    end: Any,
) -> None:
    """The running time, no preemption, no error of an earlier attempt, and a history in its order."""
    lease, waiting = running_job_factory(), job_factory()
    set_columns(database, lease.job_id, preempt_for=waiting.id, yielded_at=1.0, ran_s=100.0, error_code="X")
    set_columns(database, waiting.id, error_code="CRASHED", started_at=5.0, hb_seq=7)
    later = time.time() + 3600
    ahead = [{"job_id": one, "at": later, "type": "held"} for one in (lease.job_id, waiting.id)]
    database.write(lambda conn: conn.execute(insert(event_table), ahead))

    end(lease)

    ended, begun = job_row(database, lease.job_id), job_row(database, waiting.id)
    assert 100.0 < ended["ran_s"] < 160.0
    assert [ended[name] for name in ("preempt_for", "yielded_at", "error_code")] == [None] * 3
    assert (begun["error_code"], begun["started_at"], begun["hb_seq"]) == (None, 5.0, 8)
    times = select(event_table.c.at).where(event_table.c.job_id == bindparam("of")).order_by(event_table.c.id)

    def history(conn: Connection, of: int) -> list[float]:
        return list(conn.execute(times, {"of": of}).scalars())

    for one in (lease.job_id, waiting.id):
        found = database.read(partial(history, of=one))
        assert found == sorted(found), "the clock was set back, and the history goes on"


def test_it_takes_one_commit(
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    end: Any,
) -> None:
    lease = running_job_factory()
    job_factory()
    commits: list[Any] = []

    def count(conn: Any) -> None:
        commits.append(conn)

    event.listen(database.engine, "commit", count)
    try:
        assert end(lease) is not None
    finally:
        event.remove(database.engine, "commit", count)
    assert len(commits) == 1


def test_a_job_that_waited_for_the_one_that_ended_can_be_the_next(
    running_job_factory: "Callable[..., Lease]", job_factory: "Callable[..., Job]", end: Any
) -> None:
    lease = running_job_factory()
    child = job_factory(after=[lease.job_id])
    assert end(lease).job_id == child.id


def test_a_job_that_waited_for_any_end_can_be_the_next(
    running_job_factory: "Callable[..., Lease]", job_factory: "Callable[..., Job]", end: Any
) -> None:
    lease = running_job_factory()
    child = job_factory(extras=Extras(after_any=(lease.job_id,)))
    assert end(lease).job_id == child.id


def test_a_sweep_of_which_one_may_run_has_its_next_job_when_one_ends(
    store: "JobStore", claim: Claimer, end: Any
) -> None:
    store.submit_sweep(
        [{"data": "/pictures"}] * 3,
        names=[None] * 3,
        submit_key="key",
        kind="train",
        spec_version=SPEC_VERSION,
        user="tester",
        extras=Extras(max_running=1),
    )
    lease = claim()
    assert claim.or_none() is None
    second = end(lease)
    assert second.job_id == lease.job_id + 1
    assert end(second).job_id == lease.job_id + 2


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_a_job_that_another_transaction_has_locked_is_not_waited_for(
    database: "Database", job_factory: "Callable[..., Job]", running_job_factory: Any, end: Any
) -> None:
    lease, locked, free = running_job_factory(), job_factory(priority=5), job_factory()
    with database.engine.begin() as other:
        other.execute(text("SELECT id FROM job WHERE id = :id FOR UPDATE"), {"id": locked.id})
        assert end(lease).job_id == free.id


def test_where_nothing_waits_the_job_ends_all_the_same(
    running_job_factory: "Callable[..., Lease]", queries: "Queries", end: Any
) -> None:
    lease = running_job_factory()
    assert end(lease) is None
    assert queries.get(lease.job_id).state is JobState.SUCCEEDED


def test_when_the_commits_answer_is_lost_neither_is_done_twice(
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
    end: Any,
) -> None:
    lease, waiting = running_job_factory(), job_factory()
    job_factory()

    with first_answer_lost(database):
        taken = end(lease)

    assert taken.job_id == waiting.id
    assert event_types(database, lease.job_id).count("succeeded") == 1
    assert len(queries.attempts(waiting.id)) == 1


def test_a_job_that_was_taken_before_the_database_went_away_is_not_left_without_a_worker(
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
    end: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer is lost, and trying both is given up: the end that is tried alone knows what was taken."""
    monkeypatch.setattr(claim, "FUSED_PATIENCE_S", 0.0)
    lease, waiting, third = running_job_factory(), job_factory(), job_factory()
    with first_answer_lost(database):
        taken = end(lease)
    assert (taken.job_id, queries.get(third.id).attempt) == (waiting.id, 0)


def test_an_end_that_is_tried_again_finds_what_its_first_try_has_taken(
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    worker_identity: "WorkerIdentity",
    queries: "Queries",
    end: Any,
) -> None:
    lease, waiting, third = running_job_factory(), job_factory(), job_factory()
    one = Claim(worker_identity, ("train",), SPEC_VERSION)
    assert end(lease, next_one=one).job_id == waiting.id
    # What the supervisor does after an error that hid this; it may have been told to go meanwhile.
    for claim_next in (True, False):
        assert end(lease, next_one=one, claim_next=claim_next).job_id == waiting.id
    assert queries.get(third.id).attempt == 0


def test_who_does_not_continue_takes_nothing(
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
    end: Any,
) -> None:
    lease, waiting = running_job_factory(), job_factory()
    assert end(lease, claim_next=False) is None
    assert queries.get(lease.job_id).state is JobState.SUCCEEDED
    assert queries.get(waiting.id).state is JobState.QUEUED


def test_a_lost_lease_ends_nothing_and_takes_nothing(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
    end: Any,
) -> None:
    lease, waiting = running_job_factory(), job_factory()
    store.requeue_lost(beat_of(store, lease.job_id), "silent")

    with pytest.raises(LeaseLostError):
        end(lease, {"image_count": 4})

    assert queries.get(lease.job_id).result is None
    assert queries.get(waiting.id).state is JobState.QUEUED


def test_a_lease_of_the_same_attempt_with_another_token_ends_nothing(
    running_job_factory: "Callable[..., Lease]", queries: "Queries", end: Any
) -> None:
    """As after a restore of the job table: the numbers of attempts begin again."""
    lease = running_job_factory()
    with pytest.raises(LeaseLostError):
        end(replace(lease, token="0" * 32))
    assert queries.get(lease.job_id).state is JobState.RUNNING


def test_where_there_are_limits_the_claim_is_left_to_its_own_transaction(
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    queries: "Queries",
    end: Any,
) -> None:
    row = {"scope": "user", "name": "tester", "max_running": 1}
    lease, waiting = running_job_factory(), job_factory()
    database.write(lambda conn: conn.execute(insert(quota).values(row)))

    assert end(lease) is None

    assert queries.get(lease.job_id).state is JobState.SUCCEEDED
    assert claim().job_id == waiting.id


def test_a_claim_that_breaks_does_not_keep_the_job_from_ending(
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
    end: Any,
) -> None:
    lease, waiting = running_job_factory(), job_factory()
    database.write(lambda conn: conn.execute(text("ALTER TABLE share RENAME TO elsewhere")))

    assert end(lease, {"image_count": 4}) is None

    assert queries.get(lease.job_id).result == {"image_count": 4}
    assert queries.get(waiting.id).state is JobState.QUEUED


def test_another_schema_is_left_to_the_claim_to_judge(
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
    end: Any,
) -> None:
    lease, waiting = running_job_factory(), job_factory()
    database.write(lambda conn: conn.execute(text("UPDATE alembic_version SET version_num = '9999'")))

    assert end(lease) is None

    assert queries.get(lease.job_id).state is JobState.SUCCEEDED
    assert queries.get(waiting.id).state is JobState.QUEUED


def test_workers_that_pass_on_at_once_do_each_job_once(
    database: "Database",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
    queries: "Queries",
) -> None:
    """Eight threads on one table, with jobs that wait for others among them."""
    jobs = [job_factory() for _ in range(40)]
    jobs += [job_factory(after=[one.id, two.id]) for one, two in zip(jobs[:20], jobs[20:], strict=True)]

    def work(number: int) -> list[int]:
        who, did = make_identity(f"w{number}"), []
        lease = claim.or_none(who)
        while lease is not None:
            did.append(lease.job_id)
            next_one = Claim(who, ("train",), SPEC_VERSION)
            lease = store.succeed_and_claim(lease, {}, next_one) or claim.or_none(who)
        return did

    with ThreadPoolExecutor(8) as pool:
        done = [job_id for did in pool.map(work, range(8)) for job_id in did]
    rest = work(9)  # what was freed when everybody had gone
    assert sorted(done + rest) == sorted(one.id for one in jobs)
    assert {len(queries.attempts(one.id)) for one in jobs} == {1}


def test_a_worker_runs_many_jobs_in_a_row_and_each_once(
    ganq: "Ganq", queries: "Queries", small: list[str]
) -> None:
    """Through real processes: every job but the first is taken with the commit that ends the one before."""
    ganq.start_worker()
    ganq("submit", "train", *small, "--epochs", "1", "--sweep", "seed=0-5", "--wait")
    jobs = queries.page(Filter(), limit=10)
    assert [(one.state, one.attempt) for one in jobs] == [(JobState.SUCCEEDED, 1)] * 6


@pytest.mark.tier2_on("postgres")
@pytest.mark.parametrize(
    "point", [pytest.param("supervisor.before_finish", marks=pytest.mark.tier2), "supervisor.finished"]
)
def test_a_worker_that_is_terminated_as_a_job_ends_leaves_the_next_to_others(
    ganq: "Ganq", queries: "Queries", small: list[str], tmp_path: Path, point: str
) -> None:
    """SIGTERM just before the commit that ends one job and takes the next, and just after."""
    worker = ganq.start_worker(
        GANQ_ENABLE_FAILPOINTS="1",
        GANQ_FAILPOINTS=f"{point}=sleep:3",
        GANQ_FAILPOINTS_FIRED=str(tmp_path),
    )
    for seed in ("1", "2"):
        ganq("submit", "train", *small, "--epochs", "30", "--seed", seed)
    until(lambda: any(tmp_path.glob(f"*{point}*")), within_s=60, what="the end of the first job")
    worker.terminate()
    assert worker.wait(30) == 0
    second, first = queries.page(Filter(), limit=2)
    assert (first.state, second.state) == (JobState.SUCCEEDED, JobState.QUEUED)
    outcomes = [one["outcome"] for one in queries.attempts(second.id)]
    assert outcomes == ([] if point == "supervisor.before_finish" else [Outcome.REQUEUED])


@pytest.mark.tier2
def test_a_worker_that_is_killed_as_it_has_taken_the_next_job_does_it_after_all(
    ganq: "Ganq", queries: "Queries", small: list[str], tmp_path: Path
) -> None:
    ganq.start_worker(
        GANQ_ENABLE_FAILPOINTS="1",
        GANQ_FAILPOINTS="supervisor.finished=kill",
        GANQ_FAILPOINTS_FIRED=str(tmp_path),
    )
    ganq("submit", "train", *small, "--epochs", "1", "--sweep", "seed=0-2", "--wait")
    jobs = queries.page(Filter(), limit=5, oldest_first=True)
    assert [one.state for one in jobs] == [JobState.SUCCEEDED] * 3
    outcomes = [[one["outcome"] for one in queries.attempts(job.id)] for job in jobs]
    assert {tuple(one)[-1] for one in outcomes} == {Outcome.SUCCEEDED}
    assert sum(one.count(Outcome.SUCCEEDED) for one in outcomes) == 3
    assert [Outcome.LOST, Outcome.SUCCEEDED] in outcomes, "the one that was taken as the worker was killed"
