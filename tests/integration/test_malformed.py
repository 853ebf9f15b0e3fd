"""Rows of the job table that no ganq wrote: they fail, are shown, and keep no other job waiting."""

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from machine import Ganq, until
from sqlalchemy import text
from tables import Claimer, job_row, set_columns

from jobs.errors import SpecError
from jobs.kinds import SPEC_VERSION
from jobs.states import JobState
from storage.db.workers import WorkerStore
from worker.supervisor.assignment import make_assignment
from worker.supervisor.reaper import Reaper, Recovery

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease, WorkerIdentity
    from storage.db.store import JobStore
    from storage.settings import Settings
    from storage.volume.layout import Volume

GOOD = {
    "submit_key": "",
    "kind": "train",
    "queue": "default",
    "user": "tester",
    "priority": 0,
    "spec": '{"data": "/pictures"}',
    "spec_version": SPEC_VERSION,
    "state": "queued",
    "created_at": 1.7e9,
}
ANYWHERE: dict[str, dict[str, Any]] = {
    "a spec that is a list": {"spec": "[1, 2]"},
    "a spec that is a string": {"spec": '"data"'},
    "a spec that is null": {"spec": "null"},
    "a spec without what the kind needs": {"kind": "generate", "spec": "{}"},
    "a source that is no job": {"kind": "generate", "spec": '{"source": "abc", "checkpoint": "best"}'},
    "a kind that does not exist": {"kind": "paint"},
    "a kind that no worker runs": {"kind": "import"},
    "inputs that are a list": {"inputs": "[1]"},
    "a progress that is a string": {"progress": '"half"'},
    "a result that is a number": {"result": "7"},
}
ON_SQLITE: dict[str, dict[str, Any]] = {
    "a spec that is no JSON": {"spec": '{"data": '},
    "text for a priority": {"priority": "high"},
    "text for an attempt": {"attempt": "first"},
    "text for a spec version": {"spec_version": "two"},
    "text for held": {"held": "no"},
    "text for blockers": {"blockers": "none"},
    "text for a time": {"created_at": "yesterday"},
    "text for a time to wait for": {"not_before": "tomorrow"},
    "text for a time limit": {"time_limit_s": "1h"},
    "text for seconds": {"ran_s": "many"},
    "text for counters": {
        "crash_count": "x",
        "waits": "x",
        "fresh_retries": "x",
        "yields": "x",
        "hb_seq": "x",
    },
    "bytes for a user": {"user": b"ada"},
}
ALL = ANYWHERE | ON_SQLITE


def insert(database: Any, **values: Any) -> int:
    row = {**GOOD, "submit_key": secrets.token_hex(16), **values}
    columns = ", ".join(f'"{name}"' for name in row)
    given = ", ".join(f":{name}" for name in row)
    statement = text(f"INSERT INTO job ({columns}) VALUES ({given}) RETURNING id")
    return int(database.write(lambda conn: conn.execute(statement, row).scalar_one()))


@pytest.fixture(params=ALL)
def malformed(request: pytest.FixtureRequest, backend: str, database: Any) -> int:
    if backend == "postgres" and request.param in ON_SQLITE:
        pytest.skip("Postgres refuses it")
    return insert(database, **ALL[request.param])


def work_on_all(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    settings: "Settings",
    claim: Claimer,
    worker_identity: Any,
) -> list[int]:
    """What recovery and the main loop do of it, without a runner; returns what would have been run."""
    recovery = Recovery(
        database,
        settings,
        WorkerStore(database, worker_identity),
        lambda *_: None,
        lambda: None,
        lambda _: None,
    )
    ran = []
    for _ in range(2):
        recovery.reaper.tick()
        recovery.fail_malformed()
        recovery.dispatch()
        while (lease := claim.or_none()) is not None:
            try:
                make_assignment(lease, store, queries)
            except SpecError as exc:
                store.fail(lease, exc)
            else:
                ran.append(lease.job_id)
                store.succeed(lease, {})
    return ran


def test_it_fails_with_bad_spec_and_the_other_jobs_continue(
    malformed: int,
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    settings: "Settings",
    claim: Claimer,
    job_factory: "Callable[..., Job]",
    worker_identity: "WorkerIdentity",
) -> None:
    others = [job_factory().id, job_factory(priority=5).id]

    assert sorted(work_on_all(database, store, queries, settings, claim, worker_identity)) == sorted(others)

    found = queries.get(malformed)
    assert (found.state, found.error_code) == (JobState.FAILED, "BAD_SPEC")
    assert found.error_message
    assert all(queries.get(one).state is JobState.SUCCEEDED for one in others)


def test_a_kind_or_a_spec_of_a_newer_version_waits(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    settings: "Settings",
    claim: Claimer,
    worker_identity: "WorkerIdentity",
) -> None:
    newer = insert(database, kind="paint", spec_version=SPEC_VERSION + 1)
    assert work_on_all(database, store, queries, settings, claim, worker_identity) == []
    assert queries.get(newer).state is JobState.QUEUED
    assert queries.get(newer).malformed is None


def test_a_job_that_waits_for_it_ends_with_it(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    settings: "Settings",
    claim: Claimer,
    job_factory: "Callable[..., Job]",
    worker_identity: "WorkerIdentity",
) -> None:
    bad = insert(database, kind="paint")
    waiting = job_factory(after=[bad])
    work_on_all(database, store, queries, settings, claim, worker_identity)
    assert queries.get(waiting.id).error_code == "DEPENDENCY_FAILED"


def test_only_new_rows_are_looked_at_again(
    database: "Database", store: "JobStore", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.db.store.malformed.LATE", 0)
    insert(database)
    failed, after = store.fail_malformed(0)
    assert failed == []
    bad = insert(database, kind="paint")
    assert store.fail_malformed(after) == ([bad], bad)


@pytest.mark.parametrize("state", ["running", "queued"])
def test_a_job_whose_state_was_changed_by_hand_is_run_again(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    settings: "Settings",
    claim: Claimer,
    running_job_factory: "Callable[..., Lease]",
    state: str,
) -> None:
    """Running without an attempt; or queued while its attempt is open, at which each claim would break."""
    if state == "running":
        job = insert(database, state="running")
        reaper = Reaper(store, settings)
        reaper.tick(now=100.0)
        for second in range(1, 5):
            reaper.tick(now=100.0 + second * settings.lease_seconds / 4)
        assert queries.get(job).state is JobState.QUEUED
    else:
        job = running_job_factory().job_id
        set_columns(database, job, state="queued", attempt=0)
    lease = claim()
    assert lease is not None
    assert lease.job_id == job
    store.succeed(lease, {})
    assert queries.get(job).state is JobState.SUCCEEDED


def test_one_running_row_that_cannot_be_requeued_keeps_no_other_from_it(
    backend: str,
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    settings: "Settings",
    running_job_factory: "Callable[..., Lease]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, good = running_job_factory(), running_job_factory()
    reaper = Reaper(store, settings)
    reaper.boot = "another machine"
    requeue_lost = store.requeue_lost

    def break_at_the_first(beat: Any, why: str, **how: Any) -> Any:
        if beat.job_id == bad.job_id:
            raise TypeError("a row that no ganq wrote")
        return requeue_lost(beat, why, **how)

    monkeypatch.setattr(store, "requeue_lost", break_at_the_first)
    for second in range(6):
        reaper.tick(now=100.0 + second * settings.lease_seconds / 4)
    assert queries.get(good.job_id).state is JobState.QUEUED


def test_retention_reads_past_it(
    malformed: int, database: "Database", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    """Which checkpoints others need is asked of all queued jobs' specs."""
    lease = running_job_factory()
    ids = [
        store.register_checkpoint(
            lease, kind="epoch", epoch=epoch, step=epoch, path=f"a1/{epoch}", manifest_sha256="0" * 64, size=1
        )
        for epoch in (1, 2)
    ]
    assert [one.id for one in store.forget_checkpoints(lease, ids)] == ids


COMMANDS = (
    ("status",),
    ("status", "--json"),
    ("status", "--all"),
    ("status", "JOB"),
    ("status", "JOB", "--json"),
    ("status", "JOB", "--parts"),
    ("wait", "JOB", "--timeout", "0.1"),
    ("compare", "JOB"),
    ("compare",),
    ("events", "JOB"),
    ("logs", "JOB"),
    ("open", "JOB"),
    ("checkpoints", "JOB"),
    ("gc", "--dry-run", "--jobs", "--older-than", "30d"),
    ("retry", "JOB"),
    ("submit", "generate", "--from", "JOB", "--count", "4", "--dry-run"),
    ("submit", "evaluate", "JOB", "--dry-run"),
    ("hold", "JOB"),
    ("workers",),
    ("doctor",),
    ("cancel", "JOB"),
    ("retry", "JOB"),
)


def test_every_command_says_a_line_and_none_a_traceback(
    malformed: int,
    queries: "Queries",
    settings_env: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    volume: "Volume",
) -> None:
    from cli.main import main

    for command in COMMANDS:
        words = [str(malformed) if word == "JOB" else word for word in command]
        code = main(words)
        said = capsys.readouterr()
        assert "defect" not in said.err, (words, said.err)
        assert "Traceback" not in said.err + said.out
        assert code in (0, 1, 2, 3, 124), words
        if command == ("status", "JOB") or command == ("doctor",):
            phrases = ("was not written by ganq", "ganq did not write the row of job")
            named = any(phrase in said.out for phrase in phrases)
            assert (queries.get(malformed).malformed is not None) == named, said.out


@pytest.mark.slow
def test_a_worker_fails_what_it_did_not_write_and_runs_the_rest(
    ganq: Ganq, small: list[str], backend: str
) -> None:
    bad = [insert(ganq.table, **one) for one in (ALL if backend == "sqlite" else ANYWHERE).values()]
    worker = ganq.start_worker()
    good = ganq.json("submit", "train", *small, "--epochs", "1")["id"]
    assert ganq.run("wait", str(good), "--timeout", "60").returncode == 0
    until(
        lambda: all(job_row(ganq.table, one)["state"] == "failed" for one in bad),
        what="their ends",
        within_s=20,
    )
    assert {job_row(ganq.table, one)["error_code"] for one in bad} == {"BAD_SPEC"}
    assert "Traceback" not in ganq.log()
    assert "supervisor has ended" not in ganq.log()
    assert worker.poll() is None
