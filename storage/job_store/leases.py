"""Claiming a job, and what its worker says and hears while the lease is its own."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import (
    Connection,
    Select,
    Update,
    bindparam,
    func,
    insert,
    null,
    select,
    text,
    update,
)

from jobs.failpoints import guard
from jobs.states import JobState
from storage.claims import (
    BEST,
    Candidate,
    Wanted,
    candidates,
    idle_worker,
    look,
    may_stay,
    oldest,
    ripen,
    serve,
    waits_above,
)
from storage.engine import check_schema
from storage.job_store.base import Store
from storage.jobs import Job, Lease, WorkerIdentity
from storage.models import CLAIMABLE, CLOCKS, RUNNING, attempt, job, utcnow
from storage.pins import hold_checkpoints, pinned_ids
from storage.transitions import (
    OWNED,
    bound_to,
    lease_lost,
    owned_by,
    plain,
    record_event,
    telling,
)

TAKEN = {
    "state": JobState.RUNNING,
    "attempt": job.c.attempt + 1,
    "lease_token": bindparam("token"),
    "worker": bindparam("who"),
    "hb_seq": job.c.hb_seq + 1,
    "error_code": null(),
    "error_message": null(),
    "error_hint": null(),
    "started_at": func.coalesce(job.c.started_at, utcnow()),
}
OPENED_BY = ("host", "device", "boot_id", "pid", "start_ticks")
OPEN = insert(attempt).values(started_at=utcnow())
SAME_SCHEMA = text("(SELECT version_num FROM alembic_version) = :revision")


def _take(*which: Any) -> Update:
    return update(job).where(*which).values(TAKEN).returning(job)


def _recorded(take: Update) -> Select[Any]:
    """Take a job, open its attempt and tell of it: one statement, so that Postgres does all or nothing."""
    taken = take.cte("taken")
    whose = select(taken.c.id, taken.c.attempt, utcnow(), bindparam("token"), bindparam("who"))
    opened = insert(attempt).from_select(
        ["job_id", "number", "started_at", "lease_token", "worker", *OPENED_BY],
        whose.add_columns(*(bindparam(f"by_{name}", type_=attempt.c[name].type) for name in OPENED_BY)),
    )
    told = telling(taken, "claimed", attempt=taken.c.attempt, worker=bindparam("who"))
    return select(taken).add_cte(opened.cte("opened"), told.cte("told"))


# The compare-and-set of a claim, by dialect and kind of candidate; on Postgres with its records.
TAKE: dict[tuple[str, str], Any] = {
    key: _take(job.c.id == best, job.c.state == JobState.QUEUED, SAME_SCHEMA) for key, best in BEST.items()
}
for _dialect in CLOCKS:
    TAKE[_dialect, "blindly"] = _take(job.c.id == bindparam("this"))  # what a test does without the guard
TAKE |= {key: _recorded(take) for key, take in TAKE.items() if key[0] == "postgresql"}

BEAT = (
    update(job)
    .where(OWNED)
    .values(hb_seq=job.c.hb_seq + 1)
    .returning(job.c.cancel_requested_at, job.c.preempt_for)
)
BEAT_WITH_PROGRESS = BEAT.values(progress=bindparam("so_far", type_=job.c.progress.type))
WISHED = select(job.c.cancel_requested_at, job.c.preempt_for).where(OWNED)


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
        blind = None if guard("claim_cas") else self.database.read(lambda conn: _first(conn, wanted))
        opened = {"token": token, "who": who.name} | {f"by_{name}": getattr(who, name) for name in OPENED_BY}

        def work(conn: Connection, *, alone: bool) -> Lease | None:
            nonlocal again
            seen = look(conn, wanted)
            check_schema(conn, seen.revision)
            if again:
                mine = conn.execute(
                    select(job).where(text(f"job.{RUNNING}"), job.c.lease_token == token)
                ).first()
                if mine is not None:  # our own commit, whose answer was lost
                    return Lease(Job.from_row(mine), mine.attempt, token)
            again = True
            if alone and seen.quotas:
                raise _OneAtATimeError
            if seen.ripening and ripen(conn):
                seen = look(conn, wanted)
            for one in blind or candidates(conn, wanted, seen):
                taken = _record(conn, one, {**opened, "revision": seen.revision})
                if taken is not None:
                    if one.in_turn:
                        serve(conn, one.user)
                    return Lease(Job.from_row(taken), taken.attempt, token)
            return None

        try:
            alone = not self.database.is_sqlite
            return self.database.write(partial(work, alone=alone), at_once=True)
        except _OneAtATimeError:
            return self.database.write(partial(work, alone=False))

    def heartbeat(self, lease: Lease, progress: dict[str, Any] | None, *, patience_s: float = 5.0) -> Wishes:
        """
        Say that the job is alive, carry its progress, bring back what is wished of it.

        Raises:
            LeaseLostError: the job belongs to another attempt; kill the runner, touch nothing.
        """

        def work(conn: Connection) -> Wishes:
            beat = BEAT if progress is None else BEAT_WITH_PROGRESS
            more = {} if progress is None else {"so_far": progress}
            return _wishes(lease, conn.execute(beat, bound_to(lease) | more).first())

        return self.database.write(work, patience_s=patience_s, at_once=True)

    def wishes(self, lease: Lease) -> Wishes:
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


class _OneAtATimeError(Exception):
    """There are limits, and claims under limits pass one at a time, each in a transaction."""


def _record(conn: Connection, one: Candidate, opened: dict[str, Any]) -> Any:
    """Take the candidate, open its attempt and tell of it; None: somebody else has it, or will."""
    take = TAKE[conn.dialect.name, one.how]
    if conn.dialect.name == "postgresql":
        return conn.execute(take, one.bound | opened).first()
    taken = conn.execute(
        take, one.bound | {name: opened[name] for name in ("token", "who", "revision")}
    ).first()
    if taken is not None:
        whose = {name: opened[f"by_{name}"] for name in OPENED_BY}
        whose |= {"lease_token": opened["token"], "worker": opened["who"]}
        conn.execute(OPEN, {**whose, "job_id": taken.id, "number": taken.attempt})
        record_event(conn, taken.id, "claimed", attempt=taken.attempt, worker=opened["who"])
    return taken


def _first(conn: Connection, wanted: Wanted) -> list[Candidate]:
    """The best job as it is now, to be taken whatever becomes of it: what a test does without the guard."""
    for one in candidates(conn, wanted, look(conn, wanted)):
        this = one.bound.get("this") or oldest(conn, one)
        if this is not None:
            return [Candidate("blindly", {"this": this}, one.user, one.in_turn)]
    return [Candidate("blindly", {"this": -1}, "", False)]


def _wishes(lease: Lease, row: Any) -> Wishes:
    """
    Raises:
        LeaseLostError: there is no such row under the fence.
    """
    if row is None:
        raise lease_lost(lease)
    return Wishes(row.cancel_requested_at is not None, row.preempt_for)
