"""
What a job waits for beside the success of other jobs: a time, the end of another job, a place in its sweep.

Each counts in the column `blockers`, which keeps workers of ganq 0.2 from claiming the job. The transaction
that ends a job releases those that wait for it; release_waiting(), which each supervisor calls, releases the
rest: jobs whose time has come, and those of a job that an older worker has ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, func, insert, or_, select, text, update

from jobs.errors import JobNotFoundError, SpecError
from jobs.states import JobState
from storage.db.postgres import USUAL_PLANS
from storage.db.tables import (
    BEGINS,
    CLOCKS,
    THROTTLED,
    UNRESOLVED,
    end_dependency,
    indexed_by,
    job,
    label,
    utcnow,
)

Condition = Literal["any", "fail"]
BATCH_SIZE = 500

_BEGINS = {
    dialect: text(
        f"SELECT id FROM job {indexed_by(dialect, 'ix_job_begins')} WHERE {BEGINS} AND begin_at <= {clock}"
        f" ORDER BY begin_at LIMIT {BATCH_SIZE}"
        + (" FOR UPDATE SKIP LOCKED" if dialect == "postgresql" else "")
    )
    for dialect, clock in CLOCKS.items()
}
_BEGINS_IN = {
    dialect: text(
        f"SELECT min(begin_at) - {clock} FROM job {indexed_by(dialect, 'ix_job_begins')} WHERE {BEGINS}"
    )
    for dialect, clock in CLOCKS.items()
}
_THROTTLED = {
    dialect: text(
        f"SELECT DISTINCT sweep, max_running FROM job {indexed_by(dialect, 'ix_job_throttled')}"
        f" WHERE {THROTTLED}"
    )
    for dialect in CLOCKS
}
_NEXT = {
    dialect: text(
        f"SELECT id FROM job {indexed_by(dialect, 'ix_job_throttled')} WHERE {THROTTLED} AND sweep = :sweep"
        " AND held = 0 ORDER BY id LIMIT :free"
        + (" FOR UPDATE SKIP LOCKED" if dialect == "postgresql" else "")
    )
    for dialect in CLOCKS
}


@dataclass(frozen=True)
class Extras:
    """What few jobs have: a note, labels, a time to begin, conditions of their start."""

    note: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    begin_at: float | None = None
    """Seconds since 1970 by the database's clock; a time in the past has no effect."""
    after_any: Sequence[int] = ()
    """Jobs that must have ended, with any outcome."""
    after_fail: Sequence[int] = ()
    """Jobs that must have failed."""
    max_running: int | None = None
    """Jobs of the sweep that may run at once."""

    def __bool__(self) -> bool:
        return self != NO_EXTRAS


NO_EXTRAS = Extras()


@dataclass(frozen=True)
class Waits:
    """The unfulfilled conditions of a new job."""

    begin_at: float | None
    ends: tuple[tuple[int, Condition], ...]

    @property
    def blockers(self) -> int:
        return len(self.ends) + (self.begin_at is not None)


def lock_conditions(conn: Connection, extras: Extras, after: Sequence[int]) -> Waits:
    """
    Lock the jobs whose end a new one waits for, so that none can end before the insert.

    Args:
        after: jobs that must succeed.

    Raises:
        JobNotFoundError: one does not exist.
        SpecError: one has ended in another way, or the conditions contradict each other.
    """
    begin_at = extras.begin_at
    if begin_at is not None and begin_at <= float(conn.execute(select(utcnow())).scalar_one()):
        begin_at = None
    if both := set(extras.after_fail) & {*after, *extras.after_any}:
        raise SpecError(
            f"a job cannot wait for the failure of job {min(both)} and for another end of it, too",
            hint="use --after-any to run in either case",
        )
    wanted: dict[int, Condition] = dict.fromkeys(extras.after_any, "any")
    wanted |= dict.fromkeys(extras.after_fail, "fail")
    ends: list[tuple[int, Condition]] = []
    for needed in sorted(set(wanted) - set(after)):  # one order for all, so that two submits cannot deadlock
        state = conn.execute(
            select(job.c.state).where(job.c.id == needed).with_for_update()
        ).scalar_one_or_none()
        if state is None:
            raise JobNotFoundError(f"there is no job {needed} to wait for", hint="ganq status lists them")
        if not JobState(state).terminal:
            ends.append((needed, wanted[needed]))
        elif not fulfilled(wanted[needed], JobState(state)):
            raise SpecError(
                f"job {needed} has {state}, so a job after its failure would never run",
                hint="--after-any starts in either case",
            )
    return Waits(begin_at, tuple(ends))


def fulfilled(condition: str, ended: JobState) -> bool:
    """Return whether the end of a job fulfils this condition: success, any, fail."""
    return condition == "any" or ended is (JobState.FAILED if condition == "fail" else JobState.SUCCEEDED)


def insert_extras(conn: Connection, ids: Sequence[int], extras: Extras, waits: Waits) -> None:
    """Insert the labels and conditions of new jobs."""
    labels = [
        {"job_id": one, "key": key, "value": value} for one in ids for key, value in extras.labels.items()
    ]
    if labels:
        conn.execute(insert(label), labels)
    ends = [{"job_id": one, "needs": needs, "condition": how} for one in ids for needs, how in waits.ends]
    if ends:
        conn.execute(insert(end_dependency), ends)


def fill_slots(conn: Connection, sweep: str, max_running: int) -> int:
    """Release as many jobs of a sweep with --max-running as its limit allows; return their number."""
    free = max_running - _active(conn, sweep)
    if free <= 0:
        return 0
    chosen = conn.execute(_NEXT[conn.dialect.name], {"sweep": sweep, "free": free}).scalars().all()
    if chosen:
        released = {"throttled": 0, "blockers": job.c.blockers - 1, "rung_at": None}
        conn.execute(update(job).where(job.c.id.in_(chosen), text(THROTTLED)).values(released))
    return len(chosen)


def _active(conn: Connection, sweep: str) -> int:
    """Return how many jobs of a sweep run or may run."""
    active = select(func.count()).where(
        text("sweep IS NOT NULL"),
        job.c.sweep == sweep,
        job.c.throttled == 0,
        or_(job.c.state == JobState.RUNNING, (job.c.state == JobState.QUEUED) & (job.c.held == 0)),
    )
    if conn.dialect.name == "sqlite":
        return int(conn.execute(active).scalar_one())
    # Of a large sweep most jobs have ended. A worker's settings (OF_WORKERS) exclude the plan that
    # intersects indexes, and read all of them; the end of the savepoint restores these settings.
    with conn.begin_nested() as planning:
        conn.exec_driver_sql(USUAL_PLANS)
        found = int(conn.execute(active).scalar_one())
        planning.rollback()
    return found


def throttle_again(conn: Connection, row: Any) -> None:
    """Throttle a released job of a sweep again: others may have taken its place meanwhile."""
    waits = {"throttled": 1, "blockers": job.c.blockers + 1}
    conn.execute(update(job).where(job.c.id == row.id, job.c.throttled == 0).values(waits))


def begin_due(conn: Connection) -> list[int]:
    """Release the jobs whose time has come; return their ids."""
    due = list(conn.execute(_BEGINS[conn.dialect.name]).scalars())
    if due:
        begun = {"begin_at": None, "blockers": job.c.blockers - 1, "rung_at": None}
        conn.execute(update(job).where(job.c.id.in_(due), text(BEGINS)).values(begun))
    return due


def begins_in(conn: Connection) -> float | None:
    """Return the seconds until the next job's time comes; None if none waits for one."""
    found: float | None = conn.execute(_BEGINS_IN[conn.dialect.name]).scalar_one_or_none()
    return found


def ended_unresolved(conn: Connection) -> list[tuple[int, JobState]]:
    """Return the jobs that have ended, and for whose end others still wait: an older worker ended them."""
    query = (
        select(job.c.id, job.c.state)
        .join(end_dependency, end_dependency.c.needs == job.c.id)
        .where(text(UNRESOLVED), job.c.state.not_in((JobState.QUEUED, JobState.RUNNING)))
        .distinct()
    )
    return [(row.id, JobState(row.state)) for row in conn.execute(query)]


def throttled_sweeps(conn: Connection) -> list[tuple[str, int]]:
    """Return (sweep, max_running) of each sweep with jobs that wait for a place."""
    rows = conn.execute(_THROTTLED[conn.dialect.name]).all()
    return [(row.sweep, row.max_running) for row in rows if row.sweep and row.max_running]
