"""Arrays: accepted all or none, once for each key; listed, counted and cancelled by the hundreds."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, insert, select
from tables import Claimer, event_types, first_answer_lost

from jobs.errors import JobNotFoundError, SpecError
from jobs.kinds import SPEC_VERSION
from jobs.states import JobState
from storage.db.queries import Filter
from storage.db.tables import job, utcnow

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job
    from storage.db.store import JobStore

MANY = 100_000


def submit(store: "JobStore", number: Any = 3, key: Any = "key", **more: Any) -> Any:
    return store.submit_sweep(
        [{"place": place} for place in range(number)],
        names=[f"rates-{place}" for place in range(number)],
        submit_key=key,
        **{"kind": "train", "spec_version": SPEC_VERSION, "user": "tester", **more},
    )


def number_of_jobs(database: "Database") -> Any:
    return database.read(lambda conn: conn.execute(select(func.count()).select_from(job)).scalar_one())


def test_a_sweep_is_jobs_in_order_and_are_claimed_like_any(
    database: "Database", store: "JobStore", queries: "Queries", claim: Claimer
) -> None:
    sweep = submit(store)
    jobs = queries.get_many(sweep.job_ids)
    assert [one.name for one in jobs] == ["rates-0", "rates-1", "rates-2"]
    assert [one.spec for one in jobs] == [{"place": 0}, {"place": 1}, {"place": 2}]
    assert {one.sweep for one in jobs} == {sweep.id}
    assert claim().job_id == sweep.job_ids[0]
    assert event_types(database, sweep.job_ids[1]) == ["submitted"]


def test_the_same_key_gives_the_same_jobs_once_and_another_request_is_refused(
    database: "Database", store: "JobStore"
) -> None:
    first = submit(store)
    assert submit(store) == first
    assert number_of_jobs(database) == 3
    with pytest.raises(SpecError, match="another request"):
        submit(store, number=4)
    assert number_of_jobs(database) == 3


def test_a_sweep_whose_answer_was_lost_is_accepted_once(database: "Database", store: "JobStore") -> None:
    with first_answer_lost(database):
        sweep = submit(store)
    assert number_of_jobs(database) == len(sweep.job_ids) == 3


def test_two_submits_with_one_key_at_the_same_moment_make_one_sweep(
    database: "Database", store: "JobStore"
) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(submit(store, 40))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert number_of_jobs(database) == 40


def test_all_are_accepted_or_none(database: "Database", store: "JobStore") -> None:
    with pytest.raises(JobNotFoundError):
        submit(store, after=[99])
    with pytest.raises(SpecError, match="more than one sweep holds"):
        submit(store, number=10_001)
    assert number_of_jobs(database) == 0


def test_a_sweep_after_a_job_waits_for_it(
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    queries: "Queries",
) -> None:
    first = job_factory()
    sweep = submit(store, after=[first.id])
    lease = claim()
    assert lease.job_id == first.id
    assert claim.or_none() is None
    store.succeed(lease, {})
    assert claim().job_id == sweep.job_ids[0]


def test_a_sweep_is_found_by_its_id_its_name_and_each_of_its_jobs(
    store: "JobStore", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    sweep = submit(store)
    other = submit(store, key="other")
    alone = job_factory(name="alone")
    assert queries.find_sweep(sweep.id) == sweep.id
    assert queries.find_sweep("rates") == other.id, "a name means what it was given to last"
    assert queries.find_sweep(str(sweep.job_ids[1])) == sweep.id
    for unknown in ("none", str(alone.id), "alone", "99"):
        with pytest.raises(JobNotFoundError):
            queries.find_sweep(unknown)
    assert queries.counts(sweep=sweep.id)["queued"] == 3


def test_cancelling_many_ends_what_is_queued_asks_what_runs_and_takes_along_what_waits(
    database: "Database",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    queries: "Queries",
) -> None:
    running = job_factory(priority=5)
    assert claim().job_id == running.id
    parent = job_factory()
    child = job_factory(after=[parent.id])
    sweep = submit(store)
    ended = job_factory(priority=9)
    store.succeed(claim(), {})

    told = dict(store.cancel_many([running.id, parent.id, child.id, ended.id, *sweep.job_ids]))
    assert told == {running.id: False, parent.id: True, child.id: True} | dict.fromkeys(sweep.job_ids, True)
    states = {one.id: one.state for one in queries.page(Filter(), limit=20)}
    assert states.pop(running.id) is JobState.RUNNING
    assert states.pop(ended.id) is JobState.SUCCEEDED
    assert set(states.values()) == {JobState.CANCELLED}
    assert event_types(database, sweep.job_ids[0]) == ["submitted", "cancel_requested", "cancelled"]
    assert queries.get(running.id).cancel_requested_at is not None
    assert queries.get(sweep.job_ids[0]).finished_at is not None


# --- a long table -----------------------------------------------------------------------------


@pytest.mark.tier2
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_queue_of_100000_is_counted_paged_and_cancelled_in_short_transactions(
    database: "Database", store: "JobStore", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    common = {"kind": "train", "queue": "default", "user": "ada", "priority": 0, "spec": {}}
    common |= {"spec_version": 1, "state": "queued", "created_at": 0.0}
    rows = [{**common, "submit_key": str(place), "name": f"n{place}"} for place in range(MANY)]
    database.write(lambda conn: conn.execute(insert(job), rows))

    assert queries.counts()["queued"] == MANY
    assert [one.id for one in queries.page(Filter(before_id=50), limit=2)] == [49, 48]
    assert [one.name for one in queries.page(Filter(name="n9999"), limit=20)][-1] == "n9999"

    cancelling = store.cancel_many(queries.ids(Filter(user="ada")))
    next(cancelling)
    between = database.read(lambda conn: conn.execute(select(utcnow())).scalar_one())
    counts = queries.counts()
    assert between
    assert 0 < counts["cancelled"] <= 1000, "one transaction takes some hundred jobs"
    assert sum(1 for _ in cancelling) == MANY - 1
    assert queries.counts() == {**dict.fromkeys(map(str, JobState), 0), "cancelled": MANY}
