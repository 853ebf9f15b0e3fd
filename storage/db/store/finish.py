"""Finish an attempt: succeeded, cancelled, requeued, retried, failed or crashed."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection, select

from jobs.errors import GanqError, Retry
from jobs.states import JobState, Outcome, StopReason
from storage.db.malformed import with_numbers
from storage.db.rows import Lease
from storage.db.store.transitions import (
    BACKOFF_S,
    FENCE,
    Decision,
    StoreMixin,
    after_crash,
    fence_values,
    finish_fenced,
    lease_lost,
    storable_text,
    transition,
)
from storage.db.tables import attempt, job, utcnow

MAX_TRIES = 6
"""Attempts that may end with the same error of policy Retry.SOME; with backoff they take three minutes."""

OWN_ROW = select(job).where(FENCE).with_for_update()


class FinishMixin(StoreMixin):
    """Finish an attempt, exactly once."""

    def succeed(self, lease: Lease, result: dict[str, Any]) -> None:
        """
        Commit the result, which publishes it.

        Raises:
            LeaseLostError: the job belongs to another attempt; the result is discarded.
        """
        self.database.write(lambda conn: publish(conn, lease, result))

    def cancel_done(self, lease: Lease) -> None:
        """Record that the runner has stopped because of a cancel request."""

        def decide(row: Any) -> Decision:
            return JobState.CANCELLED, Outcome.CANCELLED, {}

        self._finish(lease, decide, {Outcome.CANCELLED}, None)

    def release(self, lease: Lease, reason: str) -> JobState:
        """
        Requeue the job after a drain or a preemption; not counted as a failure.

        Returns:
            The job's state: queued, or cancelled if a cancel was requested meanwhile.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """

        def decide(row: Any) -> Decision:
            if row.cancel_requested_at is not None:
                return JobState.CANCELLED, Outcome.CANCELLED, {}
            if reason == StopReason.PREEMPT:
                yielded = {"yields": row.yields + 1, "yielded_at": utcnow()}
                return JobState.QUEUED, Outcome.REQUEUED, yielded
            return JobState.QUEUED, Outcome.REQUEUED, {}

        return self._finish(lease, decide, {Outcome.REQUEUED, Outcome.CANCELLED}, {"reason": reason})

    def fail(self, lease: Lease, error: GanqError) -> JobState:
        """Fail or retry the job, as the retry policy of the error says; return the job's state now."""
        columns = {
            "error_code": error.code,
            "error_message": storable_text(error.message),
            "error_hint": storable_text(error.hint),
        }

        def decide(conn: Connection, row: Any) -> Decision:
            if row.cancel_requested_at is not None:
                return JobState.CANCELLED, Outcome.CANCELLED, {}
            tries = error.retry is Retry.SOME and not _retries_exhausted(conn, row, error.code)
            if error.retry is Retry.LATER or tries:
                later = utcnow() + BACKOFF_S[min(row.waits, len(BACKOFF_S) - 1)]
                waiting = {"not_before": later, "waits": row.waits + 1}
                return JobState.QUEUED, Outcome.RETRIED, {**columns, **waiting}
            if error.retry is Retry.FRESH and row.fresh_retries < 1:
                return JobState.QUEUED, Outcome.RETRIED, {**columns, "fresh_retries": row.fresh_retries + 1}
            return JobState.FAILED, Outcome.FAILED, columns

        outcomes = {Outcome.RETRIED, Outcome.FAILED, Outcome.CANCELLED}
        detail = {"code": error.code, "message": error.message}
        return self.database.write(
            lambda conn: finish_attempt(conn, lease, partial(decide, conn), outcomes, detail)
        )

    def crashed(self, lease: Lease, message: str, *, hung: bool = False) -> JobState:
        """
        Record that the runner died while its supervisor was alive; the third time without progress fails
        the job.

        Returns:
            The job's state now.
        """

        def decide(row: Any) -> Decision:
            return after_crash(row, message, hung=hung)

        return self._finish(lease, decide, {Outcome.CRASHED, Outcome.CANCELLED}, {"message": message})

    def _finish(
        self,
        lease: Lease,
        decide: Callable[[Any], Decision],
        outcomes: set[Outcome],
        detail: dict[str, Any] | None,
    ) -> JobState:
        return self.database.write(lambda conn: finish_attempt(conn, lease, decide, outcomes, detail))


def _retries_exhausted(conn: Connection, row: Any, code: str) -> bool:
    """Return whether all earlier attempts allowed by MAX_TRIES ended with this error, without progress."""
    before = MAX_TRIES - 1
    if row.waits < before:  # a checkpoint resets it
        return False
    last = (
        select(attempt.c.error_code)
        .where(attempt.c.job_id == row.id, attempt.c.number < row.attempt)
        .order_by(attempt.c.number.desc())
        .limit(before)
    )
    return list(conn.execute(last).scalars()) == [code] * before


def bit_exact(result: dict[str, Any]) -> int | None:
    """Return the column `bit_exact` of a job with this result."""
    found = result.get("bit_exact")
    return None if found is None else int(found)


def publish(conn: Connection, lease: Lease, result: dict[str, Any]) -> None:
    """Run FinishMixin.succeed() in the caller's transaction."""
    values = {
        "result": result,
        "bit_exact": bit_exact(result),
        "error_code": None,
        "error_message": None,
        "error_hint": None,
    }
    if not finish_fenced(conn, lease, JobState.SUCCEEDED, Outcome.SUCCEEDED, values):
        _finished_before(conn, lease, {Outcome.SUCCEEDED})


def finish_attempt(
    conn: Connection,
    lease: Lease,
    decide: Callable[[Any], Decision],
    outcomes: set[Outcome],
    detail: dict[str, Any] | None,
) -> JobState:
    """
    Finish the attempt that holds the lease, in the caller's transaction.

    Args:
        decide: called with the job's locked row.
        outcomes: all that `decide` may return. If the attempt has already ended in one of them, this
            same call has ended it, and the answer to its COMMIT was lost.

    Raises:
        LeaseLostError: the job belongs to another attempt.
    """
    row = conn.execute(OWN_ROW, fence_values(lease)).first()
    if row is None:
        return _finished_before(conn, lease, outcomes)
    row = with_numbers(conn, row)
    new, outcome, values = decide(row)
    # ran_s is measured by the holder's monotonic clock; the database's clock may be set.
    transition(conn, row, new, outcome, {**values, "ran_s": row.ran_s + lease.ran_s}, detail)
    return JobState(new)


def _finished_before(conn: Connection, lease: Lease, outcomes: set[Outcome]) -> JobState:
    """
    Return the job's state if an earlier call, whose COMMIT was not answered, has finished this attempt.

    Raises:
        LeaseLostError: there was none; the job belongs to another attempt.
    """
    done = conn.execute(
        select(attempt.c.outcome, job.c.state)
        .join(job, job.c.id == attempt.c.job_id)
        .where(
            attempt.c.job_id == lease.job_id,
            attempt.c.number == lease.attempt,
            attempt.c.lease_token == lease.token,
            attempt.c.ended_at.is_not(None),
            attempt.c.outcome.in_(outcomes),
        )
    ).first()
    if done is None:
        raise lease_lost(lease)
    return JobState(done.state)
