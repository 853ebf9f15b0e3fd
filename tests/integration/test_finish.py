"""How attempts and jobs end, what comes back into the queue, and what may never change again."""

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from tables import Claimer, beat_of, event_types, first_answer_lost, job_row, open_attempts, set_columns

from jobs.errors import (
    DiskFullError,
    InvalidTransitionError,
    JobNotFoundError,
    LeaseLostError,
    OutOfMemoryError,
    StorageError,
    TrainingDivergedError,
    VolumeError,
)
from jobs.states import JobState, Outcome
from storage.db.rows import Lease
from storage.db.store import HeartbeatRow
from storage.db.store.finish import MAX_TRIES
from storage.db.workers import WorkerStore

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, WorkerIdentity
    from storage.db.store import JobStore


def outcomes(queries: "Queries", job_id: int) -> list[str]:
    return [one["outcome"] for one in queries.attempts(job_id)]


def checkpoint(store: "JobStore", lease: Any, step: int) -> None:
    store.register_checkpoint(
        lease,
        kind="resume",
        epoch=step,
        step=step,
        path=f"jobs/{lease.job_id:06d}/a{lease.attempt}/checkpoints/step-{step}",
        manifest_sha256="0" * 64,
        size=1,
    )


# --- success ----------------------------------------------------------------------------------


def test_success_publishes_the_result_and_closes_the_attempt(
    database: "Database", store: "JobStore", running_job_factory: Callable[..., Lease], queries: "Queries"
) -> None:
    lease = running_job_factory()

    store.succeed(lease, {"image_count": 4, "bit_exact": True})

    found = queries.get(lease.job_id)
    assert (found.state, found.result, found.bit_exact) == (
        JobState.SUCCEEDED,
        {"image_count": 4, "bit_exact": True},
        True,
    )
    assert found.finished_at is not None
    assert outcomes(queries, lease.job_id) == [Outcome.SUCCEEDED]
    assert event_types(database, lease.job_id) == ["submitted", "claimed", "succeeded"]


def test_a_result_of_the_version_before_is_read_under_the_new_names(
    store: "JobStore", running_job_factory: Callable[..., Lease], queries: "Queries"
) -> None:
    lease = running_job_factory()

    store.succeed(lease, {"pictures": 4, "metric": {"best": 0.1, "floor": 0.02}, "variety": 0.9})

    assert queries.get(lease.job_id).result == {
        "image_count": 4,
        "metric": {"best": 0.1, "baseline": 0.02},
        "diversity": 0.9,
    }


def test_succeeding_twice_is_recognised_as_done(
    database: "Database", store: "JobStore", running_job_factory: Callable[..., Lease], queries: "Queries"
) -> None:
    lease = running_job_factory()
    store.succeed(lease, {"image_count": 4})

    store.succeed(lease, {"image_count": 5})

    assert queries.get(lease.job_id).result == {"image_count": 4}
    assert event_types(database, lease.job_id).count("succeeded") == 1


SETTLE: "dict[str, tuple[Callable[[JobStore, Lease], Any], str]]" = {
    "succeed": (lambda store, lease: store.succeed(lease, {}), "succeeded"),
    "cancel_done": (lambda store, lease: store.cancel_done(lease), "cancelled"),
    "fail": (lambda store, lease: store.fail(lease, TrainingDivergedError("nan")), "failed"),
    "fail later": (lambda store, lease: store.fail(lease, DiskFullError("full")), "queued"),
    "crashed": (lambda store, lease: store.crashed(lease, "killed"), "queued"),
    "release": (lambda store, lease: store.release(lease, "drain"), "queued"),
}


@pytest.mark.parametrize("action", SETTLE)
def test_an_ending_whose_commit_answer_was_lost_is_recognised(
    database: "Database",
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    queries: "Queries",
    action: Any,
) -> None:
    act, state = SETTLE[action]
    lease = running_job_factory()

    with first_answer_lost(database):
        act(store, lease)

    assert queries.get(lease.job_id).state == state
    assert len(event_types(database, lease.job_id)) == 3
    assert open_attempts(database, lease.job_id) == 0


def test_success_after_giving_the_job_back_is_not_taken_for_done(
    store: "JobStore", running_job_factory: Callable[..., Lease], queries: "Queries"
) -> None:
    lease = running_job_factory()
    store.release(lease, "drain")

    with pytest.raises(LeaseLostError):
        store.succeed(lease, {"image_count": 4})

    assert queries.get(lease.job_id).result is None


# --- cancel -----------------------------------------------------------------------------------


def test_cancelling_a_queued_job_ends_it_at_once(
    database: "Database",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    made = job_factory()

    found = store.request_cancel(made.id)

    assert found.state is JobState.CANCELLED
    assert claim.or_none() is None
    assert event_types(database, made.id) == ["submitted", "cancel_requested", "cancelled"]


def test_cancelling_a_running_job_says_that_it_still_runs(
    database: "Database", store: "JobStore", running_job_factory: Callable[..., Lease], queries: "Queries"
) -> None:
    lease = running_job_factory()

    found = store.request_cancel(lease.job_id)
    store.request_cancel(lease.job_id)

    assert found.state is JobState.RUNNING
    assert found.cancel_requested_at is not None
    assert store.stop_requests(lease).cancel
    assert store.heartbeat(lease, None).cancel
    store.cancel_done(lease)
    assert queries.get(lease.job_id).state is JobState.CANCELLED
    assert event_types(database, lease.job_id).count("cancel_requested") == 1


def test_work_that_was_done_before_the_cancel_arrived_counts(
    store: "JobStore", running_job_factory: Callable[..., Lease], queries: "Queries"
) -> None:
    lease = running_job_factory()
    store.request_cancel(lease.job_id)

    store.succeed(lease, {})

    assert queries.get(lease.job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize("ending", ["succeed", "cancel_done", "fail"])
def test_cancelling_an_ended_job_is_refused_and_says_how_it_ended(
    store: "JobStore", running_job_factory: Callable[..., Lease], ending: str
) -> None:
    act, state = SETTLE[ending]
    lease = running_job_factory()
    act(store, lease)

    with pytest.raises(InvalidTransitionError) as caught:
        store.request_cancel(lease.job_id)

    assert state in caught.value.message


def test_a_cancel_whose_commit_answer_was_lost_is_not_an_error(
    database: "Database", store: "JobStore", job_factory: "Callable[..., Job]"
) -> None:
    made = job_factory()

    with first_answer_lost(database):
        found = store.request_cancel(made.id)

    assert found.state is JobState.CANCELLED


def test_requests_for_a_job_that_does_not_exist_are_refused(store: "JobStore") -> None:
    with pytest.raises(JobNotFoundError):
        store.request_cancel(4711)
    with pytest.raises(JobNotFoundError):
        store.hold(4711, held=True)


def test_only_a_queued_job_can_be_held(store: "JobStore", running_job_factory: Callable[..., Lease]) -> None:
    lease = running_job_factory()
    with pytest.raises(InvalidTransitionError):
        store.hold(lease.job_id, held=True)


@pytest.mark.parametrize("action", ["release", "crashed", "fail", "fail later", "rescue"])
def test_a_job_that_was_to_be_cancelled_never_goes_back_to_the_queue(
    store: "JobStore", running_job_factory: Callable[..., Lease], queries: "Queries", action: str
) -> None:
    lease = running_job_factory()
    store.request_cancel(lease.job_id)

    if action == "rescue":
        store.requeue_lost(beat_of(store, lease.job_id), "silent")
    else:
        SETTLE[action][0](store, lease)

    found = queries.get(lease.job_id)
    assert found.state is JobState.CANCELLED
    assert found.finished_at is not None


# --- crashes and errors -----------------------------------------------------------------------


def test_crashes_back_off_and_the_third_without_progress_is_the_last(
    database: "Database",
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
    queries: "Queries",
) -> None:
    lease = running_job_factory()
    waits = []
    for _ in range(2):
        assert store.crashed(lease, "killed by signal 9") is JobState.QUEUED
        waits.append((queries.get(lease.job_id).not_before or 0) - queries.now())
        assert claim.or_none() is None
        set_columns(database, lease.job_id, not_before=None)
        lease = claim()

    assert store.crashed(lease, "killed by signal 9") is JobState.FAILED

    found = queries.get(lease.job_id)
    assert waits == [pytest.approx(2, abs=1), pytest.approx(10, abs=1)]
    assert (found.error_code, found.crash_count, found.attempt) == ("CRASH_LOOP", 3, 3)
    assert found.error_message == "killed by signal 9; 3 crashes without progress"
    assert outcomes(queries, lease.job_id) == [Outcome.CRASHED] * 3


def test_a_checkpoint_is_progress_and_begins_the_count_again(
    database: "Database",
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
    queries: "Queries",
) -> None:
    lease = running_job_factory()
    for step in range(5):
        checkpoint(store, lease, step)
        assert store.crashed(lease, "killed") is JobState.QUEUED
        assert queries.get(lease.job_id).crash_count == 1
        set_columns(database, lease.job_id, not_before=None)
        lease = claim()


def test_errors_of_the_surroundings_back_off_ever_longer_and_never_count(
    database: "Database",
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
    queries: "Queries",
) -> None:
    lease = running_job_factory()
    waits = []
    for _ in range(8):
        assert store.fail(lease, DiskFullError("no room left")) is JobState.QUEUED
        found = queries.get(lease.job_id)
        waits.append(round((found.not_before or 0) - queries.now()))
        assert (found.error_code, found.crash_count) == ("DISK_FULL", 0)
        set_columns(database, lease.job_id, not_before=None)
        lease = claim()

    assert waits == [pytest.approx(one, abs=1) for one in (2, 10, 30, 60, 60, 60, 60, 60)]
    assert outcomes(queries, lease.job_id) == [Outcome.RETRIED] * 8 + [None]
    assert queries.get(lease.job_id).error_code is None, "a new attempt begins without the old error"


def running(database: "Database", queries: "Queries", lease: Any) -> Lease:
    """The lease of a job's present attempt."""
    now = queries.get(lease.job_id)
    return Lease(now, now.attempt, job_row(database, now.id)["lease_token"])


def fail_again(
    database: "Database",
    store: "JobStore",
    claim: Claimer,
    lease: Any,
    error: Any,
    times: int,
) -> JobState:
    """Let an attempt fail, and those after it."""
    for _ in range(times):
        state = store.fail(lease, error)
        set_columns(database, lease.job_id, not_before=None)
        lease = claim.or_none() if state is JobState.QUEUED else None
    return state


def test_a_storage_error_that_no_wait_mends_is_tried_a_few_times_and_then_fails_the_job(
    database: "Database",
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
    queries: "Queries",
) -> None:
    lease = running_job_factory()
    lost = StorageError("jobs/000002: no such file or directory", hint="see ganq doctor")

    assert fail_again(database, store, claim, lease, lost, MAX_TRIES) is JobState.FAILED

    found = queries.get(lease.job_id)
    assert (found.error_code, found.error_hint) == ("STORAGE_ERROR", "see ganq doctor")
    assert outcomes(queries, lease.job_id) == [Outcome.RETRIED] * (MAX_TRIES - 1) + [Outcome.FAILED]


def test_a_volume_that_answers_with_errors_or_progress_in_between_begins_the_tries_again(
    database: "Database",
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
    queries: "Queries",
) -> None:
    lease = running_job_factory()
    lost, away = StorageError("no such file or directory"), VolumeError("input/output error")
    fail_again(database, store, claim, lease, away, 2 * MAX_TRIES)
    lease = running(database, queries, lease)
    assert fail_again(database, store, claim, lease, lost, MAX_TRIES - 1) is JobState.QUEUED
    lease = running(database, queries, lease)
    checkpoint(store, lease, step=1)
    assert fail_again(database, store, claim, lease, lost, MAX_TRIES - 1) is JobState.QUEUED


def test_out_of_memory_gets_one_fresh_process(
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
    queries: "Queries",
) -> None:
    lease = running_job_factory()

    assert store.fail(lease, OutOfMemoryError("CUDA out of memory")) is JobState.QUEUED
    lease = claim()
    assert store.fail(lease, OutOfMemoryError("CUDA out of memory")) is JobState.FAILED

    found = queries.get(lease.job_id)
    assert (found.state, found.error_code) == (JobState.FAILED, "OUT_OF_MEMORY")
    assert outcomes(queries, lease.job_id) == [Outcome.RETRIED, Outcome.FAILED]


def test_an_error_that_would_come_again_fails_at_once_and_says_why(
    store: "JobStore", running_job_factory: Callable[..., Lease], queries: "Queries"
) -> None:
    lease = running_job_factory()

    assert store.fail(lease, TrainingDivergedError("the loss is nan", hint="a lower --lr-d")) is (
        JobState.FAILED
    )

    found = queries.get(lease.job_id)
    assert (found.error_code, found.error_message, found.error_hint) == (
        "NAN_LOSS",
        "the loss is nan",
        "a lower --lr-d",
    )


@pytest.mark.parametrize("words", ["a\0b", "caf\udce9.png"])
def test_text_that_no_database_takes_does_not_keep_an_error_from_being_recorded(
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    make_identity: "Callable[..., WorkerIdentity]",
    queries: "Queries",
    words: str,
) -> None:
    lease = running_job_factory()
    store.fail(lease, TrainingDivergedError(f"bad {words}", hint=words))
    assert (queries.get(lease.job_id).error_message or "").startswith("bad ")

    other = running_job_factory(make_identity("w2"))
    store.crashed(other, words)
    assert queries.get(other.job_id).state is JobState.QUEUED


# --- recovery ---------------------------------------------------------------------------------


def test_an_unresponsive_job_is_requeued_without_a_count_against_it(
    database: "Database",
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
    queries: "Queries",
) -> None:
    lease = running_job_factory()

    assert store.requeue_lost(beat_of(store, lease.job_id), "silent for 60 s") is JobState.QUEUED

    found = queries.get(lease.job_id)
    assert (found.crash_count, found.not_before, found.worker) == (0, None, None)
    assert outcomes(queries, lease.job_id) == [Outcome.LOST]
    again = claim(make_identity("w2"))
    assert (again.job_id, again.attempt) == (lease.job_id, 2)
    assert event_types(database, lease.job_id) == ["submitted", "claimed", "lost", "claimed"]


def test_a_job_that_sent_a_heartbeat_meanwhile_is_not_requeued(
    store: "JobStore", running_job_factory: Callable[..., Lease], queries: "Queries"
) -> None:
    lease = running_job_factory()
    seen = beat_of(store, lease.job_id)
    store.heartbeat(lease, None)

    assert store.requeue_lost(seen, "silent") is None

    assert queries.get(lease.job_id).state is JobState.RUNNING
    store.heartbeat(lease, None)


def test_a_job_that_is_in_its_next_attempt_is_not_requeued(
    database: "Database",
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
) -> None:
    lease = running_job_factory()
    seen = beat_of(store, lease.job_id)
    store.release(lease, "drain")
    again = claim()
    set_columns(database, lease.job_id, hb_seq=seen.hb_seq)  # only the attempt tells them apart

    assert store.requeue_lost(seen, "silent") is None

    store.heartbeat(again, None)


def test_of_two_reapers_one_takes_the_job_back(
    database: "Database", store: "JobStore", running_job_factory: Callable[..., Lease]
) -> None:
    lease = running_job_factory()
    seen = beat_of(store, lease.job_id)

    assert [store.requeue_lost(seen, "silent") for _ in range(2)] == [JobState.QUEUED, None]

    assert event_types(database, lease.job_id).count("lost") == 1


def test_the_reaper_sees_running_jobs_and_their_owners(
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    job_factory: "Callable[..., Job]",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    lease = running_job_factory(make_identity("w9", pid=77, start_ticks=8, boot_id="b"))
    job_factory()

    (only,) = store.running()

    assert only == HeartbeatRow(lease.job_id, 1, lease.job.hb_seq, "testhost", "b", 77, 8, "w9")


def test_a_job_is_notified_once_and_no_more_than_wanted_at_once(
    database: "Database", store: "JobStore", job_factory: "Callable[..., Job]"
) -> None:
    low, high = job_factory(priority=1), job_factory(priority=5, queue="studio")
    job_factory(held=True)

    first, then = store.due_notifications(again_s=120, limit=1), store.due_notifications(again_s=120, limit=9)
    assert (len(first), len(then)) == (1, 1)
    assert {*first, *then} == {(high.id, "studio"), (low.id, "default")}
    assert store.due_notifications(again_s=120, limit=9) == []

    set_columns(database, low.id, rung_at=0.0)
    assert store.due_notifications(again_s=120, limit=9) == [(low.id, "default")]


def test_the_queue_is_read_for_notifications_only_while_a_worker_is_idle(
    database: "Database",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    worker_identity: "WorkerIdentity",
) -> None:
    job_factory()
    workers = WorkerStore(database, worker_identity)
    found = []
    for state in ("busy", "idle", "busy"):
        workers.report(state)
        found.append(store.any_to_notify(again_s=120, idle_within_s=30))
    assert found == [False, True, False]
    workers.report("idle")
    store.due_notifications(again_s=120, limit=9)
    assert not store.any_to_notify(again_s=120, idle_within_s=30), "it was notified"


def test_a_job_whose_submitter_notified_is_not_notified_again_at_once(
    store: "JobStore", job_factory: "Callable[..., Job]"
) -> None:
    made = job_factory(will_notify=True)
    assert store.due_notifications(again_s=120, limit=9) == []
    store.not_notified(made.id)  # Redis was away
    assert store.due_notifications(again_s=120, limit=9) == [(made.id, "default")]


@pytest.mark.parametrize("action", ["release", "crashed", "fail later"])
def test_a_job_back_in_the_queue_is_notified_for_as_soon_as_it_may_run(
    database: "Database", store: "JobStore", running_job_factory: Callable[..., Lease], action: str
) -> None:
    lease = running_job_factory(will_notify=True)
    SETTLE[action][0](store, lease)
    set_columns(database, lease.job_id, not_before=None)

    assert store.due_notifications(again_s=120, limit=9) == [(lease.job_id, "default")]


def test_a_job_that_waited_for_another_is_notified_for_when_it_is_free(
    store: "JobStore", running_job_factory: Callable[..., Lease], job_factory: "Callable[..., Job]"
) -> None:
    lease = running_job_factory()
    waiting = job_factory(after=[lease.job_id], will_notify=True)
    assert store.due_notifications(again_s=120, limit=9) == []

    store.succeed(lease, {})

    assert store.due_notifications(again_s=120, limit=9) == [(waiting.id, "default")]


# --- what the database itself holds -------------------------------------------------------------


@pytest.mark.parametrize("state", ["queued", "running", "failed"])
def test_no_sql_can_move_a_job_out_of_a_terminal_state(
    database: "Database",
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    queries: "Queries",
    state: str,
) -> None:
    lease = running_job_factory()
    store.succeed(lease, {})

    with pytest.raises(DBAPIError, match="a terminal state is final"):
        set_columns(database, lease.job_id, state=state)

    assert queries.get(lease.job_id).state is JobState.SUCCEEDED


def test_no_sql_can_change_an_event(database: "Database", job_factory: "Callable[..., Job]") -> None:
    made = job_factory()
    statement = text("UPDATE event SET type = 'forged' WHERE job_id = :id")

    with pytest.raises(DBAPIError, match="events are never changed"):
        database.write(lambda conn: conn.execute(statement, {"id": made.id}))

    assert event_types(database, made.id) == ["submitted"]


def test_no_sql_can_open_a_second_attempt(
    database: "Database", running_job_factory: Callable[..., Lease]
) -> None:
    lease = running_job_factory()
    statement = text(
        "INSERT INTO attempt (job_id, number, lease_token, worker, started_at) VALUES (:id, 2, 'x', 'w', 0)"
    )

    with pytest.raises(DBAPIError):
        database.write(lambda conn: conn.execute(statement, {"id": lease.job_id}))

    assert open_attempts(database, lease.job_id) == 1


# --- import -----------------------------------------------------------------------------------


def imported(store: "JobStore", files: Any) -> Any:
    return store.add_finished(
        kind="import", spec={"netg": "/g.pth"}, spec_version=1, user="u", name="faces", files=files
    )


def test_an_import_is_there_with_its_checkpoint_or_not_at_all(
    database: "Database", store: "JobStore", queries: "Queries"
) -> None:
    made = imported(store, lambda job_id: (f"jobs/{job_id:06d}/a1/c", "0" * 64, 12, 400))

    assert made.state is JobState.SUCCEEDED
    assert queries.choose_checkpoint(made.id, "400").path == f"jobs/{made.id:06d}/a1/c"

    def full(job_id: int) -> None:
        raise DiskFullError("no room left")

    with pytest.raises(DiskFullError):
        imported(store, full)
    assert sum(queries.counts().values()) == 1


def test_an_import_whose_commit_answer_was_lost_is_not_doubled(
    database: "Database", store: "JobStore", queries: "Queries"
) -> None:
    with first_answer_lost(database):
        made = imported(store, lambda job_id: (secrets.token_hex(4), "0" * 64, 12, 400))

    assert queries.counts()["succeeded"] == 1
    assert job_row(database, made.id)["name"] == "faces"
    assert len(queries.checkpoints(made.id)) == 1
