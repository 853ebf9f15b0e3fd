"""
The database answers, and refuses: rights that were revoked, locked tables, read-only, no connection left.

After some seconds it is as before, and so must be every worker: the same
processes, each of their threads, and no traceback in a log.
"""

import resource
import secrets
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from conftest import make_settings
from machine import Ganq, part, the_part, until
from services import Postgres
from sqlalchemy import text
from tables import job_row

from jobs.errors import DatabaseUnavailableError
from storage.db.engine import Database
from storage.db.schema import open_database, upgrade
from storage.db.workers import WorkerStore
from storage.settings import Settings
from worker.supervisor.heartbeat import Heartbeat
from worker.supervisor.reaper import Recovery
from worker.supervisor.status_socket import StatusSocket

if TYPE_CHECKING:
    from storage.db.rows import Job, Lease, WorkerIdentity
    from storage.db.store import JobStore


def _chattr_works() -> bool:
    with tempfile.NamedTemporaryFile() as probe:
        flags = [subprocess.run(["chattr", flag, probe.name], capture_output=True) for flag in ("+i", "-i")]
    return all(one.returncode == 0 for one in flags)


only_sqlite = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
needs_chattr = pytest.mark.skipif(
    not shutil.which("chattr") or not _chattr_works(), reason="chattr +i needs root and a file system with it"
)
Fault = Callable[[], AbstractContextManager[None]]


class Tenant:
    """A Postgres database of a role that is no superuser: refusals mean nothing to one."""

    def __init__(self, server: Postgres, template: str) -> None:
        self.server = server
        self.name = server.create(template=template)
        self.role = f"r{secrets.token_hex(4)}"
        self.sql(f"CREATE ROLE {self.role} LOGIN")
        self.grant()
        self.url = server.url(self.name).replace("ganq@", f"{self.role}@")

    def sql(self, *statements: str) -> None:
        for one in statements:
            self.server.sql(one, self.name)

    def disconnect(self) -> None:
        self.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{self.role}'")

    def grant(self) -> None:
        self.sql(
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {self.role}",
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {self.role}",
        )

    def drop(self) -> None:
        self.server.drop(self.name)
        self.server.sql(f"DROP ROLE {self.role}")

    @contextmanager
    def rights_revoked(self) -> Iterator[None]:
        self.sql(f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {self.role}")
        yield
        self.grant()

    @contextmanager
    def one_table_revoked(self) -> Iterator[None]:
        self.sql(f"REVOKE ALL ON job, worker FROM {self.role}")
        yield
        self.grant()

    @contextmanager
    def schema_revoked(self) -> Iterator[None]:
        self.sql("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
        yield
        self.sql("GRANT USAGE ON SCHEMA public TO PUBLIC")

    @contextmanager
    def tables_locked(self) -> Iterator[None]:
        import psycopg

        with psycopg.connect(self.server.conninfo(self.name)) as conn:
            conn.execute("LOCK TABLE job, worker, attempt, alembic_version IN ACCESS EXCLUSIVE MODE")
            yield

    @contextmanager
    def read_only(self) -> Iterator[None]:
        self.sql(f"ALTER ROLE {self.role} SET default_transaction_read_only = on")
        self.disconnect()
        yield
        self.sql(f"ALTER ROLE {self.role} SET default_transaction_read_only = off")

    @contextmanager
    def no_connection_left(self) -> Iterator[None]:
        self.sql(f"ALTER ROLE {self.role} CONNECTION LIMIT 0")
        self.disconnect()
        yield
        self.sql(f"ALTER ROLE {self.role} CONNECTION LIMIT -1")


@pytest.fixture
def tenant(postgres: Postgres, _postgres_template: str) -> Iterator[Tenant]:
    found = Tenant(postgres, _postgres_template)
    yield found
    found.drop()


POSTGRES_FAULTS = (
    *("rights_revoked", "one_table_revoked", "schema_revoked"),
    *("tables_locked", "read_only", "no_connection_left"),
)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    yield
    holder.execute("ROLLBACK")
    holder.close()


@contextmanager
def not_writable(path: Path) -> Iterator[None]:
    """The permission bits mean nothing to root; a file that is immutable refuses root, too."""
    files = [str(path), f"{path}-wal"]
    subprocess.run(["chattr", "+i", *files], check=True)
    yield
    subprocess.run(["chattr", "-i", *files], check=True)


SQLITE_FAULTS = {"locked": locked, "not_writable": not_writable}


# --- what a transaction says --------------------------------------------------------------------


@pytest.mark.parametrize("fault", POSTGRES_FAULTS)
def test_what_postgres_refuses_for_a_while_is_reported_in_a_line_and_then_works_again(
    tenant: Tenant, tmp_path: Path, fault: str
) -> None:
    database = open_database(make_settings(tmp_path, tenant.url))
    touch = text("UPDATE job SET priority = priority")
    database.write(lambda conn: conn.execute(touch))
    with getattr(tenant, fault)(), pytest.raises(DatabaseUnavailableError) as caught:
        database.write(lambda conn: conn.execute(touch), patience_s=0.2)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    database.write(lambda conn: conn.execute(touch))
    database.dispose()


@only_sqlite
@needs_chattr
def test_a_table_opened_while_it_could_only_be_read_is_written_once_it_can(
    backend: str, database_url: str, tmp_path: Path
) -> None:
    path = Path(database_url.removeprefix("sqlite:///"))
    database = Database(make_settings(tmp_path, database_url))
    touch = text("UPDATE job SET priority = priority")
    with sqlite3.connect(path) as keeps_the_wal:
        keeps_the_wal.execute("UPDATE job SET priority = priority")
        with not_writable(path), pytest.raises(DatabaseUnavailableError) as caught:
            database.write(lambda conn: conn.execute(touch), patience_s=0.2)
    keeps_the_wal.close()
    assert "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    database.write(lambda conn: conn.execute(touch))
    database.dispose()


# --- what workers do ----------------------------------------------------------------------------


def machine(tmp_path: Path, url: str) -> Ganq:
    from dataclasses import fields

    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    settings = make_settings(home, url)
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    env = {f"GANQ_{name.upper()}": str(value) for name, value in values.items() if value is not None}
    database = Database(Settings.load(env))
    upgrade(database)
    database.dispose()
    return Ganq(env, tmp_path)


def survives(ganq: Ganq, small: list[str], fault: Fault) -> None:
    """A busy and an idle worker through the fault; then the busy one dies, and the other takes its job."""
    workers = {name: ganq.start_worker(name) for name in ("busy",)}
    job = ganq.json("submit", "train", *small, "--epochs", "100000", "--checkpoint-seconds", "0.5")["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    workers["idle"] = ganq.start_worker("idle")
    until(lambda: len(ganq.present()) == 2, what="the second worker")
    pids = {name: the_part(one, "worker.supervisor.loop").pid for name, one in workers.items()}
    begun = time.monotonic()
    with fault():
        time.sleep(6.0)  # longer than what each of them waits within a transaction
        result = ganq.run("submit", "train", *small, "--epochs", "1", "--hold")
    assert "traceback" not in result.stderr.lower()
    assert "defect" not in result.stderr, result.stderr
    for name, one in workers.items():
        log = ganq.log(name)
        assert "Traceback" not in log, log
        supervisor = part(one, "worker.supervisor.loop")
        assert supervisor is not None, log
        assert supervisor.pid == pids[name], log
    step = ganq.steps(job)[-1]
    until(lambda: ganq.steps(job)[-1] > step, what=f"a checkpoint after {time.monotonic() - begun:.0f} s")
    until(lambda: ganq.run("health").returncode == 0, what="healthy workers")
    assert ganq.peek(job)["attempt"] == 1
    the_part(workers["busy"], "worker.supervisor.loop").kill()
    workers["busy"].kill()
    until(lambda: ganq.peek(job)["attempt"] == 2, what="the recovery by the idle worker", within_s=30)
    assert "Traceback" not in ganq.log("idle")
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "rights_revoked",
        *(
            pytest.param(one, marks=pytest.mark.tier2)
            for one in (
                "read_only",
                "one_table_revoked",
                "schema_revoked",
                "tables_locked",
                "no_connection_left",
            )
        ),
    ],
)
def test_workers_survive_what_postgres_refuses_for_some_seconds(
    tenant: Tenant, small: list[str], tmp_path: Path, fault: str
) -> None:
    ganq = machine(tmp_path, tenant.url)
    try:
        survives(ganq, small, getattr(tenant, fault))
    finally:
        ganq.stop()


@pytest.mark.tier2
@pytest.mark.slow
@needs_chattr
@pytest.mark.parametrize("fault", ["locked", "not_writable"])
def test_workers_survive_what_sqlite_refuses_for_some_seconds(
    small: list[str], tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "home" / "ganq.db"
    ganq = machine(tmp_path, f"sqlite:///{path}")
    try:
        survives(ganq, small, lambda: SQLITE_FAULTS[fault](path))
    finally:
        ganq.stop()


# --- what nobody has classified -----------------------------------------------------------------

REFUSE = {
    "sqlite": "CREATE TRIGGER refuse BEFORE UPDATE ON job BEGIN SELECT RAISE(ABORT, 'not today'); END",
    "postgres": "CREATE TRIGGER refuse BEFORE UPDATE ON job EXECUTE FUNCTION ganq_refuse('not today')",
}
ALLOW = {"sqlite": "DROP TRIGGER refuse", "postgres": "DROP TRIGGER refuse ON job"}


def test_the_threads_of_a_supervisor_survive_an_error_of_an_unknown_kind(
    backend: str,
    database: Database,
    settings: Settings,
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
    worker_identity: "WorkerIdentity",
    make_identity: "Callable[..., WorkerIdentity]",
    caplog: pytest.LogCaptureFixture,
) -> None:
    WorkerStore(database, make_identity("idle")).report("idle")  # only idle workers are notified
    workers = WorkerStore(database, worker_identity)
    lease = running_job_factory()
    job_factory()  # one to notify workers about
    database.write(lambda conn: conn.execute(text(REFUSE[backend])))
    heartbeat = Heartbeat(store, workers, settings, lambda *_: None, lambda _: None, lambda _: None)
    heartbeat.begin(lease)
    notified: list[int] = []
    recovery = Recovery(
        database, settings, workers, lambda _, job: notified.append(job), lambda: None, lambda _: None
    )
    threads = (heartbeat, recovery)
    for one in threads:
        one.start()
    time.sleep(1.0)
    assert all(one.is_alive() for one in threads), caplog.text
    assert "not today" in caplog.text
    assert "Traceback" not in caplog.text
    database.write(lambda conn: conn.execute(text(ALLOW[backend])))
    before = job_row(database, lease.job_id)["hb_seq"]
    until(lambda: job_row(database, lease.job_id)["hb_seq"] > before, what="a heartbeat", within_s=5)
    until(lambda: notified, what="a notification", within_s=10)
    for one in threads:
        one.stop()
        one.join(5)


def test_the_status_socket_answers_after_a_time_without_a_free_file_descriptor(tmp_path: Path) -> None:
    supervisor: Any = SimpleNamespace(identity=SimpleNamespace(name="w1"))
    status_socket = StatusSocket(supervisor, tmp_path / "live-1.sock")
    status_socket.status = lambda: {"worker": "w1"}  # type: ignore[method-assign]
    clients = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
    status_socket.start()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limit[1]))  # no new one, whatever is open
    try:
        for client in clients:  # for the first, the thread has a descriptor already
            client.connect(str(status_socket.path))
        time.sleep(0.3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    for client in clients:
        client.settimeout(5)
        assert client.recv(4096) == b'{"worker": "w1"}\n'
        client.close()
    status_socket.stop()
    status_socket.join(5)
    assert not status_socket.is_alive()
