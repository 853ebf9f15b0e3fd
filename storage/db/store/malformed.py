"""Jobs whose rows no ganq wrote: end them, or make them claimable again."""

from functools import partial

from sqlalchemy import Connection, func, select, update

from jobs.states import JobState, Outcome
from storage.db.malformed import never_claimed, readable, refusal
from storage.db.rows import Job
from storage.db.store.base import Store
from storage.db.store.transitions import leave, plain
from storage.db.tables import attempt, job, utcnow

LATE = 1000
"""Ids below the newest that are looked at again: their transactions may have committed after it."""


class Malformed(Store):
    """Fail what no claim would ever find."""

    def fail_malformed(self, after_id: int) -> tuple[list[int], int]:
        """
        Fail queued jobs above an id that cannot be claimed by any worker of this version.

        Returns:
            Their ids, and the id to begin with the next time.
        """

        def look(conn: Connection) -> tuple[list[int], int]:
            newest = conn.execute(select(func.max(job.c.id))).scalar_one() or 0
            return never_claimed(conn, after_id), max(after_id, newest - LATE)

        found, next_id = self.database.read(look)
        failed = [one for one in found if self.database.write(partial(_fail, job_id=one))]
        return failed, next_id


def _fail(conn: Connection, job_id: int) -> bool:
    row = conn.execute(select(job).where(job.c.id == job_id).with_for_update()).first()
    if row is None or row.state != JobState.QUEUED or (seen := Job.from_row(row)).malformed is None:
        return False
    error = refusal(seen)
    told = {"error_code": error.code, "error_message": plain(error.message), "error_hint": error.hint}
    leave(conn, readable(conn, row), JobState.FAILED, None, told, None)
    return True


def close_attempts(conn: Connection, job_id: int) -> None:
    """
    Make a queued job claimable whose attempts say that it runs, or that a later one has been.

    Somebody has changed its state by hand, and each claim of it violates a constraint.
    """
    queued = select(job.c.id).where(job.c.id == job_id, job.c.state == JobState.QUEUED).with_for_update()
    if conn.execute(queued).first() is None:
        return
    still_open = update(attempt).where(attempt.c.job_id == job_id, attempt.c.ended_at.is_(None))
    conn.execute(still_open.values(ended_at=utcnow(), outcome=Outcome.LOST))
    last = select(func.coalesce(func.max(attempt.c.number), 0)).where(attempt.c.job_id == job_id)
    behind = update(job).where(job.c.id == job_id, job.c.attempt < last.scalar_subquery())
    conn.execute(behind.values(attempt=last.scalar_subquery()))
