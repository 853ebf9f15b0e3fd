"""
A standby that lacks the last commits takes over (asynchronous replication): the volume is ahead of the table.

The tests put the rows back as such a standby has them; tests/chaos/test_database_faults.py has a real one.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from machine import LATER, Ganq, part, postgres_later, until, weights
from results import add_model, attempt_folder, result_files
from sqlalchemy import Connection, delete, insert, text, update
from tables import event_types, job_row

from storage.db.engine import Database
from storage.db.queries import Queries
from storage.db.rows import Checkpoint
from storage.db.tables import attempt, checkpoint, job
from storage.gc.policy import Policy
from storage.gc.sweep import Collector
from storage.settings import Settings
from storage.volume.layout import Volume

TRAIN = (
    "submit",
    "train",
    "--epochs",
    "40",
    "--save-every",
    "1000",
    "--metric",
    "none",
    "--checkpoint-seconds",
    "0.05",
)


def succeeded(database: Database, job_id: int) -> dict[str, Any]:
    def ended() -> bool:
        row = job_row(database, job_id)
        assert row["state"] not in ("failed", "cancelled"), row["error_message"]
        return bool(row["state"] == "succeeded")

    until(ended, what=f"the success of job {job_id}")
    return job_row(database, job_id)


def kill(worker: Any) -> None:
    """Kill the launcher first: it would start another supervisor."""
    supervisor, runner = part(worker, "worker.supervisor.loop"), part(worker, "worker.runner.main")
    worker.kill()
    for one in (supervisor, runner):
        with suppress(psutil.NoSuchProcess):
            if one is not None:
                one.kill()
                one.wait(10)
    worker.wait()


class Cut:
    """A training whose worker was killed, with every checkpoint row that it has ever had."""

    def __init__(self, ganq: Ganq, database: Database, small: list[str]) -> None:
        self.database = database
        slow = {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": "train.stepped=sleep:0.03@1+"}
        worker = ganq.start_worker("primary", **slow)
        self.id = int(ganq.json(*TRAIN, *small)["id"])
        seen: dict[int, Checkpoint] = {}

        def enough() -> bool:
            seen.update({one.id: one for one in Queries(database).checkpoints(self.id)})
            return len(seen) > 6

        until(enough, what="some checkpoints")
        kill(worker)
        enough()
        self.rows = [seen[one] for one in sorted(seen)]

    def table_has(self, *rows: Checkpoint) -> None:
        """Have the table end with these: the newer commits are lost, retention's with them."""

        def work(conn: Connection) -> None:
            conn.execute(delete(checkpoint).where(checkpoint.c.job_id == self.id))
            for row in rows:
                conn.execute(insert(checkpoint).values(**vars(row)))

        self.database.write(work)


@pytest.fixture
def undisturbed(ganq: Ganq, database: Database, small: list[str]) -> str:
    """The weights of the same training that nothing has happened to."""
    worker = ganq.start_worker("calm")
    row = succeeded(database, int(ganq.json(*TRAIN, *small)["id"]))
    kill(worker)
    return weights(attempt_folder(Path(ganq.env["GANQ_VOLUME"]), row) / "checkpoints" / "final")


@pytest.mark.tier2
def test_a_training_whose_newest_rows_were_lost_restores_what_is_on_the_volume(
    ganq: Ganq, database: Database, settings: Settings, small: list[str], undisturbed: str
) -> None:
    """All that the table points to was deleted by retention; it failed with CHECKPOINT_CORRUPT."""
    cut = Cut(ganq, database, small)
    volume = Volume(settings.volume)
    lost = [one for one in cut.rows if not volume.absolute(one.path).exists()]
    assert lost, "retention has deleted nothing"
    cut.table_has(lost[-1])
    collector = Collector(database, volume, Policy(grace_s=0.0))
    collector.sweep(collector.plan())
    ganq.start_worker("standby")
    row = succeeded(database, cut.id)
    assert event_types(database, cut.id).count("checkpoint_recovered") == 1
    assert row["result"]["resumed_from"] >= cut.rows[-1].step
    assert row["result"]["bit_exact"] is True
    assert weights(attempt_folder(settings.volume, row) / "checkpoints" / "final") == undisturbed
    mine = f"jobs/{cut.id:06d}/a{row['attempt']}/"
    registered = Queries(database).checkpoints(cut.id)
    assert all(one.path.startswith(mine) for one in registered if one.id != lost[-1].id)


@pytest.mark.tier2
def test_a_training_whose_newest_row_alone_was_lost_continues_from_the_one_before(
    ganq: Ganq, database: Database, settings: Settings, small: list[str], undisturbed: str
) -> None:
    cut = Cut(ganq, database, small)
    before = cut.rows[-2]
    assert Volume(settings.volume).absolute(before.path).is_dir(), "retention did not keep the one before"
    cut.table_has(before)
    ganq.start_worker("standby")
    row = succeeded(database, cut.id)
    assert row["result"]["resumed_from"] == before.step
    assert weights(attempt_folder(settings.volume, row) / "checkpoints" / "final") == undisturbed


@pytest.mark.tier2
def test_a_torn_checkpoint_is_not_restored(
    ganq: Ganq, database: Database, settings: Settings, small: list[str], undisturbed: str
) -> None:
    cut = Cut(ganq, database, small)
    volume = Volume(settings.volume)
    for folder in (volume.job(cut.id) / "a1" / "checkpoints").iterdir():
        state = folder / "state.safetensors"
        if state.exists():
            state.write_bytes(state.read_bytes()[:-1] + b"?")
    cut.table_has()
    ganq.start_worker("standby")
    row = succeeded(database, cut.id)
    assert "checkpoint_recovered" not in event_types(database, cut.id)
    assert row["result"]["resumed_from"] is None
    assert weights(attempt_folder(settings.volume, row) / "checkpoints" / "final") == undisturbed


@contextmanager
def terminal_rows_may_move(database: Database) -> Iterator[None]:
    """A standby's table was never in the state that the primary's trigger protects."""
    sqlite = database.is_sqlite
    name = "SELECT sql FROM sqlite_master WHERE type = 'trigger' AND name = 'job_terminal_is_final'"
    made = database.read(lambda conn: conn.execute(text(name)).scalar_one()) if sqlite else ""
    off = "DROP TRIGGER job_terminal_is_final" if sqlite else "ALTER TABLE job DISABLE TRIGGER USER"
    database.write(lambda conn: conn.execute(text(off)))
    yield
    on = made if sqlite else "ALTER TABLE job ENABLE TRIGGER USER"
    database.write(lambda conn: conn.execute(text(on)))


@postgres_later
@pytest.mark.parametrize("lost", ["its success", pytest.param("its claim", marks=LATER)])
def test_a_split_generation_that_comes_back_unfinished_ends_again_with_the_same_bytes(
    ganq: Ganq, database: Database, settings: Settings, lost: str
) -> None:
    """Its shards were deleted when its success was committed, and the standby knows of neither."""
    add_model(settings)
    worker = ganq.start_worker("primary")
    options = ("--from", "m", "--micro-batch", "4", "--grid", "16", "--count", "24", "--shard-size", "8")
    whole = int(ganq.json("submit", "generate", *options)["id"])
    made = result_files(attempt_folder(settings.volume, succeeded(database, whole)))
    shards = [Volume(settings.volume).job(one.id) for one in Queries(database).shards(whole)]
    until(lambda: not any(one.exists() for one in shards), what="the shards' folders to go")
    token = job_row(database, whole)["lease_token"]
    kill(worker)
    back: dict[str, Any] = {"finished_at": None, "result": None}
    if lost == "its success":
        back |= {"state": "running", "lease_token": token}
    else:
        back |= {"state": "queued", "lease_token": None, "attempt": 0, "worker": None, "started_at": None}

    def work(conn: Connection) -> None:
        conn.execute(update(job).where(job.c.id == whole).values(**back))
        if lost == "its success":
            again = update(attempt).where(attempt.c.job_id == whole)
            conn.execute(again.values(ended_at=None, outcome=None))
        else:
            conn.execute(delete(attempt).where(attempt.c.job_id == whole))

    with terminal_rows_may_move(database):
        database.write(work)
    ganq.start_worker("standby")
    row = succeeded(database, whole)
    assert result_files(attempt_folder(settings.volume, row)) == made
    assert event_types(database, whole).count("shard_regenerated") == 3
