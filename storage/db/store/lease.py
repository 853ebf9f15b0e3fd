"""Keep a lease: heartbeats, stop requests, preemption, pinned inputs, events."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, select, text, update

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
from storage.db.tables import CLAIMABLE, RUNNING, indexed_by, job

REQUESTS = (job.c.cancel_requested_at, job.c.preempt_for, job.c.held)


class Statements(NamedTuple):
    """The statements of a lease that return what a user or another worker requests."""

    heartbeat: Any
    with_progress: Any
    stop_requests: Any


def _statements(*read: Any) -> Statements:
    beat = update(job).where(FENCE).values(hb_seq=job.c.hb_seq + 1)
    with_progress = beat.values(progress=bindparam("so_far", type_=job.c.progress.type))
    return Statements(beat.returning(*read), with_progress.returning(*read), select(*read).where(FENCE))


@cache
def _statements_of(dialect: str, queues: int) -> Statements:
    """
    Return the statements for a job that may be preempted; without queues: for others.

    The highest priority that waits in a queue is one step in the index of claimable jobs. EXISTS with a
    higher priority would read the whole queue if there is none: Postgres expects to find one soon.
    """
    highest = (
        f"coalesce((SELECT waiting.priority FROM job AS waiting {indexed_by(dialect, 'ix_job_claimable')}"
        f" WHERE {CLAIMABLE} AND waiting.queue = :queue_{number}"
        " ORDER BY waiting.priority DESC LIMIT 1), job.priority)"
        for number in range(queues)
    )
    higher = " OR ".join(f"{one} > job.priority" for one in highest)
    return _statements(*REQUESTS, text(f"({higher or 'NULL'}) AS higher_waits"))


@dataclass(frozen=True)
class StopRequests:
    """Stop requests for a running job."""

    cancel: bool
    preempt_for: int | None = None  # a waiting job of higher priority
    pause: bool = False
    higher_waits: bool = False
    """Whether a job of higher priority waits, so that request_preemption() may find one."""


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
            statements, values = _statements_for(conn, lease)
            statement = statements.heartbeat if progress is None else statements.with_progress
            more = {} if progress is None else {"so_far": progress}
            return _stop_requests(lease, conn.execute(statement, values | more).first())

        return self.database.write(work, patience_s=patience_s, autocommit=True)

    def stop_requests(self, lease: Lease) -> StopRequests:
        """
        Read the stop requests without a heartbeat: one indexed read.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """

        def work(conn: Connection) -> StopRequests:
            statements, values = _statements_for(conn, lease)
            return _stop_requests(lease, conn.execute(statements.stop_requests, values).first())

        return self.database.read(work)

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


def _statements_for(conn: Connection, lease: Lease) -> tuple[Statements, dict[str, Any]]:
    """Return the statements of a lease, and their parameters."""
    queues = lease.queues or () if lease.job.preemptible else ()
    values = {f"queue_{number}": queue for number, queue in enumerate(queues)}
    return _statements_of(conn.dialect.name, len(queues)), fence_values(lease) | values


def _stop_requests(lease: Lease, row: Any) -> StopRequests:
    """
    Return the stop requests of a row.

    Raises:
        LeaseLostError: no row matches the fence.
    """
    if row is None:
        raise lease_lost(lease)
    higher_waits = lease.job.preemptible and (row.higher_waits or lease.queues is None)
    return StopRequests(
        row.cancel_requested_at is not None, row.preempt_for, bool(row.held), bool(higher_waits)
    )
