"""Opening, retrying and explaining: what happens when the database is slow, away or not one."""

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import make_settings
from services import Postgres, free_port
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from jobs.errors import ConfigError, DatabaseUnavailableError, SchemaMismatchError
from storage.db import engine as engine_module
from storage.db import postgres as postgres_module
from storage.db.engine import Database, filesystem_type
from storage.db.schema import open_database
from storage.db.sqlite import Wal

if TYPE_CHECKING:
    from tables import Claimer

    from storage.db.queries import Queries
    from storage.db.rows import Job
    from storage.settings import Settings

only_sqlite = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
only_postgres = pytest.mark.parametrize("backend", ["postgres"], indirect=True)


def one_line(exc: Exception) -> str:
    assert "\n" not in str(exc)
    return str(exc)


# --- transactions -------------------------------------------------------------------------------


def test_work_that_fails_leaves_nothing_behind(
    database: Database, job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    def work(conn: Any) -> None:
        conn.execute(text("DELETE FROM event"))
        raise RuntimeError("in the middle")

    made = job_factory()
    with pytest.raises(RuntimeError):
        database.write(work)

    assert len(queries.events(made.id)) == 1


def test_an_error_of_ours_is_raised_as_it_is_and_at_once(database: Database) -> None:
    begun = time.monotonic()
    with pytest.raises(DBAPIError):
        database.write(lambda conn: conn.execute(text("SELECT nonsense FROM job")))
    with pytest.raises(IntegrityError):
        database.write(
            lambda conn: conn.execute(text("INSERT INTO dependency (job_id, needs) VALUES (1, 2)"))
        )
    assert time.monotonic() - begun < 2


def test_a_table_that_is_missing_names_the_command_that_makes_it(database: Database) -> None:
    with pytest.raises(SchemaMismatchError) as caught:
        database.read(lambda conn: conn.execute(text("SELECT * FROM no_such_table")))
    assert "ganq db upgrade" in (caught.value.hint or "")


def test_the_connection_that_was_used_last_is_used_next_because_its_pages_are_in_memory(
    database: Database,
) -> None:
    used = []

    def work(conn: Any) -> None:
        used.append(conn.connection.dbapi_connection)

    database.write(lambda first: database.read(work))  # two at once, so that the pool holds two
    for _ in range(4):
        database.write(work)
    assert len(set(map(id, used[1:]))) == 1


# --- SQLite -------------------------------------------------------------------------------------


@only_sqlite
def test_sqlite_is_set_so_that_a_commit_is_durable_and_writers_wait(database: Database) -> None:
    def ask(conn: Any) -> Any:
        return {
            name: conn.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "wal_autocheckpoint")
        }

    found = database.read(ask)

    one_checkpointer = sqlite3.sqlite_version_info < (3, 51, 3)
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL
        "foreign_keys": 1,
        "busy_timeout": 30_000,
        "wal_autocheckpoint": 0 if one_checkpointer else 4000,
    }


@only_sqlite
def test_a_write_begins_immediately_so_that_reading_first_cannot_break_it(
    database: Database, job_factory: "Callable[..., Job]"
) -> None:
    made = job_factory()
    both_inside = threading.Barrier(2)
    raised = []

    def read_then_write(wait: float) -> None:
        def work(conn: Any) -> None:
            conn.execute(text("SELECT * FROM job")).all()
            time.sleep(wait)
            conn.execute(text("UPDATE job SET priority = priority + 1 WHERE id = :id"), {"id": made.id})

        both_inside.wait()
        try:
            with database.engine.begin() as conn:
                work(conn)
        except DBAPIError as exc:
            raised.append(exc)

    threads = [threading.Thread(target=read_then_write, args=(0.2,)) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()

    assert raised == []
    found = database.read(lambda conn: conn.execute(text("SELECT priority FROM job")).scalar())
    assert found == 2


@only_sqlite
def test_a_second_writer_of_a_process_waits_without_a_connection(database: Database) -> None:
    """SQLite would let it sleep for up to 100 ms at a time, and take connections away from readers."""
    begun, end = threading.Event(), threading.Event()

    def slow(conn: Any) -> None:
        begun.set()
        end.wait(10)

    writers = [threading.Thread(target=database.write, args=(slow,)) for _ in range(2)]
    writers[0].start()
    assert begun.wait(10)
    writers[1].start()
    time.sleep(0.2)
    pool: Any = database.engine.pool
    in_use = pool.checkedout()
    end.set()
    for one in writers:
        one.join(10)
    assert in_use == 1


@only_sqlite
def test_a_reader_is_not_kept_waiting_by_a_writer(
    database: Database, job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    made = job_factory()
    with database.engine.begin() as conn:
        conn.execute(text("UPDATE job SET priority = 9"))
        begun = time.monotonic()
        assert queries.get(made.id).priority == 0
        assert time.monotonic() - begun < 1


@only_sqlite
def test_the_wal_is_moved_into_the_database(
    database: Database, settings: "Settings", job_factory: "Callable[..., Job]"
) -> None:
    job_factory()
    path = settings.database_url.removeprefix("sqlite:///")

    assert database.wal is not None
    database.wal.checkpoint()

    copy = path + ".copy"
    with open(path, "rb") as source, open(copy, "wb") as target:  # without its WAL
        target.write(source.read())
    alone = sqlite3.connect(copy)
    assert alone.execute("SELECT count(*) FROM job").fetchone() == (1,)
    alone.close()


@only_sqlite
def test_a_wal_that_begins_again_keeps_its_file_because_growing_waits_for_the_disk_twice(
    database: Database,
    settings: "Settings",
    job_factory: "Callable[..., Job]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("storage.db.sqlite.WAL_BYTES", 2_000_000)
    wal = Wal(Path(settings.database_url.removeprefix("sqlite:///")))
    while not wal.exceeds_limit():
        job_factory(spec={"data": "x" * 100_000})
    length = wal.file.stat().st_size
    assert 2_000_000 <= length < 2_500_000

    assert wal.checkpoint()
    job_factory()

    assert wal.file.stat().st_size == length
    assert not wal.exceeds_limit(), "what an earlier round has left was taken for what is written now"


@pytest.mark.parametrize("page_size", [1024, 8192])
def test_a_wal_of_other_pages_than_usual_is_known_to_be_long_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    monkeypatch.setattr("storage.db.sqlite.WAL_BYTES", 400_000)
    raw = sqlite3.connect(tmp_path / "ganq.db", isolation_level=None)
    raw.execute(f"PRAGMA page_size = {page_size}")
    raw.execute("PRAGMA journal_mode = WAL")
    raw.execute("PRAGMA wal_autocheckpoint = 0")
    raw.execute("CREATE TABLE kept (letter TEXT)")
    wal = Wal(tmp_path / "ganq.db")
    assert not wal.exceeds_limit()
    for _ in range(5):
        raw.execute("INSERT INTO kept VALUES (?)", ("x" * 100_000,))
    assert wal.exceeds_limit()
    raw.close()


def test_a_file_that_is_no_database_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "ganq.db"
    path.write_bytes(b"this is a letter to my aunt, and no database\n" * 100)

    with pytest.raises(DatabaseUnavailableError) as caught:
        open_database(make_settings(tmp_path, f"sqlite:///{path}"))

    assert "is not a SQLite database" in one_line(caught.value)
    assert path.read_bytes().startswith(b"this is a letter"), "it was changed"


def test_a_folder_in_place_of_the_database_is_explained(tmp_path: Path) -> None:
    (tmp_path / "ganq.db").mkdir()

    with pytest.raises(DatabaseUnavailableError) as caught:
        open_database(make_settings(tmp_path, f"sqlite:///{tmp_path / 'ganq.db'}"))

    assert "unable to open database file" in one_line(caught.value)


def test_a_relative_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Database(make_settings(tmp_path, "sqlite:///ganq.db"))
    assert "four slashes" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "kind",
    ["nfs", "nfs4", "cifs", "smb3", "9p", "lustre", "ceph", "virtiofs", "fuse", "fuse.sshfs", "fuseblk"],
)
def test_sqlite_on_a_network_filesystem_is_refused_and_postgres_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(engine_module, "filesystem_type", lambda folder: kind)

    with pytest.raises(ConfigError) as caught:
        Database(make_settings(tmp_path, f"sqlite:///{tmp_path / 'ganq.db'}"))

    assert kind in one_line(caught.value)
    assert "Postgres" in (caught.value.hint or "")


@pytest.mark.skipif(
    not os.path.exists("/proc/self/mountinfo"), reason="Linux tells the type of a file system"
)
def test_the_type_of_a_filesystem_is_read_from_the_longest_mount_point(tmp_path: Path) -> None:
    assert filesystem_type(Path("/proc/self")) == "proc"
    assert filesystem_type(tmp_path) not in ("", "proc")


MOUNTS = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 21 0:40 / {home}/far rw,relatime - nfs4 server:/export rw,vers=4.2,hard
31 21 0:41 / {home}/far\040away rw - fuse.sshfs user@host:/ rw,user_id=0
32 21 0:42 / {home}/hidden/below rw - nfs server:/old rw
33 21 {device} / {home}/hidden rw - ext4 /dev/sdb1 rw
34 21 0:44 / {home}/farm rw - xfs /dev/sdc1 rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("", "ext4"),
        ("far", "nfs4"),
        ("far/deep/down", "nfs4"),
        ("far away/x", "fuse.sshfs"),
        ("farm", "xfs"),  # not below 'far'
        ("farther", "ext4"),
        ("hidden/below", "ext4"),  # a later mount lies over the older one
    ],
)
def test_the_mount_that_holds_a_folder_is_found(tmp_path: Path, folder: str, kind: str) -> None:
    where, device = tmp_path / folder, "0:99"
    if folder.startswith("hidden"):
        where.mkdir(parents=True)
        number = where.stat().st_dev
        device = f"{os.major(number)}:{os.minor(number)}"
    listed = tmp_path / "mountinfo"
    listed.write_text(MOUNTS.strip().format(home=tmp_path, device=device))
    assert filesystem_type(where, listed) == kind


@pytest.mark.parametrize("folder", ["with space", "with ? mark", "with % and #", "ünï"])
def test_a_home_with_odd_letters_holds_a_database(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "ganq.db"

    database = open_database(make_settings(tmp_path, f"sqlite:///{path}"), create=True)
    database.dispose()

    assert path.is_file()


# --- Postgres -----------------------------------------------------------------------------------


def refused(url: str, tmp_path: Path) -> tuple[DatabaseUnavailableError, float]:
    begun = time.monotonic()
    with pytest.raises(DatabaseUnavailableError) as caught:
        open_database(make_settings(tmp_path, url))
    return caught.value, time.monotonic() - begun


def test_a_postgres_that_is_not_there_is_reported_soon_and_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://ganq:hunter2@127.0.0.1:{free_port()}/ganq"

    error, seconds = refused(url, tmp_path)

    assert seconds < 10
    assert "hunter2" not in one_line(error)
    assert "ganq:***@127.0.0.1" in str(error)
    assert "ganq doctor" in (error.hint or "")


def test_a_host_that_swallows_packets_is_reported_soon_too(tmp_path: Path) -> None:
    # A full backlog drops new connections without an answer, as a firewall does.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        port = silent.getsockname()[1]
        fillers = [socket.socket() for _ in range(3)]
        for one in fillers:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))

        _, seconds = refused(f"postgresql+psycopg://ganq:hunter2@127.0.0.1:{port}/ganq", tmp_path)

        for one in fillers:
            one.close()
    assert seconds < 12


def test_a_postgres_database_that_does_not_exist_is_reported_at_once(
    postgres: Postgres, tmp_path: Path
) -> None:
    error, seconds = refused(postgres.tcp_url("nowhere"), tmp_path)

    assert 'database "nowhere" does not exist' in one_line(error)
    assert postgres.password not in str(error)
    assert seconds < 2


def test_a_wrong_postgres_password_is_reported_at_once_and_not_shown(
    postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.tcp_url("postgres").replace(postgres.password, "hunter2")

    error, seconds = refused(url, tmp_path)

    assert "authentication failed" in one_line(error)
    assert "hunter2" not in str(error)
    assert seconds < 2


@only_postgres
def test_connections_that_the_server_cut_are_made_again(
    database: Database, postgres: Postgres, queries: "Queries", job_factory: "Callable[..., Job]"
) -> None:
    made = job_factory()
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ganq'"
    postgres.sql(cut)

    assert queries.get(made.id).id == made.id
    cuts: list[Any] = []

    def work(conn: Any) -> None:
        found = conn.execute(text("SELECT pg_backend_pid()")).scalar()
        if not cuts:
            cuts.append(found)
            postgres.sql(f"SELECT pg_terminate_backend({found})")
        conn.execute(text("UPDATE job SET priority = priority + 1"))

    database.write(work)
    assert queries.get(made.id).priority == 1


@only_postgres
def test_a_second_connection_is_opened_for_a_moment_and_the_first_stays(
    settings: "Settings", monkeypatch: pytest.MonkeyPatch
) -> None:
    database = open_database(settings, connections=2)

    def backend(conn: Any) -> int:
        return int(conn.execute(text("SELECT pg_backend_pid()")).scalar_one())

    def of_a_second_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(database.read(backend)))
        thread.start()
        thread.join()
        return found[0]

    def overlap(conn: Any) -> tuple[int, int]:
        return backend(conn), of_a_second_thread()

    first = database.read(backend)
    pairs = [database.write(overlap) for _ in range(3)]
    assert pairs == [(first, pairs[0][1])] * 3, "a connection was opened anew"
    assert pairs[0][1] != first
    assert database.read(backend) == first
    open_backends = text("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(:pids)")
    pids = {"pids": [*pairs[0]]}

    def still_open() -> int:
        return int(database.read(lambda conn: conn.execute(open_backends, pids).scalar_one()))

    assert still_open() == 2
    monkeypatch.setattr(postgres_module, "SPARE_S", 0.0)
    database.read(backend)
    for _ in range(100):  # the server's process ends a little later
        if still_open() == 1:
            break
        time.sleep(0.05)
    assert still_open() == 1
    assert database.read(backend) == first
    assert database.write(overlap)[0] == first
    database.dispose()


@only_postgres
def test_a_deadlock_is_tried_again(
    database: Database, job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    one, two = job_factory(), job_factory()
    both_hold_one = threading.Barrier(2, timeout=10)
    tries = []

    def crosswise(first: int, second: int) -> None:
        def work(conn: Any) -> None:
            tries.append(first)
            touch = text("UPDATE job SET priority = priority + 1 WHERE id = :id")
            conn.execute(touch, {"id": first})
            if len(tries) <= 2:
                both_hold_one.wait()
            conn.execute(touch, {"id": second})

        database.write(work)

    threads = [threading.Thread(target=crosswise, args=pair) for pair in ((one.id, two.id), (two.id, one.id))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(tries) == 3
    assert [queries.get(job.id).priority for job in (one, two)] == [2, 2]


def test_statements_with_the_databases_clock_are_compiled_once(
    database: Database, job_factory: "Callable[..., Job]", claim: "Claimer"
) -> None:
    """Compiling them again each time took half of a claim's time."""
    from storage.db.tables import utcnow

    assert select(utcnow())._generate_cache_key() is not None
