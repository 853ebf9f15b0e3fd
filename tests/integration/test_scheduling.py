"""Who gets the next worker: priority, turns between users, quotas, and room for what is urgent."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete, insert, select, update
from tables import Claimer, event_types, set_columns

from jobs.kinds import SPEC_VERSION
from jobs.states import StopReason
from storage.db.engine import Database
from storage.db.store import JobStore
from storage.db.store.scheduling import MAX_PREEMPTED_WAIT_S
from storage.db.tables import attempt, event, job, quota, share
from storage.status import job_text
from storage.status.job_text import StatusContext

if TYPE_CHECKING:
    from storage.db.queries import Queries
    from storage.db.rows import Job, WorkerIdentity
    from storage.settings import Settings

KINDS = ("train", "generate")


def empty(database: Database) -> None:
    def delete_all(conn: Connection) -> None:
        for table in (event, attempt, job, share, quota):
            conn.execute(delete(table))

    database.write(delete_all)


def limit(database: Database, scope: Any, name: Any, most: Any) -> None:
    row = {"scope": scope, "name": name, "max_running": most}
    database.write(lambda conn: conn.execute(insert(quota).values(row)))


def offer(store: JobStore, lease: Any, who: Any) -> Any:
    return store.request_preemption(lease, who, kinds=KINDS)


def test_of_equal_priority_users_take_turns_however_many_jobs_each_has(
    store: JobStore, job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    for _ in range(6):
        job_factory(user="ada")
    for user in ("ben", "ben", "cem"):
        job_factory(user=user)

    served = []
    for _ in range(9):
        lease = claim()
        served.append(lease.job.user)
        store.succeed(lease, {})

    assert Counter(served[:3]) == {"ada": 1, "ben": 1, "cem": 1}
    assert Counter(served[:5]) == {"ada": 2, "ben": 2, "cem": 1}
    assert served[5:] == ["ada"] * 4


def test_the_user_with_fewer_running_jobs_comes_first(
    job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    for user in ("ada", "ada", "ada", "ben", "ben"):
        job_factory(user=user)
    assert Counter(claim().job.user for _ in range(4)) == {"ada": 2, "ben": 2}


def test_running_jobs_count_before_the_turn_that_a_user_had(
    job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    """Alone, ada lost no turn; her two jobs run all the same."""
    for _ in range(2):
        job_factory(user="ada")
        claim()
    for user in ("ada", "ben"):
        job_factory(user=user)
    assert claim().job.user == "ben"


def test_priority_comes_before_turns(
    store: JobStore, job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    urgent = [job_factory(user="ada", priority=3) for _ in range(3)]
    job_factory(user="ben", priority=2)
    for one in urgent:
        lease = claim()
        assert lease.job_id == one.id
        store.succeed(lease, {})
    assert claim().job.user == "ben"


def test_of_one_user_the_oldest_comes_first_over_all_queues_of_a_worker(
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    first = job_factory(queue="studio")
    job_factory()
    both = make_identity(queues=("default", "studio"))
    assert claim(both).job_id == first.id


def test_a_user_at_the_quota_is_passed_over_and_served_when_a_job_has_ended(
    database: Database,
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    limit(database, "user", "*", 2)
    limit(database, "user", "ben", 1)
    for user in ("ada", "ada", "ada", "ben", "ben"):
        job_factory(user=user)
    lower = job_factory(user="cem", priority=-5)

    leases = [claim() for _ in range(4)]
    assert Counter(one.job.user for one in leases) == {"ada": 2, "ben": 1, "cem": 1}
    assert leases[-1].job_id == lower.id, "a lower priority may run where the higher is at its quota"
    assert claim.or_none() is None

    store.succeed(next(one for one in leases if one.job.user == "ben"), {})
    assert claim().job.user == "ben"


def test_a_job_whose_time_has_come_is_had_by_the_first_who_claims(
    database: Database, job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    made = job_factory()
    set_columns(database, made.id, not_before=1.0)
    assert claim().job_id == made.id


def test_workers_that_claim_at_once_do_not_pass_a_quota_together(
    database: Database,
    settings: "Settings",
    job_factory: "Callable[..., Job]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    """Each must count what the others have just taken: claims under quotas pass one at a time."""
    for _ in range(4):
        limit(database, "user", "*", 2)
        jobs = [job_factory() for _ in range(8)]
        start = threading.Barrier(6)
        leases: list[Any] = []

        def take(place: int, start: Any = start, leases: Any = leases) -> None:
            its = Database(settings)
            its.read(lambda conn: conn.execute(select(job.c.id).limit(1)).first())
            start.wait()
            leases.append(
                JobStore(its).claim(make_identity(f"w{place}"), kinds=KINDS, spec_version=SPEC_VERSION)
            )
            its.dispose()

        threads = [threading.Thread(target=take, args=(place,)) for place in range(6)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert sum(lease is not None for lease in leases) == 2
        empty(database)
        assert len(jobs) == 8


def test_a_queue_at_its_quota_is_passed_over(
    database: Database,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    limit(database, "queue", "studio", 1)
    for _ in range(2):
        job_factory(queue="studio", priority=9)
    job_factory()
    both = make_identity(queues=("default", "studio"))
    assert [claim(both).job.queue for _ in range(2)] == ["studio", "default"]
    assert claim.or_none(both) is None
    database.write(lambda conn: conn.execute(delete(quota)))
    assert claim(both).job.queue == "studio"


# --- making room --------------------------------------------------------------------------------


def test_a_training_makes_room_for_a_waiting_job_of_higher_priority_and_runs_after_it(
    database: Database,
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    worker_identity: "WorkerIdentity",
    queries: "Queries",
) -> None:
    job_factory(preemptible=True)
    training = claim()
    assert offer(store, training, worker_identity) is None
    urgent = job_factory(kind="generate", priority=10)

    assert offer(store, training, worker_identity) == urgent.id
    assert store.stop_requests(training).preempt_for == urgent.id
    assert store.heartbeat(training, None).preempt_for == urgent.id
    store.release(training, StopReason.PREEMPT)
    waits = queries.get(training.job_id)
    assert job_text.state(waits, StatusContext.of(queries, [waits])) == f"preempted by job {urgent.id}"

    assert claim().job_id == urgent.id
    again = claim()
    assert (again.job_id, again.job.yields, again.job.crash_count) == (training.job_id, 1, 0)
    assert store.stop_requests(again).preempt_for is None
    assert event_types(database, training.job_id) == [
        "submitted",
        "claimed",
        "preempt_requested",
        "requeued",
        "claimed",
    ]


@pytest.mark.parametrize("priority", [-1, 0])
def test_nothing_is_preempted_for_what_is_not_more_urgent(
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    worker_identity: "WorkerIdentity",
    priority: int,
) -> None:
    job_factory(preemptible=True)
    training = claim()
    job_factory(kind="generate", priority=priority)
    assert offer(store, training, worker_identity) is None


def test_a_job_that_is_not_preemptible_stays(
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    worker_identity: "WorkerIdentity",
) -> None:
    job_factory(preemptible=False)
    training = claim()
    job_factory(kind="generate", priority=10)
    assert offer(store, training, worker_identity) is None
    assert store.stop_requests(training).preempt_for is None


def test_one_waiting_job_gets_one_victim(
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    workers = [make_identity(name) for name in ("w1", "w2", "w3")]
    for _ in workers:
        job_factory(preemptible=True)
    leases = [claim(who) for who in workers]
    urgent = job_factory(kind="generate", priority=10)

    answers = [offer(store, lease, who) for lease, who in zip(leases, workers, strict=True)]
    assert Counter(answers) == {urgent.id: 1, None: 2}

    another = job_factory(kind="generate", priority=10)
    store.release(leases[0], StopReason.PREEMPT)
    assert claim(workers[0]).job_id == urgent.id
    assert offer(store, leases[1], workers[1]) == another.id


def test_nothing_is_preempted_while_an_idle_worker_serves_the_queue(
    database: Database,
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    from storage.db.workers import WorkerStore

    busy, idle = make_identity("busy"), make_identity("idle")
    WorkerStore(database, idle).report("idle")
    job_factory(preemptible=True)
    training = claim(busy)
    urgent = job_factory(kind="generate", priority=10)
    assert offer(store, training, busy) is None

    WorkerStore(database, idle).report("busy")
    assert offer(store, training, busy) == urgent.id


def test_an_idle_worker_that_does_not_take_the_job_is_not_waited_for(
    database: Database,
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
    queries: "Queries",
) -> None:
    from storage.db.workers import WorkerStore

    WorkerStore(database, make_identity("deaf")).report("idle")
    job_factory(preemptible=True)
    training = claim()
    urgent = job_factory(kind="generate", priority=10)
    set_columns(database, urgent.id, created_at=queries.now() - 10)
    assert offer(store, training, make_identity()) == urgent.id


def test_nothing_is_preempted_for_a_job_that_could_not_run(
    database: Database,
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    worker_identity: "WorkerIdentity",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    job_factory(preemptible=True)
    training = claim()
    job_factory(kind="generate", priority=10, queue="studio")
    job_factory(kind="generate", priority=10, held=True)
    job_factory(kind="generate", priority=10, spec_version=SPEC_VERSION + 1)
    assert offer(store, training, worker_identity) is None

    limit(database, "user", "tester", 1)
    job_factory(kind="generate", priority=10)
    assert offer(store, training, worker_identity) is None, "its own user is at the quota"


def test_a_job_that_was_preempted_stays_for_as_long_as_it_was_kept_waiting(
    database: Database,
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    worker_identity: "WorkerIdentity",
    queries: "Queries",
) -> None:
    job_factory(preemptible=True)
    store.release(claim(), StopReason.PREEMPT)
    training = claim()
    set_columns(database, training.job_id, yielded_at=queries.now() - 100)
    training = replace(training, job=queries.get(training.job_id))
    urgent = job_factory(kind="generate", priority=10)
    assert offer(store, training, worker_identity) is None, "it waited 100 s and has just begun"

    began = update(attempt).where(attempt.c.job_id == training.job_id, attempt.c.ended_at.is_(None))
    database.write(lambda conn: conn.execute(began.values(started_at=queries.now() - 60)))
    training = replace(training, claimed_at=training.claimed_at - 60)
    assert offer(store, training, worker_identity) == urgent.id, "it waited 40 s and has run for 60 s"


def test_a_job_that_was_preempted_and_waited_long_goes_before_everything(
    database: Database,
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    queries: "Queries",
) -> None:
    job_factory(preemptible=True)
    training = claim()
    store.release(training, StopReason.PREEMPT)
    for _ in range(3):
        job_factory(kind="generate", priority=10)
    lease = claim()
    assert lease.job.kind == "generate"

    set_columns(database, training.job_id, yielded_at=queries.now() - MAX_PREEMPTED_WAIT_S - 1)
    assert claim().job_id == training.job_id


def test_a_drain_after_a_preemption_is_not_a_preemption(
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    queries: "Queries",
) -> None:
    job_factory(preemptible=True)
    store.release(claim(), StopReason.PREEMPT)
    lease = claim()
    store.release(lease, StopReason.DRAIN)
    found = queries.get(lease.job_id)
    assert (found.yields, found.yielded_at) == (1, None)


# --- the rule, at random --------------------------------------------------------------------------

WAITING = st.lists(
    st.tuples(
        st.sampled_from(("ada", "ben", "cem")),
        st.integers(-2, 2),
        st.sampled_from(("default", "studio")),
        st.sampled_from(KINDS),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    waiting=WAITING,
    most=st.dictionaries(
        st.sampled_from((("user", "*"), ("user", "ben"), ("queue", "studio"))), st.integers(0, 2)
    ),
    kinds=st.sampled_from((("train",), KINDS)),
)
def test_the_order_of_claims_is_the_rule_whatever_waits(
    database: Database,
    store: JobStore,
    job_factory: "Callable[..., Job]",
    make_identity: "Callable[..., WorkerIdentity]",
    waiting: Any,
    most: Any,
    kinds: Any,
) -> None:
    empty(database)
    for (scope, name), number in most.items():
        limit(database, scope, name, number)
    both = make_identity(queues=("default", "studio"))
    left = {
        job_factory(user=user, priority=priority, queue=queue, kind=kind).id: (user, priority, queue)
        for user, priority, queue, kind in waiting
        if kind in kinds
    }
    running: Counter[tuple[str, str]] = Counter()
    served: dict[Any, Any] = {}

    def full(user: Any, queue: Any) -> Any:
        own = most.get(("user", user), most.get(("user", "*"), 99))
        return running["user", user] >= own or running["queue", queue] >= most.get(("queue", queue), 99)

    def rule(job_id: Any) -> Any:
        user, priority, _ = left[job_id]
        return -priority, running["user", user], served.get(user, 0), user, job_id

    for turn in range(1, len(left) + 2):
        free = [one for one in left if not full(left[one][0], left[one][2])]
        lease = store.claim(both, kinds=kinds, spec_version=SPEC_VERSION)
        if not free:
            assert lease is None
            return
        # Turns are taken only where several wait: whoever was served alone lost no turn by it.
        expected = min(free, key=rule)
        assert lease is not None
        user, priority, queue = left[expected]
        level = {left[one][0] for one in left if left[one][1] == priority}
        assert lease.job_id == expected
        if len(level) > 1:
            served[user] = turn
        del left[expected]
        running["user", user] += 1
        running["queue", queue] += 1
