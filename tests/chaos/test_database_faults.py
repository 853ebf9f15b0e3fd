"""
The database fails in every way: F17–F22 of the fault matrix.

Restarts while jobs run, answers that are lost after the commit, a standby that takes over
and lacks the last commits, a network that is away, a file that is locked, deleted or on a
full disk. After each: one terminal state, one open attempt at most, nothing accepted lost.
"""

import ctypes
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import make_settings
from machine import LATER, Ganq, part, until
from services import Postgres, free_port, postgres_binaries
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from tables import Claimer, beat_of, event_types, job_row, open_attempts, set_columns

from jobs.errors import ConfigError, DatabaseUnavailableError, DiskFullError
from jobs.kinds import SPEC_VERSION
from jobs.states import JobState
from storage.db.engine import Database
from storage.db.queries import Queries
from storage.db.schema import open_database
from storage.db.sqlite import Wal
from storage.db.store import Claim, JobStore
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.db.rows import Job, Lease, WorkerIdentity

sys.path.insert(0, str(Path(__file__).parent))
from chaos.proxy import Proxy

only_sqlite = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
only_postgres = pytest.mark.parametrize("backend", ["postgres"], indirect=True)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
SPEC = {"data": "/pictures"}


def submit(store: JobStore, key: str = "k", **changes: Any) -> Any:
    values = {"kind": "train", "spec": SPEC, "spec_version": SPEC_VERSION, "user": "tester"}
    return store.submit(submit_key=key, **{**values, **changes})


# --- F18: the answer to a commit is lost --------------------------------------------------------


@pytest.fixture
def proxy(postgres: Postgres) -> Iterator[Proxy]:
    with Proxy(postgres.port) as between:
        yield between


@pytest.fixture
def through(settings: Settings, postgres: Postgres, proxy: Proxy) -> Iterator[JobStore]:
    """Return a store whose connection passes through the proxy."""
    name = settings.database_url.partition("@/")[2].partition("?")[0]
    url = f"postgresql+psycopg://ganq:{postgres.password}@127.0.0.1:{proxy.port}/{name}"
    database = Database(make_settings(settings.home, url))
    yield JobStore(database)
    database.dispose()


ENDINGS: dict[str, tuple[Callable[[JobStore, Any], Any], JobState, list[str]]] = {
    "succeed": (lambda s, one: s.succeed(one, {"final": 1}), JobState.SUCCEEDED, ["succeeded"]),
    "release": (lambda s, one: s.release(one, "drain"), JobState.QUEUED, ["requeued"]),
    "fail": (lambda s, one: s.fail(one, DiskFullError("no room")), JobState.QUEUED, ["retried"]),
    "crash": (lambda s, one: s.crashed(one, "killed"), JobState.QUEUED, ["crashed"]),
    "cancel_done": (lambda s, one: s.cancel_done(one), JobState.CANCELLED, ["cancelled"]),
}


@only_postgres
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_end_whose_answer_was_lost_is_recognised(
    database: Database,
    queries: Queries,
    running_job_factory: "Callable[..., Lease]",
    through: JobStore,
    proxy: Proxy,
    ending: Any,
) -> None:
    act, state, events = ENDINGS[ending]
    lease = running_job_factory()
    proxy.lose_reply_to(b"COMMIT")

    act(through, lease)

    assert proxy.lost == 1, "the commit was not met"
    found = queries.get(lease.job_id)
    assert (found.state, found.attempt, found.crash_count) == (state, 1, int(ending == "crash"))
    assert event_types(database, lease.job_id) == ["submitted", "claimed", *events]
    assert open_attempts(database, lease.job_id) == 0


@only_postgres
def test_a_submit_whose_answer_was_lost_is_not_doubled(
    database: Database, queries: Queries, through: JobStore, proxy: Proxy
) -> None:
    proxy.lose_reply_to(b"INSERT INTO job")

    made = submit(through)

    assert proxy.lost == 1
    assert sum(queries.counts().values()) == 1
    assert event_types(database, made.id) == ["submitted"]


@only_postgres
def test_a_claim_whose_answer_was_lost_is_the_claimers(
    database: Database, store: JobStore, through: JobStore, proxy: Proxy, worker_identity: "WorkerIdentity"
) -> None:
    made = submit(store)
    proxy.lose_reply_to(b"ganq_claim")

    lease = through.claim(worker_identity, kinds=("train",), spec_version=SPEC_VERSION)

    assert proxy.lost == 1
    assert lease is not None
    assert (lease.job_id, lease.attempt) == (made.id, 1)
    assert event_types(database, made.id) == ["submitted", "claimed"]
    through.heartbeat(lease, None)


@only_postgres
def test_a_heartbeat_and_a_checkpoint_whose_answers_were_lost_count_once(
    database: Database,
    queries: Queries,
    running_job_factory: "Callable[..., Lease]",
    through: JobStore,
    proxy: Proxy,
) -> None:
    lease = running_job_factory()
    before = job_row(database, lease.job_id)["hb_seq"]
    proxy.lose_reply_to(b"UPDATE job")
    proxy.lose_reply_to(b"COMMIT")
    through.heartbeat(lease, {"done": 1})
    kept = through.register_checkpoint(
        lease, kind="epoch", epoch=1, step=1, path="a1/x", manifest_sha256="0" * 64, size=1
    )

    assert proxy.lost == 2
    assert job_row(database, lease.job_id)["hb_seq"] > before
    assert [one.id for one in queries.checkpoints(lease.job_id)] == [kept]
    assert event_types(database, lease.job_id).count("checkpoint") == 1


@only_postgres
@pytest.mark.parametrize("running", [False, True])
def test_a_cancel_whose_answer_was_lost_is_not_an_error(
    database: Database,
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
    through: JobStore,
    proxy: Proxy,
    running: bool,
) -> None:
    wanted = running_job_factory().job_id if running else job_factory().id
    proxy.lose_reply_to(b"COMMIT")

    found = through.request_cancel(wanted)

    assert proxy.lost == 1
    assert found.state is (JobState.RUNNING if running else JobState.CANCELLED)
    assert event_types(database, wanted).count("cancel_requested") == 1


@only_postgres
def test_a_release_whose_answer_was_lost_is_not_an_error_though_the_job_was_claimed(
    database: Database,
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    through: JobStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = job_factory(held=True)
    real = through.database.engine

    class ClaimedBeforeTheSecondTry:
        tries = 0

        @contextmanager
        def begin(self) -> Iterator[Any]:
            self.tries += 1
            with real.begin() as conn:
                yield conn
            if self.tries == 1:
                claim()
                raise OperationalError("COMMIT", {}, Exception("gone"), connection_invalidated=True)

    monkeypatch.setattr(through.database, "engine", ClaimedBeforeTheSecondTry())
    found = through.hold(made.id, held=False)
    monkeypatch.undo()
    assert found.state is JobState.RUNNING
    assert event_types(database, made.id).count("hold_released") == 1


@only_postgres
def test_a_finish_that_another_attempt_overtook_meanwhile_is_lost_not_done(
    store: JobStore, running_job_factory: "Callable[..., Lease]", through: JobStore, proxy: Proxy
) -> None:
    """The answer is lost, and another worker has the job before the row is read again: the fence holds."""
    from jobs.errors import LeaseLostError

    lease = running_job_factory()
    store.requeue_lost(beat_of(store, lease.job_id), "silent")
    proxy.lose_reply_to(b"ROLLBACK")
    with pytest.raises(LeaseLostError):
        through.succeed(lease, {})


# --- trips to Postgres --------------------------------------------------------------------------


@only_postgres
def test_postgres_is_asked_no_oftener_than_must_be(
    through: JobStore, proxy: Proxy, worker_identity: "WorkerIdentity"
) -> None:
    """Each round trip adds latency, and the database is on another machine."""

    def trips(act: Callable[[], Any]) -> tuple[int, Any]:
        before = proxy.asked
        found = act()
        return proxy.asked - before, found

    submit(through, "opens the connection")
    claim = partial(through.claim, worker_identity, kinds=("train",), spec_version=SPEC_VERSION)
    asked: dict[str, int] = {}
    asked["submit"], _ = trips(lambda: submit(through, "second"))
    asked["claim"], lease = trips(claim)
    asked["beat"], _ = trips(lambda: through.heartbeat(lease, {"done": 1}))
    asked["stop requests"], _ = trips(lambda: through.stop_requests(lease))
    asked["end"], _ = trips(lambda: through.succeed(lease, {}))
    submit(through, "third")
    next_one = Claim(worker_identity, ("train",), SPEC_VERSION)
    _, lease = trips(claim)
    pass_on = partial(through.succeed_and_claim, lease, {}, next_one)
    asked["end and claim"], lease = trips(pass_on)
    through.succeed(lease, {})
    asked["claim of nothing"], _ = trips(claim)
    submit(through, "fourth"), submit(through, "fifth")
    set_columns(through.database, submit(through, "waits for its retry").id, not_before=2e9)
    claim()  # and observes the delayed job, which is new
    asked["claim beside a delayed job"], lease = trips(claim)
    assert lease is not None
    # Of an end without a claim: BEGIN, all that changes, who waited for it, COMMIT. Beside a delayed job: the
    # function, which does nothing, and a transaction with the look, the claim, the attempt and the event.
    kept = {"submit": 1, "claim": 1, "beat": 1, "stop requests": 1, "end": 4, "end and claim": 1}
    assert asked == {**kept, "claim of nothing": 1, "claim beside a delayed job": 7}


@only_postgres
def test_the_connection_that_was_used_last_is_used_next(database: Database) -> None:
    def pids(number: int) -> list[int]:
        with ExitStack() as all_at_once:
            held = [all_at_once.enter_context(database.engine.connect()) for _ in range(number)]
            return [one.execute(text("SELECT pg_backend_pid()")).scalar_one() for one in held]

    three = pids(3)  # released from the last to the first
    assert pids(1) == pids(1) == three[:1]


@only_postgres
def test_a_migration_waits_for_the_claims_that_have_read_the_schema(
    database: Database, job_factory: "Callable[..., Job]", worker_identity: "WorkerIdentity"
) -> None:
    made = job_factory()
    next_one = Claim(worker_identity, ("train",), SPEC_VERSION)
    with database.engine.begin() as claiming:
        lease = next_one.take_plain(claiming)
        with database.engine.begin() as migrating, pytest.raises(OperationalError, match="could not obtain"):
            migrating.execute(text("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE NOWAIT"))
    assert lease is not None
    assert lease.job_id == made.id


# --- the timeouts of Postgres -------------------------------------------------------------------


@only_postgres
def test_the_timeouts_of_a_connection_are_in_force(database: Database) -> None:
    ask = "SELECT name, setting FROM pg_settings WHERE name IN ('lock_timeout', 'statement_timeout',"
    ask += " 'idle_in_transaction_session_timeout')"
    found = dict(map(tuple, database.read(lambda conn: conn.execute(text(ask)).all())))
    assert found == {
        "lock_timeout": "5000",
        "statement_timeout": "30000",
        "idle_in_transaction_session_timeout": "30000",
    }


@only_postgres
def test_a_row_that_is_locked_for_ever_is_reported_and_not_waited_for(
    database: Database, job_factory: "Callable[..., Job]"
) -> None:
    made = job_factory()
    holder = database.engine.connect()
    holder.execute(text("SELECT 1 FROM job FOR UPDATE"))
    begun = time.monotonic()
    touch = text("UPDATE job SET priority = 1 WHERE id = :id")
    with pytest.raises(DatabaseUnavailableError) as caught:
        database.write(lambda conn: conn.execute(touch, {"id": made.id}), patience_s=1.0)
    assert 4 < time.monotonic() - begun < 9
    assert "lock timeout" in str(caught.value)
    holder.close()


@only_postgres
def test_a_read_only_server_is_waited_for_like_an_unavailable_one(
    database: Database, postgres: Postgres, queries: Queries, job_factory: "Callable[..., Job]"
) -> None:
    """A standby before its promotion, or a primary that was demoted."""
    made = job_factory()
    name = str(database.engine.url.database)
    postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    database.engine.dispose()
    touch = text("UPDATE job SET priority = 7")
    with pytest.raises(DatabaseUnavailableError) as caught:
        database.write(lambda conn: conn.execute(touch), patience_s=0.5)
    assert "read-only" in str(caught.value)
    promoting = threading.Timer(
        1.0, lambda: postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
    )
    promoting.start()
    database.write(lambda conn: conn.execute(touch))
    promoting.join()
    assert queries.get(made.id).priority == 7


@only_postgres
def test_a_frozen_client_loses_its_transaction_and_its_locks(
    database: Database, job_factory: "Callable[..., Job]", queries: Queries
) -> None:
    """With a shorter timeout than the default, so that the test can wait for it."""
    made = job_factory()
    tries = []

    def work(conn: Any) -> None:
        tries.append(conn)
        conn.execute(text("SET LOCAL idle_in_transaction_session_timeout = '300ms'"))
        conn.execute(text("UPDATE job SET priority = priority + 1 WHERE id = :id"), {"id": made.id})
        if len(tries) == 1:
            time.sleep(1.0)  # a stop of this process, as the server sees it
        conn.execute(text("SELECT 1"))

    database.write(work)
    assert len(tries) == 2
    assert queries.get(made.id).priority == 1


@only_postgres
def test_a_server_that_swallows_the_question_is_given_up(
    through: JobStore, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-open: the other end acknowledges everything and never answers."""
    from storage.db.postgres import _bounded_connection

    submit(through)
    monkeypatch.setattr(_bounded_connection(), "answer_s", 1.0)
    proxy.hole()
    begun = time.monotonic()
    with pytest.raises(DatabaseUnavailableError) as caught:
        through.database.read(lambda conn: conn.execute(text("SELECT 1")), patience_s=0.5)
    assert time.monotonic() - begun < 12
    assert "\n" not in str(caught.value)
    proxy.heal()
    assert through.database.read(lambda conn: conn.execute(text("SELECT 1")).scalar()) == 1


# --- F17: restarts ------------------------------------------------------------------------------


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A cluster that keeps committed data through a crash of its processes."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("no Postgres")
    with Postgres(binaries, settings={"synchronous_commit": "on"}) as server:
        yield server


def machine_on(url: str, home: Path, **changes: Any) -> Ganq:
    """The installed ganq on a database of the test's own, with all tables."""
    from dataclasses import fields

    from storage.db.schema import upgrade

    home.mkdir(exist_ok=True)
    settings = make_settings(home, url, **changes)
    database = Database(settings)
    upgrade(database)
    database.dispose()
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return Ganq({f"GANQ_{k.upper()}": str(v) for k, v in values.items() if v is not None}, home.parent)


def assert_one_end(ganq: Ganq, job: int, state: str = "succeeded") -> dict[str, Any]:
    found = ganq.job(job)
    assert found["state"] == state, found
    ends = [
        one for one in ganq.json("events", str(job)) if one["type"] in ("succeeded", "failed", "cancelled")
    ]
    assert len(ends) == 1
    assert all(one["ended_at"] is not None for one in found["attempts"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["immediate", pytest.param("fast", marks=LATER)])
@pytest.mark.tier2
def test_postgres_restarts_while_jobs_are_claimed_run_and_end(
    own_postgres: Postgres, tmp_path: Path, small: list[str], how: str
) -> None:
    ganq = machine_on(own_postgres.tcp_url(own_postgres.create()), tmp_path / "home", stall_seconds=60)

    def restart() -> None:
        own_postgres.crash() if how == "immediate" else own_postgres.halt()
        time.sleep(0.5)
        own_postgres.restart()

    try:
        ganq.start_worker()
        long = ganq.json("submit", "train", *small, "--epochs", "150", "--checkpoint-seconds", "0.3")["id"]
        until(lambda: ganq.steps(long), what="a checkpoint")
        restart()
        after = ganq.json("checkpoints", str(long))[-1]["step"]
        until(lambda: ganq.steps(long)[-1] > after, what="another checkpoint")
        accepted = [ganq.json("submit", "train", *small, "--epochs", "1")["id"] for _ in range(3)]
        # From here on jobs end and are claimed all the time; the server goes away three times.
        until(lambda: ganq.peek(long)["state"] == "succeeded", what="the long one's end")
        for _ in range(3):
            restart()
            time.sleep(0.7)
        assert ganq.run("wait", *map(str, [long, *accepted]), "--timeout", "90").returncode == 0
        assert assert_one_end(ganq, long)["attempt"] == 1, "a restart of the database cost a run its attempt"
        for one in accepted:
            assert_one_end(ganq, one)
    finally:
        ganq.stop()


# --- F19: a standby takes over, without the last commits ------------------------------------------


@pytest.mark.slow
@pytest.mark.tier2
def test_a_standby_that_lacks_the_finish_runs_the_job_again(
    tmp_path: Path, make_identity: "Callable[..., WorkerIdentity]"
) -> None:
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("no Postgres")
    backup = shutil.which("pg_basebackup") or str(binaries / "pg_basebackup")
    if not os.access(backup, os.X_OK):
        pytest.skip("no pg_basebackup among the binaries of Postgres")
    streaming = {"synchronous_commit": "on", "wal_level": "replica", "max_wal_senders": "4"}
    first = Postgres(binaries, settings=streaming)
    standby = None
    try:
        database = Database(make_settings(tmp_path, first.url(first.create())))
        from storage.db.schema import upgrade

        upgrade(database)
        store, who = JobStore(database), make_identity()
        done = submit(store, "before")
        lease = store.claim(who, kinds=("train",), spec_version=SPEC_VERSION)
        assert lease is not None
        store.succeed(lease, {})
        running = submit(store, "during")
        lease = store.claim(who, kinds=("train",), spec_version=SPEC_VERSION)
        assert lease is not None
        standby = Standby(first, backup)
        standby.until_caught_up()
        standby.stop_receiving()
        store.register_checkpoint(
            lease, kind="final", epoch=1, step=9, path="jobs/2/a1/final", manifest_sha256="0" * 64, size=1
        )
        store.succeed(lease, {"final": "jobs/2/a1/final"})
        submit(store, "asynchronous")
        first.crash()
        database.dispose()
        standby.promote()

        database = Database(make_settings(tmp_path, standby.url(database.url)))
        store, queries = JobStore(database), Queries(database)
        assert queries.get(done.id).state is JobState.SUCCEEDED
        found = queries.get(running.id)
        assert (found.state, found.result) == (JobState.RUNNING, None), "a result without its commit"
        assert queries.checkpoints(running.id) == [], "a dangling checkpoint"
        assert sum(queries.counts().values()) == 2
        # The worker that had finished reads again: on this timeline it still owns the job.
        store.requeue_lost(beat_of(store, running.id), "its worker thinks that it is done")
        again = store.claim(who, kinds=("train",), spec_version=SPEC_VERSION)
        assert again is not None
        assert (again.job_id, again.attempt) == (running.id, 2)
        store.succeed(again, {"final": "jobs/2/a2/final"})
        assert event_types(database, running.id).count("succeeded") == 1
        database.dispose()
    finally:
        if standby is not None:
            standby.stop()
        first.stop()


class Standby:
    """A second server that replicates the first."""

    def __init__(self, first: Postgres, backup: str) -> None:
        self.first = first
        self.data = first.folder / "standby"
        self.port = free_port()
        subprocess.run(
            [
                backup,
                "-h",
                str(first.folder),
                "-p",
                str(first.port),
                "-U",
                "ganq",
                "-D",
                str(self.data),
                "-R",
            ],
            check=True,
            capture_output=True,
            **first._as,
        )
        options = {"port": self.port, "listen_addresses": "", "unix_socket_directories": first.folder}
        options |= {"wal_level": "replica", "max_wal_senders": 4, "fsync": "off", "hot_standby": "on"}
        options |= {"max_connections": 120}
        command = [str(first.binaries / "postgres"), "-D", str(self.data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        self.log = open(first.folder / "standby.log", "wb")  # noqa: SIM115 - the server keeps writing to it
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
            **first._as,
        )
        until(lambda: self.sql("SELECT 1", quiet=True), what="the standby")

    def sql(self, statement: str, *, quiet: bool = False) -> Any:
        import psycopg

        at = f"host={self.first.folder} port={self.port} user=ganq dbname=postgres connect_timeout=3"
        try:
            with psycopg.connect(at, autocommit=True) as conn:
                answer = conn.execute(statement.encode())
                return answer.fetchone() if answer.description else None
        except psycopg.OperationalError:
            if quiet:
                return None
            raise

    def until_caught_up(self) -> None:
        [(there,)] = self.first.sql("SELECT pg_current_wal_lsn()::text")
        until(
            lambda: self.sql(f"SELECT pg_last_wal_replay_lsn() >= '{there}'::pg_lsn")[0],
            within_s=20,
            what="the standby's replay",
        )

    def stop_receiving(self) -> None:
        self.sql("ALTER SYSTEM SET primary_conninfo = ''")
        self.sql("SELECT pg_reload_conf()")
        until(lambda: self.first.sql("SELECT count(*) FROM pg_stat_replication") == [(0,)])

    def promote(self) -> None:
        assert self.sql("SELECT pg_promote()")[0]

    def url(self, first_url: str) -> str:
        return first_url.replace(f"port={self.first.port}", f"port={self.port}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(15)
        self.log.close()


# --- F20: the database is away from one worker ----------------------------------------------------


@pytest.fixture
def split(own_postgres: Postgres, tmp_path: Path) -> Iterator[tuple[Ganq, Proxy, str]]:
    """A machine, a proxy to its database, and the URL through the proxy."""
    direct = own_postgres.tcp_url(own_postgres.create())
    ganq = machine_on(direct, tmp_path / "home", stall_seconds=9)
    with Proxy(own_postgres.port) as proxy:
        yield ganq, proxy, direct.replace(f":{own_postgres.port}/", f":{proxy.port}/")
        proxy.heal()
        ganq.stop()


@pytest.mark.tier2
@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", pytest.param("hole", marks=LATER)])
def test_a_database_unavailable_for_longer_than_a_lease_kills_no_run(
    split: tuple[Ganq, Proxy, str], small: list[str], how: str
) -> None:
    ganq, proxy, url = split
    worker = ganq.start_worker("w1", GANQ_DATABASE_URL=url)
    job = ganq.json("submit", "train", *small, "--epochs", "100000", "--checkpoint-seconds", "0.5")["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    runner = part(worker, "worker.runner.main")
    assert runner is not None
    getattr(proxy, how)()
    time.sleep(1.0)  # what was under way has arrived
    before = ganq.json("checkpoints", str(job))
    time.sleep(12.0)  # six leases, and longer than the stall timeout
    assert ganq.json("checkpoints", str(job)) == before, "something was published meanwhile"
    proxy.heal()
    step = before[-1]["step"]
    until(lambda: ganq.steps(job)[-1] > step, what="a checkpoint after it")
    found = ganq.job(job)
    assert (found["state"], found["attempt"]) == ("running", 1)
    assert runner.is_running(), "the run was killed"
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")


@pytest.mark.tier2
@pytest.mark.slow
def test_a_worker_that_was_overtaken_while_away_publishes_nothing(
    split: tuple[Ganq, Proxy, str], small: list[str]
) -> None:
    ganq, proxy, url = split
    first = ganq.start_worker("w1", GANQ_DATABASE_URL=url)
    job = ganq.json("submit", "train", *small, "--epochs", "300", "--checkpoint-seconds", "0.5")["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    old = part(first, "worker.runner.main")
    assert old is not None
    proxy.cut()
    ganq.start_worker("w2")
    until(lambda: ganq.peek(job)["attempt"] == 2, what="the second worker's attempt")
    assert old.is_running(), "the first one should not know yet"
    proxy.heal()
    until(lambda: not old.is_running(), what="the first runner's end")
    assert ganq.run("wait", str(job), "--timeout", "90").returncode == 0
    found = assert_one_end(ganq, job)
    assert [one["outcome"] for one in found["attempts"]] == ["lost", "succeeded"]
    taken = next(one["id"] for one in ganq.json("events", str(job)) if one["type"] == "lost")
    later = [one for one in ganq.json("events", str(job)) if one["id"] > taken]
    assert {one["attempt"] for one in later} == {2}, "the old attempt wrote after its end"
    assert ganq.json("checkpoints", str(job))[-1]["attempt"] == 2
    assert f"job {job}: lease released: " in ganq.log("w1")


# --- F21: SQLite is locked ------------------------------------------------------------------------


@pytest.mark.tier2
@pytest.mark.slow
@only_sqlite
def test_a_lock_that_outlasts_a_lease_costs_no_job(ganq: Ganq, small: list[str], settings: Settings) -> None:
    ganq.start_worker("w1")
    job = ganq.json("submit", "train", *small, "--epochs", "100000")["id"]
    until(lambda: ganq.peek(job)["state"] == "running", what="a start")
    ganq.start_worker("w2")
    until(lambda: len(ganq.present()) == 2, what="the second worker, which reaps")
    holder = sqlite3.connect(settings.database_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    waiting = threading.Thread(target=lambda: ganq("submit", "train", *small, "--epochs", "1", "--hold"))
    waiting.start()
    time.sleep(4 * settings.lease_seconds)
    assert ganq.job(job)["state"] == "running", "a reader must not wait for a writer"
    holder.execute("ROLLBACK")
    holder.close()
    waiting.join(30)
    time.sleep(2 * settings.lease_seconds)
    found = ganq.job(job)
    assert (found["state"], found["attempt"]) == ("running", 1), "a job was taken from a worker that lives"
    assert len(ganq.json("status")) == 2, "the submit that waited"
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")


@only_sqlite
def test_the_reaper_requeues_nothing_if_no_worker_could_write(
    settings: Settings, store: JobStore, running_job_factory: "Callable[..., Lease]", queries: Queries
) -> None:
    lease = running_job_factory()
    seen = beat_of(store, lease.job_id)
    holder = sqlite3.connect(settings.database_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    taken = []
    reaping = threading.Thread(target=lambda: taken.append(store.requeue_lost(seen, "silent", within_s=0.3)))
    reaping.start()
    time.sleep(0.6)
    holder.execute("ROLLBACK")
    holder.close()
    reaping.join(10)
    assert taken == [None]
    assert queries.get(lease.job_id).state is JobState.RUNNING
    assert store.requeue_lost(seen, "silent") is JobState.QUEUED


# --- F22: where the file is, whether it is, and whether there is room ------------------------------


class FuseMount:
    """An empty FUSE file system, served by a thread: only root/ exists."""

    def __init__(self, point: Path, kind: str) -> None:
        self.point = point
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0".encode()
        if self.libc.mount(b"ganq-test", bytes(point), kind.encode(), 0, options) != 0:
            os.close(self.fd)
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self.fd, 1 << 20)
            except OSError:
                return  # unmounted
            opcode, unique = struct.unpack_from("<xxxxIQ", request)
            if opcode == 26:  # FUSE_INIT
                answer = struct.pack("<IIIIHHIII28x", 7, 31, 0, 0, 1, 1, 4096, 1, 0)[:64].ljust(64, b"\0")
            elif opcode == 3:  # FUSE_GETATTR
                attributes = struct.pack(
                    "<QQQQQQIIIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 512, 0
                )
                answer = struct.pack("<QII", 0, 0, 0) + attributes
            elif opcode in (2, 36, 42):  # FUSE_FORGET, INTERRUPT, BATCH_FORGET: nobody waits
                continue
            else:
                os.write(self.fd, struct.pack("<IiQ", 16, -38, unique))  # ENOSYS
                continue
            os.write(self.fd, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)

    def close(self) -> None:
        self.libc.umount2(bytes(self.point), 2)  # MNT_DETACH
        self.thread.join(5)
        os.close(self.fd)


@needs_root
@pytest.mark.parametrize("kind", ["fuse", "fuse.sshfs"])
@pytest.mark.parametrize("by_link", [False, True])
def test_sqlite_on_a_real_fuse_mount_is_refused(tmp_path: Path, kind: str, by_link: bool) -> None:
    point = tmp_path / "far away"
    point.mkdir()
    try:
        mount = FuseMount(point, kind)
    except OSError as exc:
        pytest.skip(f"no FUSE here: {exc}")
    path = point / "ganq.db"
    if by_link:
        (tmp_path / "ganq.db").symlink_to(path)
        path = tmp_path / "ganq.db"
    try:
        with pytest.raises(ConfigError) as caught:
            Database(make_settings(tmp_path, f"sqlite:///{path}"))
    finally:
        mount.close()
    assert f"cannot be used on {kind}" in caught.value.message
    assert "Postgres" in (caught.value.hint or "")


@only_sqlite
def test_a_file_that_was_moved_is_reported_and_used_again_when_it_is_back(
    settings: Settings, database: Database, job_factory: "Callable[..., Job]", queries: Queries
) -> None:
    made = job_factory()
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    path.rename(path.with_suffix(".away"))

    for ask in (
        lambda: queries.get(made.id),
        lambda: job_factory(),
        lambda: open_database(settings, create=True),
    ):
        with pytest.raises(DatabaseUnavailableError) as caught:
            ask()
        assert "deleted or moved away" in caught.value.message
    assert not path.exists(), "an empty database took its place"

    path.with_suffix(".away").rename(path)
    assert queries.get(made.id).id == made.id
    assert job_factory().id == made.id + 1


@only_sqlite
def test_a_file_that_vanished_before_the_first_write_is_not_created_again(settings: Settings) -> None:
    database = Database(settings)
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    path.unlink()
    with pytest.raises(DatabaseUnavailableError):
        database.read(lambda conn: conn.execute(text("SELECT 1")))
    assert not path.exists()


@only_sqlite
def test_a_backup_in_the_place_of_the_file_is_what_is_read_from_then_on(
    settings: Settings,
    database: Database,
    job_factory: "Callable[..., Job]",
    queries: Queries,
    tmp_path: Path,
) -> None:
    kept = job_factory()
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    database.write(lambda conn: None)
    backup = sqlite3.connect(path)
    backup.execute("VACUUM INTO ?", (str(tmp_path / "backup.db"),))
    backup.close()
    lost = job_factory()
    database.engine.dispose()
    for one in path.parent.glob("ganq.db*"):
        one.unlink()
    (tmp_path / "backup.db").rename(path)

    assert queries.get(kept.id).id == kept.id
    assert queries.counts()["queued"] == 1
    assert job_factory().id == lost.id


@pytest.mark.tier2
@pytest.mark.slow
@only_sqlite
def test_a_worker_whose_database_is_moved_away_waits_for_it(
    ganq: Ganq, small: list[str], settings: Settings
) -> None:
    ganq.start_worker()
    options = ["--epochs", "100000", "--checkpoint-seconds", "0.5"]
    job = ganq.json("submit", "train", *small, *options)["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    path.rename(path.with_suffix(".away"))
    time.sleep(2 * settings.lease_seconds)
    result = ganq.run("submit", "train", *small)
    assert result.returncode == 1
    assert "deleted or moved away" in result.stderr
    assert result.stderr.count("\n") == 2, result.stderr
    path.with_suffix(".away").rename(path)
    step = ganq.json("checkpoints", str(job))[-1]["step"]
    until(lambda: ganq.steps(job)[-1] > step, what="another checkpoint")
    assert ganq.job(job)["attempt"] == 1
    assert "deleted or moved away" in ganq.log()
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "ganq-test", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@needs_root
def test_a_full_disk_of_the_job_table_is_reported_and_loses_nothing(
    small_disk: Path, make_identity: "Callable[..., WorkerIdentity]"
) -> None:
    path = small_disk / "ganq.db"
    database = open_database(make_settings(small_disk, f"sqlite:///{path}"), create=True)
    store, queries = JobStore(database), Queries(database)
    accepted: list[str] = []

    def submit_until_full() -> str:
        for number in range(10_000):
            key = f"{len(accepted)}-{number}"
            try:
                submit(store, key, spec={"data": "x" * 3000})
            except DatabaseUnavailableError as exc:
                return f"{exc.message} → {exc.hint}"
            accepted.append(key)
        raise AssertionError("it never became full")

    reported = submit_until_full()
    assert "the disk of the job table is full" in reported
    assert "free space there" in reported
    assert queries.counts()["queued"] == len(accepted) > 50, "readers read on"
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    submit(store, "again")
    database.dispose()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    found = {key for (key,) in raw.execute("SELECT submit_key FROM job")}
    assert found == {*accepted, "again"}
    raw.close()


@needs_root
def test_a_disk_that_is_full_from_the_start_is_reported_too(small_disk: Path) -> None:
    database = open_database(make_settings(small_disk, f"sqlite:///{small_disk / 'ganq.db'}"), create=True)
    database.dispose()
    (small_disk / "ballast").write_bytes(b"x" * shutil.disk_usage(small_disk).free)
    url = f"sqlite:///{small_disk / 'ganq.db'}"
    with pytest.raises(DatabaseUnavailableError) as caught:
        submit(JobStore(open_database(make_settings(small_disk, url))))
    assert "the disk of the job table is full" in caught.value.message
    (small_disk / "ballast").unlink()
    database = open_database(make_settings(small_disk, f"sqlite:///{small_disk / 'ganq.db'}"))
    submit(JobStore(database))
    database.dispose()


# --- the WAL of an SQLite before 3.51.3 -------------------------------------------------------------

SHORT_WAL = 4_096_000
WRITES = """
import sys
from pathlib import Path
import storage.db.sqlite
storage.db.sqlite.WAL_RESET_FIXED = (99, 0, 0)  # whichever SQLite this is
storage.db.sqlite.WAL_BYTES = 4_096_000
from conftest import make_settings
from storage.db.engine import Database
from storage.db.store import JobStore
me, path, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
database = Database(make_settings(path.parent, f"sqlite:///{path}"))
store = JobStore(database)
assert database.read(lambda c: c.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar()) == 0
for i in range(number):
    spec = {"data": "x" * 20000}
    job = store.submit(kind="train", spec=spec, spec_version=1, submit_key=f"{me}-{i}", user="u")
    print(job.id, flush=True)
"""


@pytest.mark.slow
@only_sqlite
def test_the_wal_stays_small_under_many_processes_one_of_them_killed_and_one_stopped(
    settings: Settings, tmp_path: Path
) -> None:
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    wal = Path(f"{path}-wal")
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"}
    children = []
    for i in range(4):
        with open(tmp_path / f"{i}.txt", "w") as result:
            command = [sys.executable, "-c", WRITES, str(i), str(path), "400"]
            children.append(subprocess.Popen(command, env=env, stdout=result))

    def written() -> int:
        return sum((tmp_path / f"{i}.txt").read_text().count("\n") for i in range(4))

    largest, victim, stopped_at, meanwhile = 0, None, float("inf"), 0
    while any(one.poll() is None for one in children):
        largest = max(largest, wal.stat().st_size if wal.exists() else 0)
        if victim is None:
            reported = [(tmp_path / f"{i}.txt").stat().st_size for i in range(4)]
            if max(reported) > 200:  # the fastest is killed, another one stopped
                victim = reported.index(max(reported))
                children[victim].kill()
                children[victim - 1].send_signal(signal.SIGSTOP)
                stopped_at, meanwhile = time.monotonic(), -written()
        stopped_s = time.monotonic() - stopped_at
        if stopped_s > 1.5 or (stopped_s > 0 and meanwhile + written() > 100):
            assert victim is not None
            meanwhile += written()
            children[victim - 1].send_signal(signal.SIGCONT)
            stopped_at = float("inf")
        time.sleep(0.005)
    assert victim is not None
    assert sorted(one.wait() for one in children) == [-signal.SIGKILL, 0, 0, 0]
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    there = {row[0] for row in raw.execute("SELECT id FROM job")}
    raw.close()
    accepted = {int(line) for i in range(4) for line in (tmp_path / f"{i}.txt").read_text().split()}
    assert accepted <= there, "an accepted job is gone"
    # Some 15 pages a job; how many of them the WAL holds at most depends on the speed of the machine,
    # because a checkpoint runs twice a second. A process that is stopped while it reads keeps the WAL
    # from beginning anew: what the others write meanwhile comes on top.
    all_bytes, meanwhile_bytes = (number * 15 * 4096 for number in (len(there), meanwhile))
    assert all_bytes > 10 * SHORT_WAL, "too little was written to see anything"
    most = all_bytes / 2 + meanwhile_bytes
    assert 0 < largest < most, f"the WAL grew to {largest:,} of {all_bytes:,} bytes"


@only_sqlite
def test_no_process_can_commit_during_a_checkpoint(
    settings: Settings, job_factory: "Callable[..., Job]"
) -> None:
    """The second of two checkpoints must not meet a commit that restarts the WAL (see Wal)."""
    job_factory()
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        Wal(path).checkpoint(wait_s=0.1)
    writer.execute("ROLLBACK")
    writer.close()
    assert Wal(path).checkpoint(wait_s=0.1) is True


@only_sqlite
def test_a_reader_that_stays_keeps_the_wal_and_breaks_nothing(
    settings: Settings, job_factory: "Callable[..., Job]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.db.sqlite.WAL_RESET_FIXED", (99, 0, 0))
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    job_factory()
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM job").fetchall()
    job_factory()
    assert Wal(path).checkpoint() is False
    reader.execute("ROLLBACK")
    reader.close()
    assert Wal(path).checkpoint() is True
