"""How an attempt ends: published, stopped, given back, failed, crashed."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection, bindparam, select

from jobs.errors import GanqError, Retry
from jobs.failpoints import guard
from jobs.states import JobState, Outcome, StopReason
from storage.db.malformed import readable
from storage.db.rows import Lease
from storage.db.store.base import Store
from storage.db.store.transitions import (
    BACKOFF_S,
    OWNED,
    Decision,
    after_crash,
    bound_to,
    end_owned,
    lease_lost,
    leave,
    plain,
)
from storage.db.tables import attempt, job, utcnow

MAX_TRIES = 6
"""Of Retry.SOME: with the backoff between them nearly three minutes."""

OWN = select(job).where(OWNED).with_for_update()
OWN_BLINDLY = select(job).where(job.c.id == bindparam("owned_id")).with_for_update()


class Endings(Store):
    """Settle an attempt, once."""

    def succeed(self, lease: Lease, result: dict[str, Any]) -> None:
        """
        Publish: the result's pointers become real in this one step.

        Raises:
            LeaseLostError: the job belongs to another attempt; the result is nobody's.
        """
        self.database.write(lambda conn: publish(conn, lease, result))

    def cancel_done(self, lease: Lease) -> None:
        """The runner has stopped because somebody wished it."""
        self._settle_by(
            lease, lambda row: (JobState.CANCELLED, Outcome.CANCELLED, {}), {Outcome.CANCELLED}, None
        )

    def release(self, lease: Lease, reason: str) -> JobState:
        """
        Give the job back unharmed (drain, preemption): it costs the job no patience.

        Returns:
            The state that the job is in now: cancelled, if somebody wished it meanwhile.

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

        return self._settle_by(lease, decide, {Outcome.REQUEUED, Outcome.CANCELLED}, {"reason": reason})

    def fail(self, lease: Lease, error: GanqError) -> JobState:
        """
        Settle an error by its policy: never again, once in a fresh process, a few times, or later.

        Returns:
            The state that the job is in now.
        """
        told = {
            "error_code": error.code,
            "error_message": plain(error.message),
            "error_hint": plain(error.hint),
        }

        def decide(conn: Connection, row: Any) -> Decision:
            if row.cancel_requested_at is not None:
                return JobState.CANCELLED, Outcome.CANCELLED, {}
            tries = error.retry is Retry.SOME and not _tried_enough(conn, row, error.code)
            if error.retry is Retry.LATER or tries:
                later = utcnow() + BACKOFF_S[min(row.waits, len(BACKOFF_S) - 1)]
                return JobState.QUEUED, Outcome.RETRIED, {**told, "not_before": later, "waits": row.waits + 1}
            if error.retry is Retry.FRESH and row.fresh_retries < 1:
                return JobState.QUEUED, Outcome.RETRIED, {**told, "fresh_retries": row.fresh_retries + 1}
            return JobState.FAILED, Outcome.FAILED, told

        endings = {Outcome.RETRIED, Outcome.FAILED, Outcome.CANCELLED}
        detail = {"code": error.code, "message": error.message}
        return self.database.write(lambda conn: settle(conn, lease, partial(decide, conn), endings, detail))

    def crashed(self, lease: Lease, message: str, *, hung: bool = False) -> JobState:
        """
        The runner died under a living supervisor. The third time without progress is the last.

        Returns:
            The state that the job is in now.
        """

        def decide(row: Any) -> Decision:
            return after_crash(row, message, hung=hung)

        return self._settle_by(lease, decide, {Outcome.CRASHED, Outcome.CANCELLED}, {"message": message})

    def _settle_by(
        self,
        lease: Lease,
        decide: Callable[[Any], Decision],
        endings: set[Outcome],
        detail: dict[str, Any] | None,
    ) -> JobState:
        """End an attempt as `decide` says. `endings` are all outcomes that it may say: an attempt that
        ended in one of them has been settled by this very call, and its commit's answer was lost."""

        return self.database.write(lambda conn: settle(conn, lease, decide, endings, detail))


def _tried_enough(conn: Connection, row: Any, code: str) -> bool:
    """Whether the attempts before this one have met the same error, in a row and without progress."""
    before = MAX_TRIES - 1
    if row.waits < before:  # a checkpoint sets it back
        return False
    last = (
        select(attempt.c.error_code)
        .where(attempt.c.job_id == row.id, attempt.c.number < row.attempt)
        .order_by(attempt.c.number.desc())
        .limit(before)
    )
    return list(conn.execute(last).scalars()) == [code] * before


def publish(conn: Connection, lease: Lease, result: dict[str, Any]) -> None:
    """Endings.succeed(), in the caller's transaction."""
    bit_exact = result.get("bit_exact")
    values = {
        "result": result,
        "bit_exact": None if bit_exact is None else int(bit_exact),
        "error_code": None,
        "error_message": None,
        "error_hint": None,
    }
    if not guard("finish_fence"):
        settle(conn, lease, lambda row: (JobState.SUCCEEDED, Outcome.SUCCEEDED, values), set(), None)
    elif not end_owned(conn, lease, JobState.SUCCEEDED, Outcome.SUCCEEDED, values):
        _settled_before(conn, lease, {Outcome.SUCCEEDED})


def settle(
    conn: Connection,
    lease: Lease,
    decide: Callable[[Any], Decision],
    endings: set[Outcome],
    detail: dict[str, Any] | None,
) -> JobState:
    """Endings._settle_by(), in the caller's transaction."""
    own = OWN if guard("finish_fence") else OWN_BLINDLY
    row = conn.execute(own, bound_to(lease)).first()
    if row is None:
        return _settled_before(conn, lease, endings)
    row = readable(conn, row)
    new, outcome, values = decide(row)
    # The holder's own clock cannot be set, as the database's can.
    leave(conn, row, new, outcome, {**values, "ran_s": row.ran_s + lease.ran_s}, detail)
    return JobState(new)


def _settled_before(conn: Connection, lease: Lease, endings: set[Outcome]) -> JobState:
    """
    The state in which a commit of ours has left the job whose answer was lost.

    Raises:
        LeaseLostError: there was none: the job belongs to another attempt.
    """
    done = conn.execute(
        select(attempt.c.outcome, job.c.state)
        .join(job, job.c.id == attempt.c.job_id)
        .where(
            attempt.c.job_id == lease.job_id,
            attempt.c.number == lease.attempt,
            attempt.c.lease_token == lease.token,
            attempt.c.ended_at.is_not(None),
            attempt.c.outcome.in_(endings),
        )
    ).first()
    if done is None:
        raise lease_lost(lease)
    return JobState(done.state)
