"""Submitting, claiming and holding a lease: on SQLite and on Postgres alike."""

import inspect
import multiprocessing
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from tables import (
    Claimer,
    beat_of,
    claim_all,
    event_types,
    everything_of,
    explained,
    first_answer_lost,
    job_row,
    recorded,
    set_columns,
)

from jobs.errors import JobNotFoundError, LeaseLostError, SpecError, TrainingDivergedError
from jobs.kinds import SPEC_VERSION
from jobs.states import JobState
from storage.db.postgres import USUAL_PLANS
from storage.db.schema import open_database
from storage.db.store import Claim, JobStore
from storage.db.store.waiting import fill_slots

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease, WorkerIdentity
    from storage.settings import Settings

# --- submit -----------------------------------------------------------------------------------


def test_an_accepted_job_is_queued_with_all_that_was_said(
    job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    made = job_factory(kind="generate", name="faces", priority=7, user="ada", queue="fast")

    found = queries.get(made.id)

    assert found == made
    assert (found.state, found.attempt, found.priority, found.user, found.queue) == (
        JobState.QUEUED,
        0,
        7,
        "ada",
        "fast",
    )
    assert found.spec == {"source": 1, "count": 4}
    assert [one.type for one in queries.events(made.id)] == ["submitted"]


def test_fifty_submits_with_one_key_make_one_job(
    job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    key = secrets.token_hex(16)
    start = threading.Barrier(50)

    def submit(_: int) -> int:
        start.wait()
        return job_factory(submit_key=key).id

    with ThreadPoolExecutor(50) as pool:
        ids = set(pool.map(submit, range(50)))

    assert len(ids) == 1
    assert queries.counts()["queued"] == 1
    assert [one.type for one in queries.events(ids.pop())] == ["submitted"]


def test_a_submit_whose_commit_answer_was_lost_is_not_doubled(
    database: "Database", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    with first_answer_lost(database):
        made = job_factory()

    assert queries.counts()["queued"] == 1
    assert event_types(database, made.id) == ["submitted"]


def test_names_and_users_with_sql_in_them_are_only_text(
    job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    nasty = "x'); DROP TABLE job; --"
    made = job_factory(name=nasty, user='a"b\\%_;')

    assert queries.find(nasty).id == made.id
    assert queries.get(made.id).user == 'a"b\\%_;'
    with pytest.raises(JobNotFoundError):
        queries.find("x' OR '1'='1")


@pytest.mark.parametrize("path", ["/caf\udce9", "/a\0b", "/ünï ☃"], ids=ascii)
def test_a_folder_with_any_name_survives_the_table(
    job_factory: "Callable[..., Job]", queries: "Queries", path: str
) -> None:
    made = job_factory(spec={"data": path})
    assert queries.get(made.id).spec == {"data": path}


# --- claim ------------------------------------------------------------------------------------


def test_claims_go_by_priority_then_age(job_factory: "Callable[..., Job]", claim: Claimer) -> None:
    low, first, second, high = (job_factory(priority=p).id for p in (-5, 0, 0, 9))

    order = [claim().job_id for _ in range(4)]

    assert order == [high, first, second, low]
    assert claim.or_none() is None


def test_a_claim_opens_an_attempt_with_the_workers_facts(
    database: "Database",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    queries: "Queries",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    made = job_factory()

    lease = claim(make_identity("w7", device="GPU-1", pid=4711, start_ticks=99))

    assert (lease.job_id, lease.attempt) == (made.id, 1)
    assert lease.job.state is JobState.RUNNING
    (only,) = queries.attempts(made.id)
    assert (only["number"], only["worker"], only["device"], only["pid"], only["start_ticks"]) == (
        1,
        "w7",
        "GPU-1",
        4711,
        99,
    )
    assert "lease_token" not in only
    assert event_types(database, made.id) == ["submitted", "claimed"]


def test_a_claim_whose_commit_answer_was_lost_takes_one_job(
    database: "Database",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    queries: "Queries",
) -> None:
    first, second = job_factory(), job_factory()

    with first_answer_lost(database):
        lease = claim()

    assert lease.job_id == first.id
    assert lease.token == job_row(database, first.id)["lease_token"]
    assert queries.get(second.id).state is JobState.QUEUED


def test_threads_never_claim_the_same_job(
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    wanted = {job_factory().id for _ in range(40)}

    def drain(number: int) -> list[int]:
        got = []
        while lease := claim.or_none(make_identity(f"w{number}")):
            got.append(lease.job_id)
        return got

    with ThreadPoolExecutor(8) as pool:
        got = [one for part in pool.map(drain, range(8)) for one in part]

    assert sorted(got) == sorted(wanted)


def test_eight_processes_share_fifty_jobs_without_a_double(
    settings: "Settings",
    job_factory: "Callable[..., Job]",
    make_identity: "Callable[..., WorkerIdentity]",
    tmp_path: Path,
    database: "Database",
    queries: "Queries",
) -> None:
    wanted = [job_factory().id for _ in range(50)]
    database.dispose()  # nothing of ours is open while the others begin
    spawn = multiprocessing.get_context("spawn")
    sinks = [tmp_path / f"got{n}" for n in range(8)]
    processes = [
        spawn.Process(target=claim_all, args=(settings, make_identity(f"p{n}"), sink))
        for n, sink in enumerate(sinks)
    ]
    for one in processes:
        one.start()
    for one in processes:
        one.join(60)

    assert [one.exitcode for one in processes] == [0] * 8
    got = [line.split() for sink in sinks for line in sink.read_text().splitlines()]
    assert sorted(int(job_id) for job_id, _, _ in got) == wanted
    for job_id, attempt, token in got:
        row = job_row(database, int(job_id))
        assert (row["attempt"], row["lease_token"]) == (int(attempt), token)
    assert queries.counts()["running"] == 50


def test_a_worker_leaves_queues_kinds_and_versions_that_are_not_its_own(
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    other_queue = job_factory(queue="studio", priority=9)
    newer = job_factory(spec_version=SPEC_VERSION + 1, priority=8)
    other_kind = job_factory(kind="generate", priority=7)
    ours = job_factory()

    assert claim(kinds=("train",)).job_id == ours.id
    assert claim.or_none(kinds=("train",)) is None
    assert claim(make_identity(queues=("default", "studio"))).job_id == other_queue.id
    assert claim().job_id == other_kind.id
    assert claim.or_none() is None
    assert claim(spec_version=SPEC_VERSION + 1).job_id == newer.id


def test_a_job_waits_until_its_time_has_come(
    database: "Database",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    queries: "Queries",
) -> None:
    made = job_factory()
    set_columns(database, made.id, not_before=queries.now() + 0.7)
    assert claim.or_none() is None

    time.sleep(0.8)

    assert claim().job_id == made.id
    assert queries.get(made.id).not_before is None


def test_a_held_job_is_not_claimed_until_it_is_let_go(
    database: "Database",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    made = job_factory()
    store.hold(made.id, held=True)
    store.hold(made.id, held=True)
    assert claim.or_none() is None

    store.hold(made.id, held=False)

    assert claim().job_id == made.id
    assert event_types(database, made.id) == ["submitted", "held", "hold_released", "claimed"]


def test_a_job_can_be_submitted_held(job_factory: "Callable[..., Job]", claim: Claimer) -> None:
    job_factory(held=True)
    assert claim.or_none() is None


def test_a_claim_among_20000_jobs_reads_the_partial_index(
    database: "Database",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    backend: str,
) -> None:
    first = job_factory()
    columns = (
        'submit_key, kind, queue, "user", priority, spec, spec_version, state, held, blockers, created_at'
    )
    number = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)"
        if backend == "sqlite"
        else "WITH n AS (SELECT generate_series(1, 20000) AS i)"
    )
    rows = "SELECT 'k' || i, 'train', 'default', 'u' || (i % 50), i % 7, '{}', 1, 'queued', 0, 0, 0 FROM n"
    if backend == "postgres":
        rows = rows.replace("'{}'", "'{}'::json")
    insert = f"{number} INSERT INTO job ({columns}) {rows}"
    database.write(lambda conn: conn.execute(text(insert)))
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(text("ANALYZE job"))

    with recorded(database) as seen:  # statement by statement, as on Postgres if there are quotas
        lease = database.write(Claim(claim.worker, ("train",), SPEC_VERSION).take)

    assert lease is not None
    assert lease.job_id > first.id  # of the highest priority
    looks = [(s, p) for s, p in seen if "FROM job" in s]
    assert len(looks) == 3, "a look, a count of what runs (if users take turns), and the claim"
    explain = "EXPLAIN QUERY PLAN " if backend == "sqlite" else "EXPLAIN "
    plans = [explained(database, s, p, explain=explain) for s, p in looks]
    assert sum("ix_job_claimable" in plan for plan in plans) >= 2
    for (statement, _), plan in zip(looks, plans, strict=True):
        if "GROUP BY" in statement:
            continue  # of the running jobs, by user
        assert "TEMP B-TREE" not in plan, "the whole queue is sorted at every claim"
        assert "Sort" not in plan, "the whole queue is sorted at every claim"
        assert "Seq Scan on job" not in plan, "the whole table is read at every claim"
        assert "SCAN job" not in plan.replace("SCAN job USING COVERING INDEX ix_job_running", "")
    if backend == "sqlite":
        assert "ix_job_state_id" not in plans[0], "the glance reads all that is queued"
    else:
        with recorded(database) as seen:
            claim()
        pages, scans = cost_of_claim(database, *only(seen))
        assert pages < 50 * 15, "each user's turn reads the index from its beginning"
        assert scans == 0, "the whole table is read at every claim"

    with recorded(database) as seen:  # of the highest priority, so that nothing is found
        store.stop_requests(replace(lease, job=replace(lease.job, preemptible=True)))
    ((sent, bound),) = [(s, p) for s, p in seen if "FROM job" in s]
    plan = explained(database, sent, bound, explain=explain)
    assert "ix_job_claimable" in plan
    for word in ("Seq Scan", "Bitmap", "Sort", "SCAN job", "TEMP B-TREE"):
        assert word not in plan, "the whole queue is read every second"

    with recorded(database) as seen:
        store.succeed(lease, {})
        store.due_in()
    for sent, bound in seen:
        if sent.lstrip().startswith("SELECT") and "FROM job" in sent:
            plan = explained(database, sent, bound, explain=explain)
            assert "ix_job_state_id" not in plan, f"all that is queued is read: {sent}"


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_claim_on_sqlite_keeps_to_its_indexes_whatever_the_statistics_say(
    database: "Database",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
    claim: Claimer,
    store: "JobStore",
) -> None:
    """The planner believes what ANALYZE found in another hour: by these figures, read the whole queue."""
    store.release(running_job_factory(), "preempt")
    for _ in range(3):
        job_factory()

    def mislead(conn: Any) -> None:
        conn.exec_driver_sql("ANALYZE")
        conn.exec_driver_sql("DELETE FROM sqlite_stat1 WHERE tbl = 'job'")
        for name in conn.exec_driver_sql("SELECT name FROM pragma_index_list('job')").scalars().all():
            columns = len(conn.exec_driver_sql(f"PRAGMA index_info('{name}')").all())
            found = "1" if name == "ix_job_state_id" else "100000"
            told = " ".join(["100000", *[found] * columns])
            conn.exec_driver_sql("INSERT INTO sqlite_stat1 VALUES ('job', ?, ?)", (name, told))

    database.write(mislead)
    database.dispose()
    with recorded(database) as seen:
        claim()
        store.due_in()
        claim.or_none()
    asked = [(sent, bound) for sent, bound in seen if "FROM job" in sent and "queue" in sent]
    assert len(asked) >= 4
    for sent, bound in asked:
        plan = explained(database, sent, bound)
        assert "ix_job_state_id" not in plan, sent
        assert any(f"ix_job_{name}" in plan for name in ("claimable", "yielded", "ripening")), sent


def only(sent: list[tuple[str, Any]]) -> tuple[str, Any]:
    (one,) = sent
    return one


def cost_of_claim(database: "Database", sent: str, bound: Any) -> tuple[int, int]:
    """Claim once more by a recorded call: pages that the database looked at, and scans of the whole table."""
    asked = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + sent
    scans = text("SELECT seq_scan FROM pg_stat_xact_user_tables WHERE relname = 'job'")

    def work(conn: Any) -> tuple[int, int]:
        ran = conn.exec_driver_sql(asked, bound).scalar_one()[0]["Plan"]
        return ran["Shared Hit Blocks"] + ran["Shared Read Blocks"], conn.execute(scans).scalar_one()

    return database.write(work)


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_what_a_claim_reads_of_running_jobs_does_not_grow_with_those_that_have_ended(
    database: "Database", worker_identity: "WorkerIdentity"
) -> None:
    """Each claim counts the running jobs, and until a vacuum the index also has those that ran before."""
    insert = (
        'INSERT INTO job (submit_key, kind, queue, "user", priority, spec, spec_version, state, created_at)'
        " SELECT 'k' || i, 'train', 'default', 'u' || (i % 2), 0,"
        " json_build_object('data', repeat('x', 1500)), 1, 'queued', 0"  # five jobs a block
        " FROM generate_series(1, 5000) AS i"
    )
    database.write(lambda conn: conn.execute(text(insert)))
    claimer = Claimer(JobStore(database), worker_identity)
    with recorded(database) as seen:
        lease = claimer()
    before, _ = cost_of_claim(database, *only(seen))

    for _ in range(300):
        claim = Claim(worker_identity, ("train",), SPEC_VERSION)
        following = claimer.store.succeed_and_claim(lease, {}, claim)
        assert following is not None
        lease = following

    after, _ = cost_of_claim(database, *only(seen))
    assert after < before + 60


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_the_statements_of_a_worker_are_planned_once(
    settings: "Settings", worker_identity: "WorkerIdentity", job_factory: "Callable[..., Job]"
) -> None:
    job_factory()
    database = open_database(settings, connections=2)
    store = JobStore(database)
    lease = Claimer(store, worker_identity)()
    for _ in range(20):
        store.heartbeat(lease, {"done": 1})
        store.stop_requests(lease)
    planned = text("SELECT sum(custom_plans), sum(generic_plans) FROM pg_prepared_statements")
    each_time, once = database.read(lambda conn: conn.execute(planned).one())
    database.dispose()
    assert (each_time, once >= 20) == (0, True)


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_what_runs_of_a_large_sweep_is_counted_without_reading_those_that_have_ended(
    settings: "Settings",
) -> None:
    database = open_database(settings, connections=2)
    insert = (
        'INSERT INTO job (submit_key, kind, queue, sweep, throttled, "user", priority, spec, spec_version,'
        " state, created_at) SELECT 'k' || i, 'train', 'default', 's', 0, 'u', 0, '{}'::json, 1,"
        " CASE WHEN i > 9990 THEN 'running' ELSE 'succeeded' END, 0 FROM generate_series(1, 10000) AS i"
    )
    database.write(lambda conn: conn.execute(text(insert)))
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(text("VACUUM ANALYZE job"))

    def count(conn: Any) -> tuple[str, int]:
        with recorded(database) as seen:
            assert fill_slots(conn, "s", 10) == 0
        ((counting, bound),) = [(sent, bound) for sent, bound in seen if "count(*)" in sent]
        afterwards = conn.exec_driver_sql("SHOW enable_bitmapscan").scalar_one()
        conn.exec_driver_sql(USUAL_PLANS)
        asked = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + counting
        ran = conn.exec_driver_sql(asked, bound).scalar_one()[0]["Plan"]
        assert USUAL_PLANS in [sent for sent, _ in seen]
        return afterwards, ran["Shared Hit Blocks"] + ran["Shared Read Blocks"]

    afterwards, blocks = database.write(count)
    database.dispose()
    assert afterwards == "off", "the settings of the worker are restored"
    assert blocks < 60


# --- the lease --------------------------------------------------------------------------------


def test_a_heartbeat_counts_up_and_carries_progress(
    store: "JobStore", running_job_factory: "Callable[..., Lease]", queries: "Queries"
) -> None:
    lease = running_job_factory()
    before = queries.get(lease.job_id).hb_seq

    stop_requests = store.heartbeat(lease, {"done": 3, "total": 9})
    store.heartbeat(lease, None)

    found = queries.get(lease.job_id)
    assert found.hb_seq == before + 2
    assert found.progress == {"done": 3, "total": 9}
    assert stop_requests.cancel is False


def test_inputs_are_pinned_for_all_attempts(
    store: "JobStore", running_job_factory: "Callable[..., Lease]", claim: Claimer
) -> None:
    lease = running_job_factory()
    pin = {"checkpoint_id": register(store, lease, 1)}
    assert store.pin_inputs(lease, pin) == pin
    store.release(lease, "drain")

    assert claim().job.inputs == pin


def test_what_a_checkpoint_was_measured_is_in_its_row_and_makes_it_the_best(
    store: "JobStore", queries: "Queries", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    for epoch, metric in ((1, 0.5), (2, 0.25), (3, None)):
        register(store, lease, epoch, metric=metric)
    assert [one.metric for one in queries.checkpoints(lease.job_id)] == [0.5, 0.25, None]
    assert queries.choose_checkpoint(lease.job_id, "best").epoch == 2


def register(store: "JobStore", lease: Any, epoch: int, **changes: Any) -> int:
    values = {
        "kind": "epoch",
        "epoch": epoch,
        "step": epoch * 10,
        "path": f"jobs/{lease.job_id:06d}/a{lease.attempt}/checkpoints/epoch-{epoch:04d}",
        "manifest_sha256": "0" * 64,
        "size": 1000,
    }
    return store.register_checkpoint(lease, **{**values, **changes})


STALE: "dict[str, Callable[[JobStore, Lease], Any]]" = {
    "heartbeat": lambda store, lease: store.heartbeat(lease, {"done": 99}),
    "wishes": lambda store, lease: store.stop_requests(lease),
    "pin_inputs": lambda store, lease: store.pin_inputs(lease, {"checkpoint_id": 99}),
    "checkpoint": lambda store, lease: register(store, lease, 99),
    "forget_checkpoints": lambda store, lease: store.forget_checkpoints(lease, [1]),
    "succeed": lambda store, lease: store.succeed(lease, {"image_count": 99}),
    "cancel_done": lambda store, lease: store.cancel_done(lease),
    "fail": lambda store, lease: store.fail(lease, TrainingDivergedError("the loss is nan")),
    "crashed": lambda store, lease: store.crashed(lease, "killed"),
    "release": lambda store, lease: store.release(lease, "drain"),
}


@pytest.mark.parametrize("claimed_again", [False, True], ids=["queued", "running again"])
@pytest.mark.parametrize("action", STALE)
def test_a_stale_lease_changes_nothing(
    database: "Database",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
    action: Any,
    claimed_again: bool,
) -> None:
    stale = running_job_factory()
    register(store, stale, 1)
    store.requeue_lost(beat_of(store, stale.job_id), "silent")
    if claimed_again:
        assert claim(make_identity("w2")).job_id == stale.job_id
    before = everything_of(database, stale.job_id)

    with pytest.raises(LeaseLostError) as caught:
        STALE[action](store, stale)

    assert caught.value.job_id == stale.job_id
    assert everything_of(database, stale.job_id) == before


def test_the_right_attempt_with_a_wrong_token_changes_nothing(
    database: "Database", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    forged = type(lease)(lease.job, lease.attempt, "0" * 32)
    before = everything_of(database, lease.job_id)

    for action in STALE.values():
        with pytest.raises(LeaseLostError):
            action(store, forged)

    assert everything_of(database, lease.job_id) == before


# --- checkpoints ------------------------------------------------------------------------------


def test_a_checkpoint_is_registered_once_however_often_it_is_reported(
    database: "Database", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()

    with first_answer_lost(database):
        once = register(store, lease, 5)

    assert register(store, lease, 5) == once
    assert event_types(database, lease.job_id).count("checkpoint") == 1


def test_forgetting_spares_pinned_checkpoints_and_those_of_other_jobs(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
    queries: "Queries",
) -> None:
    lease = running_job_factory()
    old, pinned, kept = (register(store, lease, epoch) for epoch in (1, 2, 3))
    other = running_job_factory(make_identity("w2"))
    foreign = register(store, other, 1)
    reader = running_job_factory(make_identity("w3"), kind="generate")
    store.pin_inputs(reader, {"checkpoint_id": pinned})

    going = store.forget_checkpoints(lease, [old, pinned, foreign])

    assert [one.id for one in going] == [old]
    assert [one.id for one in queries.checkpoints(lease.job_id)] == [pinned, kept]
    assert [one.id for one in queries.checkpoints(other.job_id)] == [foreign]


def test_all_of_several_pinned_checkpoints_stay_or_nothing_is_pinned(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    make_identity: "Callable[..., WorkerIdentity]",
    queries: "Queries",
) -> None:
    lease = running_job_factory()
    one, two, three = (register(store, lease, epoch) for epoch in (1, 2, 3))
    reader = running_job_factory(make_identity("w3"), kind="generate")
    store.pin_inputs(reader, {"checkpoint_ids": [one, two]})
    assert store.pin_inputs(reader, {"checkpoint_ids": [one, 999]}) is None

    assert [gone.id for gone in store.forget_checkpoints(lease, [one, two, three])] == [three]


# --- dependencies -----------------------------------------------------------------------------


def test_a_job_waits_until_all_it_needs_have_succeeded(
    database: "Database",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    make_identity: "Callable[..., WorkerIdentity]",
    queries: "Queries",
) -> None:
    one, two = running_job_factory(), running_job_factory(make_identity("w2"))
    waiting = job_factory(after=[two.job_id, one.job_id])
    assert claim.or_none() is None
    assert queries.needs(waiting.id) == [(one.job_id, JobState.RUNNING), (two.job_id, JobState.RUNNING)]

    store.succeed(one, {})
    assert claim.or_none() is None
    store.succeed(two, {})

    assert claim().job_id == waiting.id


def test_naming_the_same_need_twice_waits_for_it_once(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    lease = running_job_factory()
    waiting = job_factory(after=[lease.job_id, lease.job_id])

    store.succeed(lease, {})

    assert claim().job_id == waiting.id


def test_a_job_after_one_that_has_succeeded_is_free_at_once(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    lease = running_job_factory()
    store.succeed(lease, {})
    waiting = job_factory(after=[lease.job_id])

    assert claim().job_id == waiting.id


def test_failure_ends_the_whole_chain_with_its_reason(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
) -> None:
    lease = running_job_factory()
    child = job_factory(after=[lease.job_id])
    grandchild = job_factory(after=[child.id])

    store.fail(lease, TrainingDivergedError("the loss is nan"))

    assert queries.get(child.id).state is JobState.FAILED
    assert queries.get(child.id).error_code == "DEPENDENCY_FAILED"
    assert f"job {child.id}," in (queries.get(grandchild.id).error_message or "")


def test_cancelling_ends_the_whole_chain_as_cancelled(
    store: "JobStore", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    first = job_factory()
    child = job_factory(after=[first.id])
    grandchild = job_factory(after=[child.id])

    store.request_cancel(first.id)

    assert [queries.get(one.id).state for one in (child, grandchild)] == [JobState.CANCELLED] * 2
    assert queries.get(child.id).error_message == f"job {first.id}, on which it depends, has been cancelled"


def test_a_job_that_needs_both_a_job_and_its_dependant_ends_once(
    database: "Database",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
) -> None:
    lease = running_job_factory()
    child = job_factory(after=[lease.job_id])
    both = job_factory(after=[lease.job_id, child.id])

    store.fail(lease, TrainingDivergedError("the loss is nan"))

    assert queries.get(both.id).state is JobState.FAILED
    assert event_types(database, both.id) == ["submitted", "failed"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_chain_longer_than_the_stack_ends_too(
    store: "JobStore", job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    first = last = job_factory()
    for _ in range(400):
        last = job_factory(after=[last.id])

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 300)
    try:
        store.request_cancel(first.id)
    finally:
        sys.setrecursionlimit(limit)

    assert queries.get(last.id).state is JobState.CANCELLED


@pytest.mark.parametrize("ending", ["failed", "cancelled"])
def test_a_job_after_one_that_will_never_succeed_is_refused(
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    queries: "Queries",
    ending: str,
) -> None:
    lease = running_job_factory()
    if ending == "failed":
        store.fail(lease, TrainingDivergedError("the loss is nan"))
    else:
        store.cancel_done(lease)

    with pytest.raises(SpecError) as caught:
        job_factory(after=[lease.job_id])

    assert "would never run" in caught.value.message
    assert f"ganq retry {lease.job_id}" in (caught.value.hint or "")
    assert queries.counts()["queued"] == 0


def test_a_job_after_one_that_does_not_exist_is_refused(
    job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    with pytest.raises(JobNotFoundError):
        job_factory(after=[4711])
    assert Counter(queries.counts()).total() == 0
