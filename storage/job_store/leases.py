"""Claiming a job, and what its worker says and hears while the lease is its own."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, null, select, text, update

from jobs.failpoints import guard
from jobs.states import JobState
from storage.claims import Wanted, best_job, glance, idle_worker, may_stay, ripen, waits_above
from storage.engine import check_schema
from storage.job_store.base import Store
from storage.jobs import Job, Lease, WorkerIdentity
from storage.models import CLAIMABLE, RUNNING, attempt, job, utcnow
from storage.pins import hold_checkpoints, pinned_ids
from storage.transitions import (
    lease_lost,
    owned_by,
    plain,
    record_event,
)

# Built once: making a statement costs as much as running it.
TAKE_BLINDLY = (
    update(job)
    .where(job.c.id == bindparam("best"))
    .values(
        state=JobState.RUNNING,
        attempt=job.c.attempt + 1,
        lease_token=bindparam("token"),
        worker=bindparam("who"),
        hb_seq=job.c.hb_seq + 1,
        error_code=null(),
        error_message=null(),
        error_hint=null(),
        started_at=func.coalesce(job.c.started_at, utcnow()),
    )
    .returning(job)
)
TAKE = TAKE_BLINDLY.where(job.c.state == JobState.QUEUED)
OPEN = insert(attempt).values(started_at=utcnow())


@dataclass(frozen=True)
class Wishes:
    """What somebody wants of a running job."""

    cancel: bool
    yield_to: int | None = None  # a waiting job of higher priority


class Leases(Store):
    """Take a lease and keep it."""

    def claim(self, who: WorkerIdentity, *, kinds: Sequence[str], spec_version: int) -> Lease | None:
        """
        Take the best job that this worker can run; storage/claims.py says which that is.

        The attempt number is the fencing token: it only ever goes up.
        """
        token = secrets.token_hex(16)
        again = False
        wanted = Wanted(who.queues, kinds, spec_version)
        seen_before = None if guard("claim_cas") else self.database.read(lambda c: best_job(c, wanted))

        def work(conn: Connection) -> Lease | None:
            nonlocal again
            seen = glance(conn)
            check_schema(conn, seen.revision)
            if again:
                mine = conn.execute(
                    select(job).where(text(f"job.{RUNNING}"), job.c.lease_token == token)
                ).first()
                if mine is not None:  # our own commit, whose answer was lost
                    return Lease(Job.from_row(mine), mine.attempt, token)
            again = True
            if seen.ripening:
                ripen(conn)
            best = best_job(conn, wanted, seen) if guard("claim_cas") else seen_before
            if best is None:
                return None
            take = TAKE if guard("claim_cas") else TAKE_BLINDLY
            taken = conn.execute(take, {"best": best, "token": token, "who": who.name}).first()
            if taken is None:
                return None
            claimed = Job.from_row(taken)
            opened = {"job_id": best, "number": claimed.attempt, "lease_token": token, "worker": who.name}
            opened |= {"host": who.host, "device": who.device, "boot_id": who.boot_id}
            conn.execute(OPEN, {**opened, "pid": who.pid, "start_ticks": who.start_ticks})
            record_event(conn, best, "claimed", attempt=claimed.attempt, worker=who.name)
            return Lease(claimed, claimed.attempt, token)

        return self.database.write(work)

    def heartbeat(self, lease: Lease, progress: dict[str, Any] | None, *, patience_s: float = 5.0) -> Wishes:
        """
        Say that the job is alive, carry its progress, bring back what is wished of it.

        Raises:
            LeaseLostError: the job belongs to another attempt; kill the runner, touch nothing.
        """

        def work(conn: Connection) -> Wishes:
            values: dict[str, Any] = {"hb_seq": job.c.hb_seq + 1}
            if progress is not None:
                values["progress"] = progress
            if conn.execute(update(job).where(owned_by(lease)).values(values)).rowcount != 1:
                raise lease_lost(lease)
            wished = select(job.c.cancel_requested_at, job.c.preempt_for).where(job.c.id == lease.job_id)
            cancel_at, waiting = conn.execute(wished).one()
            return Wishes(cancel_at is not None, waiting)

        return self.database.write(work, patience_s=patience_s)

    def wishes(self, lease: Lease) -> Wishes:
        """What is wished, without a beat: one indexed read.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """

        def work(conn: Connection) -> Wishes:
            wished = select(job.c.cancel_requested_at, job.c.preempt_for).where(owned_by(lease))
            row = conn.execute(wished).first()
            if row is None:
                raise lease_lost(lease)
            return Wishes(row.cancel_requested_at is not None, row.preempt_for)

        return self.database.read(work)

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
            waiting = waits_above(conn, wanted, lease.job.priority)
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
            record_event(conn, lease.job_id, "asked_to_yield", attempt=lease.attempt, detail={"to": waiting})
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
