"""What tests look at in the job table behind its back, and how they break it."""

import sqlite3
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event, func, select, text, update
from sqlalchemy.exc import OperationalError

from jobs.kinds import KINDS, SPEC_VERSION
from storage.db.engine import Database
from storage.db.rows import Lease, WorkerIdentity
from storage.db.store import HeartbeatRow, JobStore
from storage.db.tables import attempt, checkpoint, job
from storage.db.tables import event as event_table
from storage.settings import Settings


def job_row(database: Database, job_id: int) -> dict[str, Any]:
    """All columns of a job, lease token included."""
    return dict(
        database.read(lambda conn: conn.execute(select(job).where(job.c.id == job_id)).one())._mapping
    )


def everything_of(database: Database, job_id: int) -> tuple[Any, ...]:
    """All rows that belong to a job: equal before and after means that nothing was written."""

    def ask(conn: Connection) -> tuple[Any, ...]:
        return (
            tuple(conn.execute(select(job).where(job.c.id == job_id)).one()),
            *(
                tuple(map(tuple, conn.execute(select(table).where(table.c.job_id == job_id))))
                for table in (attempt, checkpoint, event_table)
            ),
        )

    return database.read(ask)


@dataclass(frozen=True)
class Seen:
    """What the table says of one job."""

    state: str
    attempt: int
    held: bool
    cancel: bool
    finished: bool
    open_attempts: int
    events: list[str]


def seen(database: Database, ids: Sequence[int]) -> dict[int, Seen]:
    """All of these jobs in one transaction, so that a test may ask after every step."""

    def ask(conn: Connection) -> dict[int, Seen]:
        events: dict[int, list[str]] = defaultdict(list)
        ordered = select(event_table.c.job_id, event_table.c.type).order_by(event_table.c.id)
        for job_id, type_ in conn.execute(ordered.where(event_table.c.job_id.in_(ids))):
            events[job_id].append(type_)
        still_open = select(attempt.c.job_id).where(attempt.c.job_id.in_(ids), attempt.c.ended_at.is_(None))
        open_ = Counter(conn.execute(still_open).scalars())
        return {
            row.id: Seen(
                row.state,
                row.attempt,
                bool(row.held),
                row.cancel_requested_at is not None,
                row.finished_at is not None,
                open_[row.id],
                events[row.id],
            )
            for row in conn.execute(select(job).where(job.c.id.in_(ids)))
        }

    return database.read(ask)


def open_attempts(database: Database, job_id: int) -> int:
    query = select(func.count()).where(attempt.c.job_id == job_id, attempt.c.ended_at.is_(None))
    return int(database.read(lambda conn: conn.execute(query).scalar_one()))


def event_types(database: Database, job_id: int) -> list[str]:
    query = select(event_table.c.type).where(event_table.c.job_id == job_id).order_by(event_table.c.id)
    return [str(one) for one in database.read(lambda conn: conn.execute(query).scalars().all())]


def set_columns(database: Database, job_id: int, **values: Any) -> None:
    """Change columns directly, e.g. to let a backoff pass without waiting for it."""
    database.write(lambda conn: conn.execute(update(job).where(job.c.id == job_id).values(**values)))


@contextmanager
def without_backoff(database: Database, *, crashes_count: bool = False) -> Iterator[None]:
    """A job that crashed may run at once, and as often as it takes unless crashes count: nobody waits."""
    done = threading.Event()
    change = "not_before = NULL" if crashes_count else "not_before = NULL, crash_count = 0"
    sql = text(f"UPDATE job SET {change} WHERE state = 'queued' AND not_before IS NOT NULL")

    def clear() -> None:
        while not done.wait(0.1):
            database.write(lambda conn: conn.execute(sql))

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@dataclass(frozen=True)
class Claimer:
    """Claim the best job as a worker of this version that runs all kinds: the fixture `claim`."""

    store: JobStore
    worker: WorkerIdentity

    def __call__(self, worker: WorkerIdentity | None = None, **changes: Any) -> Lease:
        """Return the lease; fail the test if there is no job to claim."""
        lease = self.or_none(worker, **changes)
        assert lease is not None, "there is no job to claim"
        return lease

    def or_none(self, worker: WorkerIdentity | None = None, **changes: Any) -> Lease | None:
        values: dict[str, Any] = {"kinds": tuple(KINDS), "spec_version": SPEC_VERSION}
        return self.store.claim(worker or self.worker, **{**values, **changes})


def beat_of(store: JobStore, job_id: int) -> HeartbeatRow:
    return next(one for one in store.running() if one.job_id == job_id)


@contextmanager
def first_answer_lost(database: Database) -> Iterator[None]:
    """The next transaction commits, but its caller sees the connection break: commit in doubt."""

    class LosesFirstAnswer:
        lost = False

        def __init__(self, real: Engine) -> None:
            self.real = real

        @contextmanager
        def begin(self) -> Iterator[Connection]:
            with self.real.begin() as conn:
                yield conn
            if not LosesFirstAnswer.lost:
                LosesFirstAnswer.lost = True
                raise OperationalError(
                    "COMMIT", {}, sqlite3.OperationalError("gone"), connection_invalidated=True
                )

    real = database.engine, database.autocommit_engine
    database.engine, database.autocommit_engine = map(LosesFirstAnswer, real)  # type: ignore[assignment]
    try:
        yield
    finally:
        database.engine, database.autocommit_engine = real
    assert LosesFirstAnswer.lost, "no transaction was committed"


def explained(
    database: Database, statement: str, parameters: Any, *, explain: str = "EXPLAIN QUERY PLAN "
) -> str:
    """Return the plan of a recorded statement, one line for each of its rows."""

    def ask(conn: Connection) -> str:
        return "\n".join(str(row[-1]) for row in conn.exec_driver_sql(explain + statement, parameters).all())

    return database.read(ask)


@contextmanager
def recorded(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """Every statement that is sent meanwhile, with its parameters."""
    sent: list[tuple[str, Any]] = []

    def note(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        sent.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


def claim_all(settings: Settings, who: WorkerIdentity, sink: Path) -> None:
    """A process that claims jobs until there are none, and writes down which it got."""
    database = Database(settings)
    store = JobStore(database)
    got: list[Lease] = []
    while lease := store.claim(who, kinds=("train",), spec_version=SPEC_VERSION):
        got.append(lease)
    sink.write_text("\n".join(f"{one.job_id} {one.attempt} {one.token}" for one in got))
    database.dispose()
