"""For the reaper and the dispatcher: who is silent, and who must be rung for."""

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, and_, or_, select, text, update

from jobs.states import JobState, Outcome
from storage.db.store.base import Store
from storage.db.store.scheduling import due_in, due_jobs, release_due_jobs
from storage.db.store.transitions import LOST_WITHIN_S, after_loss, leave, seconds_of_attempt
from storage.db.tables import CLAIMABLE, RUNNING, attempt, job, utcnow

log = logging.getLogger("ganq.recovery")


@dataclass(frozen=True)
class HeartbeatRow:
    """One running job as the reaper sees it."""

    job_id: int
    attempt: int
    hb_seq: int
    host: str | None
    boot_id: str | None
    pid: int | None
    start_ticks: int | None
    worker: str | None


class Recovering(Store):
    """Take jobs back, ring again."""

    def running(self) -> list[HeartbeatRow]:
        """All running jobs with their heartbeat counters, for the reaper."""

        def work(conn: Connection) -> list[HeartbeatRow]:
            rows = conn.execute(
                select(
                    job.c.id,
                    job.c.attempt,
                    job.c.hb_seq,
                    attempt.c.host,
                    attempt.c.boot_id,
                    attempt.c.pid,
                    attempt.c.start_ticks,
                    job.c.worker,
                )
                .outerjoin(attempt, and_(attempt.c.job_id == job.c.id, attempt.c.number == job.c.attempt))
                .where(text(f"job.{RUNNING}"))
            )
            return [HeartbeatRow(*row) for row in rows]

        return self.database.read(work)

    def rescue(
        self, beat: HeartbeatRow, why: str, *, within_s: float = float("inf"), ran_s: float = float("inf")
    ) -> JobState | None:
        """
        Take a job back from a worker that fell silent (the reaper's compare-and-set).

        Args:
            within_s: let it be if the table could not be written for so long: whoever
                kept us waiting has kept the worker from beating, too.
            ran_s: what the attempt has run at most, by a clock that nobody can set.

        Returns:
            The job's new state, or None if it moved by itself in the meantime.
        """
        began = time.monotonic()
        detail: dict[str, Any] = {"reason": why}

        def work(conn: Connection) -> JobState | None:
            nonlocal detail
            row = conn.execute(
                select(job)
                .where(
                    job.c.id == beat.job_id,
                    job.c.state == JobState.RUNNING,
                    job.c.attempt == beat.attempt,
                    job.c.hb_seq == beat.hb_seq,
                )
                .with_for_update()
            ).first()
            if row is None or time.monotonic() - began > within_s:
                return None
            if row.cancel_requested_at is not None:
                new: JobState = JobState.CANCELLED
                values: dict[str, Any] = {}
            else:
                new = JobState.QUEUED
                values, detail = after_loss(conn, row.id, why)
            values = {**values, "ran_s": job.c.ran_s + seconds_of_attempt(row, ran_s)}
            leave(conn, row, new, Outcome.LOST, values, detail)
            return new

        state = self.database.write(work)
        if state is not None and "pause_s" in detail:
            log.warning(
                "job %s was lost %s times within %.0f minutes: it waits %.0f s; see ganq doctor",
                *(beat.job_id, detail["times"], LOST_WITHIN_S / 60, detail["pause_s"]),
            )
        return state

    def due_notifications(self, *, again_s: float, limit: int) -> list[tuple[int, str]]:
        """
        Queued jobs that nobody was told of, or too long ago; marks them as rung.

        Returns:
            (job id, queue). In no order: a bell is a hint, and the claim takes the best job.
        """
        silent = select(job.c.id, job.c.queue).where(
            text(CLAIMABLE),
            # A bell of the future was noted before somebody set the clock back.
            or_(
                job.c.rung_at.is_(None),
                job.c.rung_at < utcnow() - again_s,
                job.c.rung_at > utcnow() + again_s,
            ),
        )
        # A look that locks nothing first: most of the time there is nothing to ring for.
        if not self.database.read(lambda conn: conn.execute(silent.limit(1)).first() or self._ripe(conn)):
            return []

        def work(conn: Connection) -> list[tuple[int, str]]:
            release_due_jobs(conn, self.database.backoffs)
            rows = conn.execute(silent.limit(limit).with_for_update(skip_locked=True)).all()
            if rows:
                conn.execute(
                    update(job).where(job.c.id.in_([row.id for row in rows])).values(rung_at=utcnow())
                )
            return [(row.id, row.queue) for row in rows]

        return self.database.write(work)

    def _ripe(self, conn: Connection) -> bool:
        return bool(due_jobs(conn, self.database.backoffs, 1))

    def due_in(self) -> float | None:
        """Seconds until the next job that waits for its time may be claimed; None if none waits."""

        return self.database.read(partial(due_in, backoffs=self.database.backoffs))

    def not_notified(self, job_id: int) -> None:
        """The submitter could not ring after all: the dispatcher does it at its next look."""
        self.database.write(
            lambda conn: conn.execute(update(job).where(job.c.id == job_id).values(rung_at=None)),
            patience_s=2.0,
        )
