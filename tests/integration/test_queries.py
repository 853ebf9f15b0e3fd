"""What the command line asks of the job table."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, update
from tables import Claimer, explained, recorded, set_columns

from jobs.errors import CheckpointNotFoundError, JobNotFoundError, TrainingDivergedError
from jobs.states import JobState
from storage.db.queries import PAGE, Filter
from storage.db.store.shards import ShardSummary
from storage.db.tables import attempt, checkpoint, event, job, utcnow, worker
from storage.db.workers import FORGET_AFTER_S, WorkerStore

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease, WorkerIdentity
    from storage.db.store import JobStore


def register(
    store: "JobStore", lease: Any, *, epoch: int, step: int | None = None, kind: str = "epoch"
) -> int:
    return store.register_checkpoint(
        lease,
        kind=kind,
        epoch=epoch,
        step=epoch * 10 if step is None else step,
        path=f"jobs/{lease.job_id:06d}/a{lease.attempt}/{kind}-{epoch}-{step}",
        manifest_sha256="0" * 64,
        size=1,
    )


def measure(database: "Database", checkpoint_id: int, metric: float) -> None:
    database.write(
        lambda conn: conn.execute(
            update(checkpoint).where(checkpoint.c.id == checkpoint_id).values(metric=metric)
        )
    )


# --- one job ------------------------------------------------------------------------------------


def test_a_job_is_found_by_id_and_by_the_newest_of_its_name(
    job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    old, new = job_factory(name="faces"), job_factory(name="faces")

    assert queries.find(str(old.id)).id == old.id
    assert queries.find("faces").id == new.id


@pytest.mark.parametrize("reference", ["4711", "nobody", "9" * 18, "9" * 40, "", "1 ", "-1", "%", "fac%"])
def test_a_job_that_is_not_there_is_reported(
    job_factory: "Callable[..., Job]", queries: "Queries", reference: Any
) -> None:
    job_factory(name="faces")
    with pytest.raises(JobNotFoundError) as caught:
        queries.find(reference)
    assert caught.value.exit_code == 3
    assert "ganq status" in (caught.value.hint or "")


# --- lists --------------------------------------------------------------------------------------


def test_pages_follow_each_other_by_id_without_a_gap_or_a_double(
    job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    made = [job_factory().id for _ in range(7)]

    first = queries.page(Filter(), limit=3)
    second = queries.page(Filter(before_id=first[-1].id), limit=3)
    job_factory()  # a job that comes meanwhile moves no page
    third = queries.page(Filter(before_id=second[-1].id), limit=3)

    assert [one.id for page in (first, second, third) for one in page] == made[::-1]
    oldest = queries.page(Filter(after_id=made[1]), limit=2, oldest_first=True)
    assert [one.id for one in oldest] == made[2:4]


def test_the_stream_continues_over_the_edges_of_its_pages(
    database: "Database", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    row = {
        "kind": "train",
        "queue": "default",
        "user": "u",
        "priority": 0,
        "spec": {},
        "spec_version": 1,
        "state": "queued",
        "created_at": 0.0,
    }
    rows = [{**row, "submit_key": str(number)} for number in range(2 * PAGE)]
    database.write(lambda conn: conn.execute(insert(job), rows))

    ids = [one.id for one in queries.stream(Filter())]

    assert len(ids) == 2 * PAGE
    assert ids == sorted(set(ids), reverse=True)


def test_filters_narrow_the_list(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
) -> None:
    lease = running_job_factory(name="faces-1")
    ada = job_factory(user="ada", name="faces_2", kind="generate")

    def ids(**wanted: Any) -> Any:
        return [one.id for one in queries.page(Filter(**wanted), limit=9)]

    assert ids() == [ada.id, lease.job_id]
    assert ids(states=(JobState.RUNNING,)) == [lease.job_id]
    assert ids(states=()) == []
    assert ids(kind="generate") == [ada.id]
    assert ids(user="ada") == [ada.id]
    assert ids(name="faces") == [ada.id, lease.job_id]
    assert ids(name="s_") == [ada.id], "an underscore is a letter, not a wildcard"
    assert ids(name="%") == []


def test_counts_name_every_state_also_those_without_jobs(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
) -> None:
    store.succeed(running_job_factory(), {})
    running_job_factory()
    job_factory()
    store.request_cancel(job_factory().id)

    assert queries.counts() == {"queued": 1, "running": 1, "succeeded": 1, "failed": 0, "cancelled": 1}


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_counting_reads_indexes_and_not_the_rows_of_a_million_jobs(
    database: "Database", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    job_factory()
    with recorded(database) as seen:
        queries.counts()
    plans = [explained(database, s, p) for s, p in seen if "FROM job" in s]
    assert len(plans) == 3
    assert "USING COVERING INDEX ix_job_state_id" in plans[0]
    assert "USING INDEX ix_job_part_of" in plans[1], "what is no part is read, too"
    assert "USING INDEX ix_job_part_of" in plans[2], "what is no part is read, too"
    assert "SCAN" not in plans[2]


def test_the_queue_position_counts_those_that_go_first(
    store: "JobStore", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    job_factory(priority=5)
    job_factory(priority=9, held=True)
    mine = job_factory()
    job_factory()

    assert queries.queue_position(mine) == 1


def test_unmet_needs_are_those_that_have_not_ended(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
) -> None:
    done, open_ = running_job_factory(), job_factory()
    waiting = job_factory(after=[done.job_id, open_.id])
    store.succeed(done, {})

    assert queries.unfinished_dependencies([waiting.id, open_.id]) == {waiting.id: [open_.id]}
    assert queries.unfinished_dependencies([]) == {}


# --- models and checkpoints ---------------------------------------------------------------------


def test_the_newest_model_is_the_newest_training_that_can_give_one(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
) -> None:
    with pytest.raises(JobNotFoundError) as caught:
        queries.newest_model()
    assert "ganq submit train" in (caught.value.hint or "")

    good = running_job_factory()
    register(store, good, epoch=5)
    store.succeed(good, {})
    job_factory(kind="generate")
    failed = running_job_factory()
    store.fail(failed, TrainingDivergedError("nan"))
    assert queries.newest_model().id == good.job_id

    failed_late = running_job_factory()
    register(store, failed_late, epoch=5)
    store.fail(failed_late, TrainingDivergedError("nan"))
    assert queries.newest_model().id == failed_late.job_id

    unfinished = job_factory()
    assert queries.newest_model().id == unfinished.id


def test_best_is_the_lowest_metric_and_the_last_while_there_is_none(
    database: "Database", store: "JobStore", running_job_factory: "Callable[..., Lease]", queries: "Queries"
) -> None:
    lease = running_job_factory()
    first, second, third = (register(store, lease, epoch=epoch) for epoch in (5, 10, 15))

    assert queries.choose_checkpoint(lease.job_id, "best").id == third
    measure(database, first, 3.0)
    measure(database, second, 0.0)
    assert queries.choose_checkpoint(lease.job_id, "best").id == second
    assert queries.choose_checkpoint(lease.job_id, "last").id == third
    assert queries.choose_checkpoint(lease.job_id, "5").id == first


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    store: "JobStore", running_job_factory: "Callable[..., Lease]", queries: "Queries"
) -> None:
    lease = running_job_factory()
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint yet"):
        queries.choose_checkpoint(lease.job_id, "best")

    register(store, lease, epoch=5)
    register(store, lease, epoch=7, kind="resume")

    with pytest.raises(CheckpointNotFoundError) as caught:
        queries.choose_checkpoint(lease.job_id, "7")
    assert "it has: 5;" in (caught.value.hint or "")
    assert queries.choose_checkpoint(lease.job_id, "last").epoch == 7


# --- history ------------------------------------------------------------------------------------


def test_events_come_in_order_and_from_a_given_one_on(
    store: "JobStore", running_job_factory: "Callable[..., Lease]", queries: "Queries"
) -> None:
    lease = running_job_factory()
    register(store, lease, epoch=5)
    store.succeed(lease, {})

    events = queries.events(lease.job_id)

    assert [one.type for one in events] == ["submitted", "claimed", "checkpoint", "succeeded"]
    assert [one.id for one in events] == sorted(one.id for one in events)
    assert [one.at for one in events] == sorted(one.at for one in events)
    assert (events[1].worker, events[1].attempt) == ("w1", 1)
    assert events[2].detail == {"kind": "epoch", "epoch": 5, "step": 50}
    assert queries.events(lease.job_id, after_id=events[1].id) == events[2:]


def test_rows_of_0_2_are_read_under_the_new_names(
    database: "Database", store: "JobStore", running_job_factory: "Callable[..., Lease]", queries: "Queries"
) -> None:
    lease = running_job_factory()
    store.release(lease, "drain")
    written = [
        ("asked_to_yield", {"to": 9}),
        ("released", {"reason": "drain"}),
        ("unheld", None),
        ("set_aside", {"folder": "jobs/000001.of-another-table"}),
        ("save_missed", {"code": "DISK_FULL", "why": "full", "misses": 1}),
        ("retried", {"code": "FOREIGN_FILE", "message": "no weights"}),
        ("lost", {"why": "silent"}),
    ]

    def write(conn: Any) -> None:
        for type, detail in written:
            conn.execute(insert(event).values(job_id=lease.job_id, at=utcnow(), type=type, detail=detail))
        conn.execute(update(attempt).values(outcome="released", error_code="POISON"))
        conn.execute(update(job).values(error_code="POISON", error_message="3 times without progress"))

    database.write(write)

    assert [(one.type, one.detail) for one in queries.events(lease.job_id)[-len(written) :]] == [
        ("preempt_requested", {"waiting_job": 9}),
        ("requeued", {"reason": "drain"}),
        ("hold_released", None),
        ("quarantined", {"folder": "jobs/000001.of-another-table"}),
        ("checkpoint_save_failed", {"code": "DISK_FULL", "reason": "full", "misses": 1}),
        ("retried", {"code": "UNSAFE_WEIGHTS", "message": "no weights"}),
        ("lost", {"reason": "silent"}),
    ]
    (ended,) = queries.attempts(lease.job_id)
    assert (ended["outcome"], ended["error_code"]) == ("requeued", "CRASH_LOOP")
    assert "lease_token" not in ended
    assert queries.get(lease.job_id).error_code == "CRASH_LOOP"


def test_the_newest_retry_of_a_job_is_found(job_factory: "Callable[..., Job]", queries: "Queries") -> None:
    first = job_factory()
    job_factory(retry_of=first.id)
    newest = job_factory(retry_of=first.id)

    assert queries.retried_as(first.id) == newest.id
    assert queries.retried_as(newest.id) is None


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_retries_and_held_jobs_are_read_from_indexes_of_their_own(
    database: "Database", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    job_factory()
    with recorded(database) as seen:
        queries.retried_as(1)
        queries.held()
    plans = [explained(database, s, p) for s, p in seen if "FROM job" in s]
    assert "INDEX ix_job_retry_of" in plans[0]
    assert "SCAN job USING INDEX ix_job_held" in plans[1]
    assert not any("SCAN job\n" in plan or "ix_job_state" in plan for plan in plans)


def test_held_jobs_are_counted_until_they_end(
    store: "JobStore", job_factory: "Callable[..., Job]", claim: Claimer, queries: "Queries"
) -> None:
    job_factory()
    running = claim()
    stays, cancelled = job_factory(held=True), job_factory(held=True)
    store.pause(running.job_id)
    store.request_cancel(cancelled.id)

    assert queries.held() == {JobState.QUEUED: 1, JobState.RUNNING: 1}
    assert [one.id for one in queries.page(Filter(held=True), limit=9)] == [stays.id, running.job_id]


def test_the_job_of_each_worker_is_known_before_its_next_heartbeat(
    store: "JobStore", job_factory: "Callable[..., Job]", claim: Claimer, queries: "Queries"
) -> None:
    job_factory()
    running = claim()

    assert {name: one.id for name, one in queries.running().items()} == {running.job.worker: running.job_id}
    store.release(running, "drain")
    assert queries.running() == {}


def test_times_come_from_the_databases_clock(job_factory: "Callable[..., Job]", queries: "Queries") -> None:
    before, made, after = queries.now(), job_factory(), queries.now()

    assert before - 0.01 <= made.created_at <= after + 0.01
    assert abs(after - time.time()) < 5


# --- workers ------------------------------------------------------------------------------------


def test_a_worker_is_seen_with_what_it_last_said(
    database: "Database", make_identity: "Callable[..., WorkerIdentity]", queries: "Queries"
) -> None:
    here = WorkerStore(database, make_identity("w2", queues=("default", "studio"), device="GPU-7"))
    WorkerStore(database, make_identity("w1")).report("starting")
    here.report("starting")
    here.report("busy", 12)

    first, second = queries.workers()

    assert (first.name, first.state, first.job_id) == ("w1", "starting", None)
    assert (second.name, second.state, second.job_id, second.queues, second.device) == (
        "w2",
        "busy",
        12,
        "default,studio",
        "GPU-7",
    )
    assert -0.01 <= second.silent_s < 5


def test_a_worker_that_was_unresponsive_for_a_week_is_forgotten(
    database: "Database", make_identity: "Callable[..., WorkerIdentity]", queries: "Queries"
) -> None:
    old, new = (WorkerStore(database, make_identity(name)) for name in ("old", "new"))
    old.report("idle")
    new.report("idle")
    long_ago = queries.now() - FORGET_AFTER_S - 60
    database.write(
        lambda conn: conn.execute(update(worker).where(worker.c.name == "old").values(seen_at=long_ago))
    )

    new.forget_old()

    assert [one.name for one in queries.workers()] == ["new"]


def test_columns_set_behind_the_stores_back_are_read_as_they_are(
    database: "Database", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    made = job_factory()
    set_columns(database, made.id, bit_exact=0, progress={"done": 1})
    assert queries.get(made.id).bit_exact is False
    assert queries.get(made.id).progress == {"done": 1}


def test_a_split_job_with_active_shards_counts_as_running(
    queries: "Queries", job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    spec = {"source": 1, "count": 2}
    parts = [({**spec, "draws": [first, first]}, 1) for first in range(2)]
    whole = job_factory(kind="generate", spec=spec, shards=parts)
    waiting = job_factory(kind="generate", spec=spec, shards=parts, held=True)
    claim()
    running, queued = (Filter(states=(state,)) for state in (JobState.RUNNING, JobState.QUEUED))
    assert queries.ids(running) == [whole.id]
    assert queries.ids(queued) == [waiting.id]
    counts = queries.counts()
    assert (counts["running"], counts["queued"]) == (1, 1)


def test_the_progress_of_all_shards_is_added_up_by_the_database(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    spec = {"source": 1, "count": 12}
    shards = [({**spec, "draws": [first, first + 2]}, 3) for first in range(0, 12, 3)]
    parent = job_factory(kind="generate", spec=spec, shards=shards)
    other = job_factory(kind="generate", spec=spec, shards=shards[:2], held=True)
    done, running = claim(), claim()
    store.succeed(done, {})
    set_columns(database, running.job_id, progress={"done": 2, "total": 3, "unit": "images", "rate": 1.5})
    with recorded(database) as seen:
        found = queries.shard_summaries([parent.id, other.id])
    assert found[parent.id] == ShardSummary(4, 1, 1, 5, 12, 1.5, (running.job.worker or "",))
    assert found[other.id] == ShardSummary(2, 0, 0, 0, 6, 0.0, ())
    added_up, workers = (statement for statement, _ in seen if statement.startswith("SELECT"))
    assert "GROUP BY part_of, state" in added_up
    assert "progress" not in workers
    assert [one.id for one in queries.shards(parent.id, most=2)] == [done.job_id, running.job_id]
    set_columns(database, running.job_id, progress={})
    assert queries.shard_summaries([parent.id])[parent.id].done == 3
