"""Making and upgrading the tables."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alembic.op
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from conftest import make_settings
from safetensors.torch import save_file
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

import storage.db.migrations.indexes  # noqa: F401 - they belong to the metadata
from jobs.errors import DatabaseUnavailableError, SchemaMismatchError, VolumeError
from jobs.networks.dcgan import Architecture
from storage.db.engine import SCHEMA_REVISION, Database, check_schema
from storage.db.schema import open_database, prepare, upgrade
from storage.db.tables import metadata
from storage.volume.layout import Volume
from storage.weights.import_job import import_weights

if TYPE_CHECKING:
    from tables import Claimer

    from storage.db.queries import Queries
    from storage.db.rows import Job
    from storage.db.store import JobStore
    from storage.settings import Settings


UNDO_INDEXES = ("DROP INDEX ix_job_held", "DROP INDEX ix_job_retry_of")
UNDO_WEBHOOKS = ("DROP TABLE delivery", "DROP TABLE webhook", "DROP TRIGGER event_is_delivered{on_event}")
UNDO_STEERING = (
    *(
        "DROP TABLE label",
        "DROP TABLE end_dependency",
        "DROP INDEX ix_job_begins",
        "DROP INDEX ix_job_throttled",
    ),
    "DROP INDEX ix_job_claimable",
    *(
        f"ALTER TABLE job DROP COLUMN {name}"
        for name in ("note", "begin_at", "max_running", "throttled", "position")
    ),
    "ALTER TABLE worker DROP COLUMN drain_requested_at",
    "CREATE INDEX ix_job_claimable ON job (id)",
)
"""The opposite of migration 0006."""


@pytest.fixture
def empty(empty_database_url: str, tmp_path: Path) -> Iterator[Any]:
    database = Database(make_settings(tmp_path, empty_database_url))
    yield database
    database.dispose()


def pretend(database: Database, revision: str, *, compatible_from: str | None = None) -> None:
    def work(conn: Connection) -> None:
        conn.execute(text("UPDATE alembic_version SET version_num = :new"), {"new": revision})
        oldest = {"oldest": compatible_from or revision}
        conn.execute(text("UPDATE schema_info SET compatible_from = :oldest"), oldest)

    database.write(work)


def test_an_empty_database_is_upgraded_and_once_more_changes_nothing(empty: Any) -> None:
    assert empty.revision() is None

    assert upgrade(empty) == (None, SCHEMA_REVISION)
    assert upgrade(empty) == (SCHEMA_REVISION, SCHEMA_REVISION)

    empty.require_schema()
    assert set(metadata.tables) < set(inspect(empty.engine).get_table_names())


def test_an_installation_keeps_the_id_that_its_upgrade_gave_it(empty: Any, tmp_path: Path) -> None:
    upgrade(empty)
    empty.require_schema()
    given = empty.installation
    assert len(given) == 8
    upgrade(empty)
    empty.require_schema()
    assert empty.installation == given

    other = Database(make_settings(tmp_path, f"sqlite:///{tmp_path / 'other.db'}"))
    upgrade(other)
    other.require_schema()
    assert other.installation not in ("", given)
    other.dispose()


@pytest.mark.parametrize(
    "change", ["ALTER TABLE schema_info DROP COLUMN installation", "DROP TABLE schema_info"]
)
def test_a_table_from_before_the_id_is_called_older_and_one_upgrade_gives_it(empty: Any, change: str) -> None:
    upgrade(empty)
    empty.write(lambda conn: conn.execute(text(change)))
    on_event = "" if empty.is_sqlite else " ON event"
    undo_webhooks = [undo.format(on_event=on_event) for undo in UNDO_WEBHOOKS]
    if not empty.is_sqlite:
        undo_webhooks += [f"DROP FUNCTION ganq_{name}" for name in ("deliver", "claim", "succeed_and_claim")]
    for undo in (
        *undo_webhooks,
        *UNDO_INDEXES,
        "DROP TABLE token",
        "ALTER TABLE job DROP COLUMN kept",
        *UNDO_STEERING,
    ):
        empty.write(lambda conn, sql=undo: conn.execute(text(sql)))
    empty.write(lambda conn: conn.execute(text("UPDATE alembic_version SET version_num = '0003'")))
    with pytest.raises(SchemaMismatchError, match="older"):
        empty.require_schema()
    if "COLUMN" in change:
        assert upgrade(empty) == ("0003", SCHEMA_REVISION)
        empty.require_schema()
        assert empty.installation


def test_two_upgrades_at_once_wait_for_each_other(
    empty: Any, empty_database_url: str, tmp_path: Path
) -> None:
    start = threading.Barrier(2)
    done, failed = [], []

    def run(database: Database) -> None:
        start.wait()
        try:
            done.append(upgrade(database))
        except Exception as exc:
            failed.append(exc)

    other = Database(make_settings(tmp_path, empty_database_url))
    threads = [threading.Thread(target=run, args=(database,)) for database in (empty, other)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    other.dispose()

    assert failed == []
    assert [now for _, now in done] == [SCHEMA_REVISION] * 2
    empty.require_schema()


@pytest.mark.filterwarnings("ignore:.*expression-based index")
def test_the_migrations_make_exactly_the_tables_of_the_models(database: Database) -> None:
    with database.engine.connect() as conn:
        context = MigrationContext.configure(
            conn,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                # Of an expression, which SQLAlchemy does not read from SQLite: see the next test.
                "include_object": lambda _, name, *__: name != "ix_job_running",
            },
        )
        assert compare_metadata(context, metadata) == []


def test_partial_indexes_and_triggers_are_those_of_the_models(database: Database, backend: str) -> None:
    """Alembic's comparison sees neither, so the database is asked itself."""
    ask = (
        "SELECT name, sql FROM sqlite_master WHERE type IN ('index', 'trigger') AND sql IS NOT NULL"
        if backend == "sqlite"
        else "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
        " UNION SELECT tgname::text, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal"
    )
    found = dict(map(tuple, database.read(lambda conn: conn.execute(text(ask)).all())))

    assert {"job_terminal_is_final", "event_is_append_only"} <= set(found)
    for name, condition in {
        "ix_job_claimable": ("'queued'", "held = 0", "blockers = 0"),
        "ix_job_running": ("'running'",),
        "uq_attempt_open": ("ended_at IS NULL",),
    }.items():
        _, _, where = found[name].partition("WHERE")
        assert all(part in where for part in condition), found[name]
    assert "UNIQUE" in found["uq_attempt_open"]
    assert "(id % " in found["ix_job_running"]


def test_a_database_without_tables_names_the_command(
    empty: Any, empty_database_url: str, tmp_path: Path, backend: str
) -> None:
    if backend == "sqlite":
        with empty.engine.connect():  # the file is there now, empty
            pass

    with pytest.raises(SchemaMismatchError) as caught:
        open_database(make_settings(tmp_path, empty_database_url))

    assert "has no tables yet" in caught.value.message
    assert "ganq db upgrade" in (caught.value.hint or "")


def test_an_older_database_is_refused_with_the_upgrade_command(
    database: Database, settings: "Settings"
) -> None:
    pretend(database, "0000")

    with pytest.raises(SchemaMismatchError) as caught:
        open_database(settings)

    assert "older (schema 0000)" in caught.value.message
    assert "ganq db upgrade" in (caught.value.hint or "")


def test_a_newer_database_is_refused_and_never_touched(database: Database, settings: "Settings") -> None:
    pretend(database, "9999")

    with pytest.raises(SchemaMismatchError) as caught:
        open_database(settings, create=True)
    assert "newer (schema 9999)" in caught.value.message
    assert "install" in (caught.value.hint or "")
    with pytest.raises(SchemaMismatchError):
        upgrade(database)

    assert database.revision() == "9999"


def test_a_newer_database_that_says_so_is_used_and_never_touched(
    database: Database,
    settings: "Settings",
    job_factory: "Callable[..., Job]",
    claim: "Claimer",
) -> None:
    pretend(database, "9999", compatible_from=SCHEMA_REVISION)

    open_database(settings).dispose()
    assert upgrade(database) == ("9999", "9999")
    made = job_factory()

    assert claim().job_id == made.id


def test_a_claim_looks_at_the_schema_in_its_own_transaction(
    database: Database,
    job_factory: "Callable[..., Job]",
    claim: "Claimer",
    queries: "Queries",
) -> None:
    made = job_factory()
    pretend(database, "9999")

    with pytest.raises(SchemaMismatchError):
        claim()

    assert queries.get(made.id).attempt == 0


def test_a_missing_column_is_blamed_on_the_schema_where_that_has_changed(
    database: Database, claim: "Claimer", job_factory: "Callable[..., Job]"
) -> None:
    job_factory()
    with pytest.raises(DBAPIError):
        database.write(lambda conn: conn.execute(text("UPDATE job SET gone = 1")))
    pretend(database, "9999")

    with pytest.raises(SchemaMismatchError) as caught:
        database.write(lambda conn: conn.execute(text("UPDATE job SET gone = 1")))

    assert "newer (schema 9999)" in caught.value.message


def test_an_upgrade_waits_until_a_claim_has_ended(
    database: Database, settings: "Settings", backend: str
) -> None:
    if backend == "sqlite":
        pytest.skip("on SQLite there is one write transaction at a time")
    begun, go_on = threading.Event(), threading.Event()

    def slow_claim() -> None:
        with database.engine.begin() as conn:
            check_schema(conn)
            begun.set()
            go_on.wait(10)

    claiming = threading.Thread(target=slow_claim)
    claiming.start()
    begun.wait(10)
    other = Database(settings)
    upgrading = threading.Thread(target=lambda: upgrade(other))
    upgrading.start()
    upgrading.join(0.5)
    assert upgrading.is_alive(), "it ran beside a claim"
    go_on.set()
    upgrading.join(10)
    claiming.join(10)
    other.dispose()
    assert not upgrading.is_alive()


def test_every_migration_since_the_second_says_which_code_may_still_run(database: Database) -> None:
    oldest = database.read(lambda conn: conn.execute(text("SELECT compatible_from FROM schema_info")).all())
    assert len(oldest) == 1
    assert "0002" <= oldest[0][0] <= SCHEMA_REVISION


def test_a_job_table_that_was_deleted_is_not_replaced_by_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "ganq.db"
    settings = make_settings(tmp_path, f"sqlite:///{path}")
    working = open_database(settings, create=True)
    working.write(lambda conn: conn.execute(text("UPDATE schema_info SET compatible_from = '0002'")))
    path.unlink()

    with pytest.raises(DatabaseUnavailableError) as caught:
        open_database(settings, create=True)
    working.dispose()

    assert "deleted or moved away" in caught.value.message
    assert "restore a backup" in (caught.value.hint or "")
    assert not path.exists()


def test_an_upgrade_that_fails_in_the_middle_leaves_an_empty_database(
    empty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(alembic.op, "execute", broken)  # the triggers come last
    with pytest.raises(RuntimeError):
        upgrade(empty)
    monkeypatch.undo()

    assert inspect(empty.engine).get_table_names() == []
    assert upgrade(empty) == (None, SCHEMA_REVISION)


def test_a_sqlite_file_that_is_not_there_is_made_only_by_those_who_may(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "home" / "ganq.db"
    settings = make_settings(tmp_path, f"sqlite:///{path}")

    with pytest.raises(SchemaMismatchError) as caught:
        open_database(settings)
    assert caught.value.missing is True
    assert str(path) in caught.value.message
    assert not path.parent.exists()

    open_database(settings, create=True).dispose()
    open_database(settings).dispose()


def test_a_crash_right_after_the_file_was_made_is_mended_by_the_next_command(tmp_path: Path) -> None:
    path = tmp_path / "ganq.db"
    path.touch()

    database = open_database(make_settings(tmp_path, f"sqlite:///{path}"), create=True)

    assert database.revision() == SCHEMA_REVISION
    database.dispose()


def test_a_volume_without_the_jobs_of_the_table_is_refused_before_anything_is_made(
    database: Database,
    settings: "Settings",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: "Claimer",
    tmp_path: Path,
) -> None:
    prepare(settings)
    job_factory()
    shutil.rmtree(settings.volume)
    prepare(settings)  # no job has ever been begun: there is nothing to be missed
    claim()
    shutil.rmtree(settings.volume)
    weights = Architecture(size=16, nz=8, ngf=4, ndf=4).build_generator(1).state_dict()
    save_file(weights, tmp_path / "g.safetensors")
    about: dict[str, Any] = {"netg": tmp_path / "g.safetensors", "netd": None, "name": "m", "user": "ada"}
    for begin in (
        lambda: prepare(settings),
        lambda: import_weights(store, Volume(settings.volume), **about),
    ):
        with pytest.raises(VolumeError, match="there are no jobs at"):
            begin()
        assert not settings.volume.exists()


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_a_worker_whose_database_became_an_older_one_says_so(database: Database, claim: "Claimer") -> None:
    drop = text("DROP FUNCTION ganq_claim, ganq_succeed_and_claim")
    database.write(lambda conn: conn.execute(drop))
    pretend(database, "0010")
    with pytest.raises(SchemaMismatchError, match="older"):
        claim()
