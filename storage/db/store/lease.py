"""Keep a lease: heartbeats, stop requests, preemption, pinned inputs, events."""

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
from storage.db.store.pins import lock_checkpoints, pinned_ids
from storage.db.store.scheduling import (
    Capabilities,
    higher_priority_waiting,
    idle_worker,
    protected_from_preemption,
)
from storage.db.store.transitions import (
    FENCE,
    StoreMixin,
    fence_of,
    fence_values,
    lease_lost,
    record_event,
    storable_text,
)
from storage.db.tables import CLAIMABLE, RUNNING, job

HEARTBEAT = (
    update(job)
    .where(FENCE)
    .values(hb_seq=job.c.hb_seq + 1)
    .returning(job.c.cancel_requested_at, job.c.preempt_for, job.c.held)
)
HEARTBEAT_WITH_PROGRESS = HEARTBEAT.values(progress=bindparam("so_far", type_=job.c.progress.type))
STOP_REQUESTS = select(job.c.cancel_requested_at, job.c.preempt_for, job.c.held).where(FENCE)


@dataclass(frozen=True)
class StopRequests:
    """Stop requests for a running job."""

    cancel: bool
    preempt_for: int | None = None  # a waiting job of higher priority
    pause: bool = False


class LeaseMixin(StoreMixin):
    """Operations of the worker that holds a lease."""

    def heartbeat(
        self, lease: Lease, progress: dict[str, Any] | None, *, patience_s: float = 5.0
    ) -> StopRequests:
        """
        Send a heartbeat with the job's progress, and return the stop requests.

        Raises:
            LeaseLostError: the job belongs to another attempt; kill the runner and write nothing.
        """

        def work(conn: Connection) -> StopRequests:
            statement = HEARTBEAT if progress is None else HEARTBEAT_WITH_PROGRESS
            more = {} if progress is None else {"so_far": progress}
            return _stop_requests(lease, conn.execute(statement, fence_values(lease) | more).first())

        return self.database.write(work, patience_s=patience_s, autocommit=True)

    def stop_requests(self, lease: Lease) -> StopRequests:
        """
        Read the stop requests without a heartbeat: one indexed read.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """
        return self.database.read(
            lambda c: _stop_requests(lease, c.execute(STOP_REQUESTS, fence_values(lease)).first())
        )

    def request_preemption(self, lease: Lease, who: WorkerIdentity, *, kinds: Sequence[str]) -> int | None:
        """
        Request preemption of this running job, if a job of higher priority waits that no idle worker can
        take and for which no other job is being preempted.

        A job that was preempted before is protected for as long as it then had to wait, so that it gets at
        least half of the time.

        Returns:
            The waiting job; heartbeat() and stop_requests() return it, too.
        """
        if not lease.job.preemptible:
            return None
        capabilities = Capabilities(who.queues, kinds, lease.job.spec_version)

        def find_waiting(conn: Connection) -> int | None:
            # Its inherited priority may have changed since the claim.
            mine = conn.execute(select(job.c.priority).where(fence_of(lease))).scalar_one_or_none()
            waiting = None if mine is None else higher_priority_waiting(conn, capabilities, mine)
            if waiting is None or protected_from_preemption(conn, lease) or idle_worker(conn, waiting):
                return None
            taken = conn.execute(select(job.c.id).where(text(RUNNING), job.c.preempt_for == waiting)).first()
            return None if taken is not None else waiting

        if self.database.read(find_waiting) is None:
            return None

        def work(conn: Connection) -> int | None:
            waiting = find_waiting(conn)
            if waiting is None:
                return None
            # The waiting job's row is the lock, so that only one job is preempted for it.
            still = select(job.c.id).where(job.c.id == waiting, text(CLAIMABLE))
            if conn.execute(still.with_for_update(skip_locked=True)).first() is None:
                return None
            if find_waiting(conn) != waiting:
                return None
            mine = update(job).where(fence_of(lease), job.c.preempt_for.is_(None))
            if conn.execute(mine.values(preempt_for=waiting)).rowcount != 1:
                return None
            detail = {"waiting_job": waiting}
            record_event(conn, lease.job_id, "preempt_requested", attempt=lease.attempt, detail=detail)
            return waiting

        return self.database.write(work, patience_s=2.0)

    def pin_inputs(self, lease: Lease, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """
        Pin the inputs of the job (checkpoint, fingerprint), so that all attempts read the same.

        Args:
            inputs: added to those that are pinned already.

        Returns:
            All pinned inputs; those of a shard are shared with its siblings. None if the checkpoint was
            deleted after it was chosen; then nothing is pinned.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """

        def work(conn: Connection) -> dict[str, Any] | None:
            parent = lease.job.part_of
            shared: dict[str, Any] = {}
            if parent is not None:
                # All shards use one checkpoint: that of the first to pin one.
                its = select(job.c.inputs).where(job.c.id == parent).with_for_update()
                shared = conn.execute(its).scalar_one() or {}
            row = conn.execute(select(job.c.inputs).where(fence_of(lease)).with_for_update()).first()
            if row is None:
                raise lease_lost(lease)
            capabilities = {**inputs, **shared}
            if (ids := pinned_ids(capabilities)) and not lock_checkpoints(conn, ids):
                return None
            fixed = {**(row.inputs or {}), **capabilities}
            ours = (lease.job_id,) if parent is None else (lease.job_id, parent)
            conn.execute(update(job).where(job.c.id.in_(ours)).values(inputs=fixed))
            return fixed

        return self.database.write(work)

    def add_event(self, lease: Lease, type: str, detail: dict[str, Any]) -> None:
        """
        Add an event that the runner reports.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """

        def work(conn: Connection) -> None:
            if conn.execute(select(job.c.id).where(fence_of(lease)).with_for_update()).first() is None:
                raise lease_lost(lease)
            texts = {
                key: storable_text(value) if isinstance(value, str) else value
                for key, value in detail.items()
            }
            record_event(conn, lease.job_id, type, attempt=lease.attempt, detail=texts)

        self.database.write(work)


def _stop_requests(lease: Lease, row: Any) -> StopRequests:
    """
    Return the stop requests of a row.

    Raises:
        LeaseLostError: no row matches the fence.
    """
    if row is None:
        raise lease_lost(lease)
    return StopRequests(row.cancel_requested_at is not None, row.preempt_for, bool(row.held))
