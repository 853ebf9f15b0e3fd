"""Rows that ganq did not write: fail them, or make them claimable again."""

from functools import partial

from sqlalchemy import Connection, func, select, update

from jobs.states import JobState, Outcome
from storage.db.malformed import malformed_error, unclaimable_ids, with_numbers
from storage.db.rows import Job
from storage.db.store.transitions import StoreMixin, storable_text, transition
from storage.db.tables import attempt, job, utcnow

LATE = 1000
"""Ids below the newest that are checked again, because their transactions may have committed later."""


class MalformedMixin(StoreMixin):
    """Fail jobs that no claim would find."""

    def fail_malformed(self, after_id: int) -> tuple[list[int], int]:
        """
        Fail queued jobs above an id that no worker of this version can claim.

        Returns:
            Their ids, and the id from which the next call starts.
        """

        def find(conn: Connection) -> tuple[list[int], int]:
            newest = conn.execute(select(func.max(job.c.id))).scalar_one() or 0
            return unclaimable_ids(conn, after_id), max(after_id, newest - LATE)

        found, next_id = self.database.read(find)
        failed = [one for one in found if self.database.write(partial(_fail, job_id=one))]
        return failed, next_id


def _fail(conn: Connection, job_id: int) -> bool:
    row = conn.execute(select(job).where(job.c.id == job_id).with_for_update()).first()
    if row is None or row.state != JobState.QUEUED or (seen := Job.from_row(row)).malformed is None:
        return False
    error = malformed_error(seen)
    columns = {
        "error_code": error.code,
        "error_message": storable_text(error.message),
        "error_hint": error.hint,
    }
    transition(conn, with_numbers(conn, row), JobState.FAILED, None, columns, None)
    return True


def close_attempts(conn: Connection, job_id: int) -> None:
    """
    Make a queued job claimable whose state was changed by hand, so that its claim violates a constraint.

    An attempt of it is still open, or has a higher number than the job.
    """
    queued = select(job.c.id).where(job.c.id == job_id, job.c.state == JobState.QUEUED).with_for_update()
    if conn.execute(queued).first() is None:
        return
    still_open = update(attempt).where(attempt.c.job_id == job_id, attempt.c.ended_at.is_(None))
    conn.execute(still_open.values(ended_at=utcnow(), outcome=Outcome.LOST))
    last = select(func.coalesce(func.max(attempt.c.number), 0)).where(attempt.c.job_id == job_id)
    behind = update(job).where(job.c.id == job_id, job.c.attempt < last.scalar_subquery())
    conn.execute(behind.values(attempt=last.scalar_subquery()))
