"""Queries of the reaper and the dispatcher: unresponsive workers, and jobs that need a notification."""

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    exists,
    literal_column,
    or_,
    select,
    text,
    union,
    update,
)

from jobs.states import JobState, Outcome
from storage.db.store.scheduling import due_in, due_jobs, release_due_jobs
from storage.db.store.transitions import (
    LOST_WITHIN_S,
    StoreMixin,
    after_loss,
    record_event,
    seconds_of_attempt,
    transition,
    update_dependants,
)
from storage.db.store.waiting import begin_due, begins_in, ended_unresolved, fill_slots, throttled_sweeps
from storage.db.tables import BUCKET, CLAIMABLE, RUNNING, attempt, job, utcnow, worker

log = logging.getLogger("ganq.recovery")


BUCKETS = 64
"""Parts of the running jobs, by id, that are watched by different supervisors."""


@dataclass(frozen=True)
class WatchShare:
    """The running jobs that one supervisor watches."""

    buckets: tuple[int, ...]
    """Ids modulo BUCKETS."""
    workers: tuple[str, ...]
    """Workers of its machine, whose processes it can see."""
    leads: bool = True
    """Whether it also does what a few do for all: notify again, and release jobs that wait."""


@dataclass(frozen=True)
class HeartbeatRow:
    """Heartbeat counter of a running job, and the process of its supervisor."""

    job_id: int
    attempt: int
    hb_seq: int
    host: str | None
    boot_id: str | None
    pid: int | None
    start_ticks: int | None
    worker: str | None


RUNNING_JOBS = (
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


class ReapMixin(StoreMixin):
    """Requeue lost jobs, notify again."""

    def live_workers(self, name: str, *, within_s: float) -> list[tuple[str, str]]:
        """
        Return (name, host) of each worker of this one's version that has reported within so many seconds.

        Others may divide the work in another way, or not at all.
        """
        same = select(worker.c.version).where(worker.c.name == name).scalar_subquery()
        live = select(worker.c.name, worker.c.host).where(
            worker.c.state != "stopped", worker.c.seen_at > utcnow() - within_s, worker.c.version == same
        )
        return self.database.read(lambda conn: [(row.name, row.host) for row in conn.execute(live)])

    def running(self, share: "WatchShare | None" = None) -> list[HeartbeatRow]:
        """
        Return running jobs with their heartbeat counters.

        Args:
            share: which of them; None: all.
        """
        wanted = RUNNING_JOBS if share is None else _watched(share)
        return self.database.read(lambda conn: [HeartbeatRow(*row) for row in conn.execute(wanted)])

    def requeue_lost(
        self,
        heartbeat: HeartbeatRow,
        why: str,
        *,
        within_s: float = float("inf"),
        ran_s: float = float("inf"),
    ) -> JobState | None:
        """
        Requeue a job whose worker is unresponsive (the reaper's compare-and-set).

        Args:
            within_s: change nothing if the table could not be written for so long, because then the
                worker could not send heartbeats either.
            ran_s: upper bound of the attempt's duration, by a monotonic clock.

        Returns:
            The job's new state, or None if it has changed meanwhile.
        """
        began = time.monotonic()
        detail: dict[str, Any] = {"reason": why}

        def work(conn: Connection) -> JobState | None:
            nonlocal detail
            row = conn.execute(
                select(job)
                .where(
                    job.c.id == heartbeat.job_id,
                    job.c.state == JobState.RUNNING,
                    job.c.attempt == heartbeat.attempt,
                    job.c.hb_seq == heartbeat.hb_seq,
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
            transition(conn, row, new, Outcome.LOST, values, detail)
            return new

        state = self.database.write(work)
        if state is not None and "pause_s" in detail:
            log.warning(
                "job %s was lost %s times within %.0f minutes: it waits %.0f s; see ganq doctor",
                *(heartbeat.job_id, detail["times"], LOST_WITHIN_S / 60, detail["pause_s"]),
            )
        return state

    def idle_workers(self, *, within_s: float) -> list[tuple[str, ...]]:
        """Return the queues of each worker that is idle and has reported within `within_s` seconds."""
        idle = select(worker.c.queues).where(_idle(within_s))
        return self.database.read(
            lambda conn: [tuple(row.split(",")) for row in conn.execute(idle).scalars()]
        )

    def any_to_notify(self, *, again_s: float, idle_within_s: float) -> bool:
        """
        Return whether due_notifications() may return a job for an idle worker, or release one.

        Without an idle worker the queue is not read: if all its jobs were notified, that would be all of it.
        """
        is_idle = exists().where(_idle(idle_within_s))
        due = _notification_due(again_s).where(is_idle).limit(1)
        return self.database.read(lambda conn: conn.execute(due).first() is not None or self._any_due(conn))

    def due_notifications(
        self, *, again_s: float, limit: int, queues: Collection[str] | None = None
    ) -> list[tuple[int, str]]:
        """
        Return queued jobs without a notification, or with an old one, and mark them as notified.

        Args:
            again_s: age from which a notification is repeated.
            queues: only of these; None: of all.

        Returns:
            (job id, queue), in no order: a notification is a hint, and the claim takes the best job.
        """
        due = _notification_due(again_s)
        if queues is not None:
            due = due.where(job.c.queue.in_(queues))
        # Read without locks first: usually there is nothing to do.
        if not self.database.read(lambda conn: conn.execute(due.limit(1)).first() or self._any_due(conn)):
            return []

        def work(conn: Connection) -> list[tuple[int, str]]:
            release_due_jobs(conn, self.database.backoffs)
            rows = conn.execute(due.limit(limit).with_for_update(skip_locked=True)).all()
            if rows:
                conn.execute(
                    update(job).where(job.c.id.in_([row.id for row in rows])).values(rung_at=utcnow())
                )
            return [(row.id, row.queue) for row in rows]

        return self.database.write(work)

    def _any_due(self, conn: Connection) -> bool:
        return bool(due_jobs(conn, self.database.backoffs, 1))

    def due_in(self) -> float | None:
        """Return the seconds until the next delayed job may be claimed; None if there is none."""
        return self.database.read(partial(due_in, backoffs=self.database.backoffs))

    def release_waiting(self) -> tuple[int, float | None]:
        """
        Release jobs whose time has come, those whose needed job an older worker has ended, and those for
        which their sweep has room.

        Returns:
            Number of them, and the seconds until the next job's time comes; None: none waits for a time.
        """

        def peek(conn: Connection) -> tuple[float | None, bool]:
            next_s = begins_in(conn)
            return next_s, bool(ended_unresolved(conn) or throttled_sweeps(conn))

        next_s, others = self.database.read(peek)
        if not others and (next_s is None or next_s > 0):
            return 0, next_s

        def work(conn: Connection) -> tuple[int, float | None]:
            due = begin_due(conn)
            for one in due:
                record_event(conn, one, "begin_reached")
            ended = ended_unresolved(conn)
            for needed, state in ended:
                update_dependants(conn, needed, state, late=True)
            filled = sum(fill_slots(conn, *sweep) for sweep in throttled_sweeps(conn))
            return len(due) + len(ended) + filled, begins_in(conn)

        return self.database.write(work)

    def not_notified(self, job_id: int) -> None:
        """Record that the submitter could not notify, so that the dispatcher does it."""
        self.database.write(
            lambda conn: conn.execute(update(job).where(job.c.id == job_id).values(rung_at=None)),
            patience_s=2.0,
        )


@lru_cache(maxsize=256)
def _watched(share: WatchShare) -> Any:
    """Return the statement for a share: to build it takes longer than all else of a look but the database."""
    # Two parts, each by an index: one condition with OR would read all running jobs.
    here = select(worker.c.job_id).where(worker.c.name.in_(share.workers))
    return union(
        RUNNING_JOBS.where(literal_column(BUCKET).in_(share.buckets)),
        RUNNING_JOBS.where(job.c.id.in_(here)),
    )


def _idle(within_s: float) -> ColumnElement[bool]:
    return and_(worker.c.state == "idle", worker.c.seen_at > utcnow() - within_s)


def _notification_due(again_s: float) -> Select[Any]:
    return select(job.c.id, job.c.queue).where(
        text(CLAIMABLE),
        # A time in the future was written before the clock was set back.
        or_(
            job.c.rung_at.is_(None),
            job.c.rung_at < utcnow() - again_s,
            job.c.rung_at > utcnow() + again_s,
        ),
    )
