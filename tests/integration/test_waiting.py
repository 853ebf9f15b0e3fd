"""Jobs that wait for a time, for the end of other jobs, or for a place in their sweep; and their order."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete, select, text
from tables import Claimer, job_row, set_columns

from jobs.errors import DatasetError, InvalidTransitionError, SpecError
from jobs.kinds import SPEC_VERSION
from jobs.states import JobState, StopReason
from storage.db.store.waiting import Extras
from storage.db.tables import dependency, end_dependency, event, job, label

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease
    from storage.db.store import JobStore

RUNS = ("queued", "running")


def end(store: "JobStore", lease: Any, how: str) -> None:
    if how == "succeeded":
        store.succeed(lease, {})
    elif how == "failed":
        store.fail(lease, DatasetError("gone"))
    else:
        store.request_cancel(lease.job_id)
        store.cancel_done(lease)


# --- a time -----------------------------------------------------------------------------------


def test_a_job_is_not_claimed_before_its_time(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    waits = job_factory(extras=Extras(begin_at=queries.now() + 3600)).id
    assert claim.or_none() is None
    released, next_s = store.release_waiting()
    assert released == 0
    assert next_s is not None
    assert 3590 < next_s < 3600
    set_columns(database, waits, begin_at=queries.now() - 1)
    assert store.release_waiting() == (1, None)
    assert claim().job_id == waits
    assert [one.type for one in queries.events(waits)] == ["submitted", "begin_reached", "claimed"]


def test_a_time_in_the_past_is_none(
    queries: "Queries", job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    now = job_factory(extras=Extras(begin_at=queries.now() - 1))
    assert (now.begin_at, claim().job_id) == (None, now.id)


def test_a_split_job_waits_with_all_its_shards(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    needed = job_factory(priority=20)
    spec = {"source": 1, "count": 8}
    shards = [({**spec, "draws": [first, first + 3]}, 4) for first in (0, 4)]
    later = Extras(begin_at=queries.now() + 3600, after_any=(needed.id,))
    whole = job_factory(kind="generate", spec=spec, shards=shards, extras=later)
    store.fail(claim(), DatasetError("gone"))
    assert claim.or_none() is None
    for part in (whole.id, whole.id + 1, whole.id + 2):
        set_columns(database, part, begin_at=1.0)
    store.release_waiting()
    for _ in range(2):
        store.succeed(claim(), {})
    assert claim().job_id == whole.id


# --- ends of other jobs -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["succeeded", "failed", "cancelled"])
def test_a_job_after_any_end_starts_and_one_after_a_failure_only_after_a_failure(
    store: "JobStore",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
    how: str,
) -> None:
    lease = running_job_factory()
    any_ = job_factory(extras=Extras(after_any=(lease.job_id,))).id
    fail = job_factory(extras=Extras(after_fail=(lease.job_id,))).id
    after_fail = job_factory(after=[fail]).id
    assert queries.unfinished_dependencies([any_]) == {any_: [lease.job_id]}
    end(store, lease, how)
    assert (queries.get(any_).blockers, queries.get(any_).state) == (0, JobState.QUEUED)
    expected = JobState.QUEUED if how == "failed" else JobState.CANCELLED
    assert [str(queries.get(one).state) for one in (fail, after_fail)] == [expected] * 2
    assert queries.get(fail).error_code == (None if how == "failed" else "NOT_NEEDED")
    assert queries.unfinished_dependencies([any_, fail]) == {}
    assert store.release_waiting() == (0, None), "all is resolved"


def test_ends_that_an_older_worker_left_are_resolved_once(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
) -> None:
    lease = running_job_factory()
    extras = Extras(after_any=(lease.job_id,))
    waits, other = (
        job_factory(extras=extras).id,
        job_factory(after=[lease.job_id], extras=Extras(note="x")).id,
    )
    # ganq 0.2 ended the job. What waits for its success was unblocked, and has got another blocker since.
    set_columns(database, lease.job_id, state="succeeded", finished_at=1.0)
    assert store.release_waiting()[0] == 1
    assert (queries.get(waits).blockers, queries.get(other).blockers) == (0, 1)
    assert store.release_waiting()[0] == 0


def test_conditions_that_cannot_be_met_are_refused(
    store: "JobStore", job_factory: "Callable[..., Job]", running_job_factory: "Callable[..., Lease]"
) -> None:
    running = running_job_factory()
    with pytest.raises(SpecError, match="for the failure of job 1 and for another end"):
        job_factory(extras=Extras(after_any=(1,), after_fail=(1,)))
    with pytest.raises(SpecError, match="for the failure of job 1 and for another end"):
        job_factory(after=[1], extras=Extras(after_fail=(1,)))
    end(store, running, "succeeded")
    with pytest.raises(SpecError, match="would never run"):
        job_factory(extras=Extras(after_fail=(1,)))
    assert job_factory(extras=Extras(after_any=(1,))).blockers == 0


def test_many_cancelled_jobs_release_those_that_wait_for_any_end(
    store: "JobStore", queries: "Queries", job_factory: "Callable[..., Job]"
) -> None:
    first, second = job_factory().id, job_factory().id
    waits = job_factory(extras=Extras(after_any=(first,))).id
    list(store.cancel_many([first, second]))
    assert (queries.get(waits).blockers, str(queries.get(waits).state)) == (0, "queued")


# --- places in a sweep ------------------------------------------------------------------------


def sweep_of(store: "JobStore", number: int, most: int, key: str = "key") -> tuple[int, ...]:
    return store.submit_sweep(
        [{"data": "/pictures", "place": place} for place in range(number)],
        names=[None] * number,
        submit_key=key,
        kind="train",
        spec_version=SPEC_VERSION,
        user="tester",
        extras=Extras(max_running=most, labels={"sweep": "x"}),
    ).job_ids


def test_no_more_jobs_of_a_sweep_run_than_it_allows_and_each_end_starts_one(
    store: "JobStore", queries: "Queries", claim: Claimer
) -> None:
    ids = sweep_of(store, 5, 2)
    first, second = claim(), claim()
    assert claim.or_none() is None
    end(store, second, "failed")
    third = claim()
    assert [one.job_id for one in (first, second, third)] == list(ids[:3])
    store.request_cancel(ids[3])
    end(store, first, "succeeded")
    end(store, third, "cancelled")
    assert claim().job_id == ids[4]
    assert queries.labels_of(ids) == {one: {"sweep": "x"} for one in ids}


def test_a_held_job_gives_its_place_away_and_waits_for_another_when_it_is_released(
    store: "JobStore", claim: Claimer
) -> None:
    ids = sweep_of(store, 3, 1)
    store.hold(ids[0], held=True)
    second = claim()
    assert second.job_id == ids[1]
    store.hold(ids[0], held=False)
    assert claim.or_none() is None
    store.pause(ids[1])
    store.release(second, StopReason.PAUSE)
    store.release_waiting()
    assert claim().job_id == ids[0]
    store.hold(ids[1], held=False)
    assert claim.or_none() is None


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), number=st.integers(1, 7), most=st.integers(1, 4))
def test_whatever_happens_a_sweep_keeps_to_its_limit_and_is_finished(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    claim: Claimer,
    data: Any,
    number: int,
    most: int,
) -> None:
    def clear(conn: Connection) -> None:
        for table in (event, label, end_dependency, dependency):
            conn.execute(delete(table))
        conn.execute(text("DELETE FROM attempt"))
        conn.execute(delete(job))

    database.write(clear)
    ids = sweep_of(store, number, most, key=data.draw(st.uuids()).hex)
    leases: dict[int, Any] = {}
    steps = [
        "claim",
        "succeeded",
        "failed",
        "cancelled",
        "preempt",
        "hold",
        "release",
        "pause",
        "cancel",
        "tick",
    ]
    for step in data.draw(st.lists(st.sampled_from(steps), max_size=25)):
        states = {one.id: one for one in queries.get_many(ids)}
        open_ = sorted(one for one, row in states.items() if not row.state.terminal)
        if step == "claim" and (lease := claim.or_none()) is not None:
            leases[lease.job_id] = lease
        elif step == "tick":
            store.release_waiting()
        elif step in ("hold", "release", "pause", "cancel") and open_:
            one = data.draw(st.sampled_from(open_))
            if step == "pause":
                store.pause(one)
            elif step == "cancel" and one not in leases:
                store.request_cancel(one)
            elif step != "cancel" and states[one].state is JobState.QUEUED:
                store.hold(one, held=step == "hold")
        elif step in ("succeeded", "failed", "cancelled", "preempt") and leases:
            one = data.draw(st.sampled_from(sorted(leases)))
            lease = leases.pop(one)
            if step == "preempt":
                store.release(lease, StopReason.PREEMPT)
            else:
                end(store, lease, step)
        running = [row for row in queries.get_many(ids) if row.state is JobState.RUNNING]
        free = [
            row
            for row in queries.get_many(ids)
            if row.state is JobState.QUEUED and not row.held and not row.blockers
        ]
        assert len(running) + len(free) <= most
    for row in queries.get_many(ids):
        if row.held and not row.state.terminal:
            store.hold(row.id, held=False)
    for _ in range(4 * number):
        for lease in leases.values():
            end(store, lease, "succeeded")
        store.release_waiting()
        leases = {lease.job_id: lease for lease in (claim.or_none(),) if lease is not None}
    assert all(row.state.terminal for row in queries.get_many(ids))


# --- the order --------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(moves=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_moved_jobs_are_claimed_in_the_order_of_a_list(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    moves: list[tuple[int, int]],
) -> None:
    left = select(job.c.id).where(job.c.state.in_(RUNS))
    for one in database.read(lambda conn: list(conn.execute(left).scalars())):
        set_columns(database, one, state="cancelled", finished_at=1.0)
    ids = [job_factory().id for _ in range(6)]
    order = list(ids)
    for moved, other in moves:
        store.move_before(ids[moved], ids[other])
        if moved != other:
            order.remove(ids[moved])
            order.insert(order.index(ids[other]), ids[moved])
    assert [queries.queue_position(queries.get(one)) for one in order] == list(range(6))
    last = job_factory().id
    assert [claim().job_id for _ in range(7)] == [*order, last]


def test_a_job_gets_the_priority_of_the_one_it_is_moved_before_and_keeps_a_higher_one(
    store: "JobStore", job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    urgent, low, high = (job_factory(priority=priority).id for priority in (5, 0, 9))
    assert store.move_before(low, urgent).own_priority == 5
    assert store.move_before(high, urgent).own_priority == 9
    assert [claim().job_id for _ in range(3)] == [high, low, urgent]


def test_what_has_no_place_before_another_is_refused(
    database: "Database",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
) -> None:
    running = running_job_factory().job_id
    mine, hers, elsewhere = (job_factory(**more).id for more in ({}, {"user": "ada"}, {"queue": "other"}))
    with pytest.raises(SpecError, match="different users, who take turns"):
        store.move_before(mine, hers)
    with pytest.raises(SpecError, match="different queues"):
        store.move_before(mine, elsewhere)
    for pair in ((mine, running), (running, mine)):
        with pytest.raises(InvalidTransitionError, match="is running"):
            store.move_before(*pair)
    assert job_row(database, mine)["position"] == 0
