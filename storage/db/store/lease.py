"""What a worker says and hears while a lease is its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Connection,
    bindparam,
    select,
    text,
    update,
)

from storage.db.rows import Lease, WorkerIdentity
from storage.db.store.base import Store
from storage.db.store.pins import hold_checkpoints, pinned_ids
from storage.db.store.scheduling import Wanted, higher_priority_waiting, idle_worker, may_stay
from storage.db.store.transitions import (
    OWNED,
    bound_to,
    lease_lost,
    owned_by,
    plain,
    record_event,
)
from storage.db.tables import CLAIMABLE, RUNNING, job

BEAT = (
    update(job)
    .where(OWNED)
    .values(hb_seq=job.c.hb_seq + 1)
    .returning(job.c.cancel_requested_at, job.c.preempt_for)
)
BEAT_WITH_PROGRESS = BEAT.values(progress=bindparam("so_far", type_=job.c.progress.type))
WISHED = select(job.c.cancel_requested_at, job.c.preempt_for).where(OWNED)


@dataclass(frozen=True)
class StopRequests:
    """What somebody wants of a running job."""

    cancel: bool
    yield_to: int | None = None  # a waiting job of higher priority


class Leases(Store):
    """Keep a lease."""

    def heartbeat(
        self, lease: Lease, progress: dict[str, Any] | None, *, patience_s: float = 5.0
    ) -> StopRequests:
        """
        Say that the job is alive, carry its progress, bring back what is wished of it.

        Raises:
            LeaseLostError: the job belongs to another attempt; kill the runner, touch nothing.
        """

        def work(conn: Connection) -> StopRequests:
            beat = BEAT if progress is None else BEAT_WITH_PROGRESS
            more = {} if progress is None else {"so_far": progress}
            return _wishes(lease, conn.execute(beat, bound_to(lease) | more).first())

        return self.database.write(work, patience_s=patience_s, at_once=True)

    def stop_requests(self, lease: Lease) -> StopRequests:
        """What is wished, without a beat: one indexed read.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """
        return self.database.read(lambda c: _wishes(lease, c.execute(WISHED, bound_to(lease)).first()))

    def offer_to_yield(self, lease: Lease, who: WorkerIdentity, *, kinds: Sequence[str]) -> int | None:
        """
        Let this running job make room for a waiting one of higher priority, if there is one
        that no idle worker will take and no other job makes room for.

        A job that has yielded before stays, once it is back, for as long as it was kept
        waiting: at least half of the time is its own.

        Returns:
            The waiting job, which this one now yields to; heartbeat() and wishes() say it, too.
        """
        if not lease.job.preemptible:
            return None
        wanted = Wanted(who.queues, kinds, lease.job.spec_version)

        def waiting_for_us(conn: Connection) -> int | None:
            # What is lent to it may have changed since the claim.
            mine = conn.execute(select(job.c.priority).where(owned_by(lease))).scalar_one_or_none()
            waiting = None if mine is None else higher_priority_waiting(conn, wanted, mine)
            if waiting is None or may_stay(conn, lease) or idle_worker(conn, waiting):
                return None
            taken = conn.execute(select(job.c.id).where(text(RUNNING), job.c.preempt_for == waiting)).first()
            return None if taken is not None else waiting

        if self.database.read(waiting_for_us) is None:
            return None

        def work(conn: Connection) -> int | None:
            waiting = waiting_for_us(conn)
            if waiting is None:
                return None
            # Two victims for one waiting job would be one too many: its row is the lock.
            still = select(job.c.id).where(job.c.id == waiting, text(CLAIMABLE))
            if conn.execute(still.with_for_update(skip_locked=True)).first() is None:
                return None
            if waiting_for_us(conn) != waiting:
                return None
            mine = update(job).where(owned_by(lease), job.c.preempt_for.is_(None))
            if conn.execute(mine.values(preempt_for=waiting)).rowcount != 1:
                return None
            detail = {"waiting_job": waiting}
            record_event(conn, lease.job_id, "preempt_requested", attempt=lease.attempt, detail=detail)
            return waiting

        return self.database.write(work, patience_s=2.0)

    def pin_inputs(self, lease: Lease, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """
        Fix what the job reads (checkpoint, fingerprint), so that every attempt reads the same.

        Args:
            inputs: added to those that are fixed already.

        Returns:
            What is fixed: of a part, what its siblings fixed before it. None if the checkpoint
            was let go since it was chosen: nothing was fixed.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """

        def work(conn: Connection) -> dict[str, Any] | None:
            whole = lease.job.part_of
            shared: dict[str, Any] = {}
            if whole is not None:
                # All parts draw from one checkpoint: the first to choose chooses for all.
                its = select(job.c.inputs).where(job.c.id == whole).with_for_update()
                shared = conn.execute(its).scalar_one() or {}
            row = conn.execute(select(job.c.inputs).where(owned_by(lease)).with_for_update()).first()
            if row is None:
                raise lease_lost(lease)
            wanted = {**inputs, **shared}
            if (ids := pinned_ids(wanted)) and not hold_checkpoints(conn, ids):
                return None
            fixed = {**(row.inputs or {}), **wanted}
            ours = (lease.job_id,) if whole is None else (lease.job_id, whole)
            conn.execute(update(job).where(job.c.id.in_(ours)).values(inputs=fixed))
            return fixed

        return self.database.write(work)

    def note(self, lease: Lease, type: str, detail: dict[str, Any]) -> None:
        """
        An entry in the job's history that the work itself makes.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """

        def work(conn: Connection) -> None:
            if conn.execute(select(job.c.id).where(owned_by(lease)).with_for_update()).first() is None:
                raise lease_lost(lease)
            told = {key: plain(value) if isinstance(value, str) else value for key, value in detail.items()}
            record_event(conn, lease.job_id, type, attempt=lease.attempt, detail=told)

        self.database.write(work)


def _wishes(lease: Lease, row: Any) -> StopRequests:
    """
    Raises:
        LeaseLostError: there is no such row under the fence.
    """
    if row is None:
        raise lease_lost(lease)
    return StopRequests(row.cancel_requested_at is not None, row.preempt_for)
