"""
The only code that changes a job's state.

Every step is one transaction: a compare-and-set on (id, state, attempt, token),
the attempt's row, and an event beside it. A worker whose lease has passed on
changes zero rows and learns it by LeaseLostError. Each function may run again
after a commit whose answer was lost: it recognises what it has already done.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, func, insert, or_, select, text, true, update
from sqlalchemy.exc import IntegrityError

from jobs.errors import GanqError, InvalidTransitionError, JobNotFoundError, Retry, SpecError
from jobs.failpoints import failpoint, guard
from jobs.states import JobState, Outcome, StopReason
from storage.claims import Wanted, best_job, idle_worker, is_ripe, may_stay, ripen, waits_above
from storage.engine import Database, check_schema
from storage.jobs import Checkpoint, Job, Lease, WorkerIdentity
from storage.models import CLAIMABLE, RIPENING, RUNNING, attempt, checkpoint, dependency, job, utcnow
from storage.parts import hold_parts, insert_parts
from storage.pins import hold_checkpoint, unneeded
from storage.transitions import (
    BACKOFF_S,
    Decision,
    after_crash,
    get_job,
    how_it_ended,
    lease_lost,
    leave,
    locked_job,
    owned_by,
    plain,
    record_event,
)

FinishedFiles = Callable[[int], tuple[str, str, int, int]]
"""New job's id → (path relative to the volume, manifest sha-256, bytes, epoch)."""


@dataclass(frozen=True)
class Wishes:
    """What somebody wants of a running job."""

    cancel: bool
    yield_to: int | None = None  # a waiting job of higher priority


@dataclass(frozen=True)
class Beat:
    """One running job as the reaper sees it."""

    job_id: int
    attempt: int
    hb_seq: int
    boot_id: str | None
    pid: int | None
    start_ticks: int | None
    worker: str | None


class JobStore:
    """All changes of state, on SQLite and Postgres alike."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # --- submit -------------------------------------------------------------------------

    def submit(
        self,
        *,
        kind: str,
        spec: dict[str, Any],
        spec_version: int,
        submit_key: str,
        user: str,
        name: str | None = None,
        queue: str = "default",
        priority: int = 0,
        after: Sequence[int] = (),
        retry_of: int | None = None,
        held: bool = False,
        preemptible: bool = False,
        time_limit_s: float | None = None,
        ringing: bool = False,
        parts: Sequence[tuple[dict[str, Any], int]] = (),
        max_workers: int = 0,
    ) -> Job:
        """
        Accept a job: when this returns, the row is committed.

        Args:
            submit_key: made by the client; the same key gives the same row, once.
            after: jobs that must succeed first.
            preemptible: it may be asked to make room for a job of higher priority.
            time_limit_s: seconds that it may run, over all attempts.
            parts: (spec, pictures) of each part of a job that many workers share.
            max_workers: parts that may run at once; 0: all.
            ringing: the caller rings as soon as this returns. It is recorded here and not
                after the bell: a row that is being updated is one that a claim skips.

        Raises:
            JobNotFoundError: a job in `after` does not exist.
            SpecError: a job in `after` has failed or was cancelled.
        """

        def work(conn: Connection) -> Job:
            known = conn.execute(select(job).where(job.c.submit_key == submit_key)).first()
            if known is not None:
                if (known.kind, known.spec) != (kind, spec):
                    raise SpecError(
                        f"the submit key {submit_key[:64]!r} is that of job {known.id}, another request",
                        hint="the same key must come with the same request; use another key",
                    )
                return Job.from_row(known)
            blockers = 0
            needs = sorted(set(after))  # one order for all, so that two submits cannot lock crosswise
            for needed in needs:
                # The parent's row is locked, so that it cannot end between this look and our insert.
                state = conn.execute(
                    select(job.c.state).where(job.c.id == needed).with_for_update()
                ).scalar_one_or_none()
                if state is None:
                    raise JobNotFoundError(
                        f"there is no job {needed} to wait for", hint="ganq status lists them"
                    )
                if state in (JobState.FAILED, JobState.CANCELLED):
                    raise SpecError(
                        f"job {needed} has {state}, so a job after it would never run",
                        hint=f"ganq retry {needed}, or submit without --after",
                    )
                blockers += state != JobState.SUCCEEDED
            new_id = conn.execute(
                insert(job)
                .values(
                    submit_key=submit_key,
                    name=name,
                    kind=kind,
                    queue=queue,
                    user=user,
                    priority=priority,
                    spec=spec,
                    spec_version=spec_version,
                    state=JobState.QUEUED,
                    held=int(held),
                    preemptible=int(preemptible),
                    time_limit_s=time_limit_s,
                    blockers=blockers + len(parts),
                    retry_of=retry_of,
                    rung_at=utcnow() if ringing and not held and not blockers and not parts else None,
                    created_at=utcnow(),
                )
                .returning(job.c.id)
            ).scalar_one()
            for needed in needs:
                conn.execute(insert(dependency).values(job_id=new_id, needs=needed))
            if parts:
                common = {"kind": kind, "queue": queue, "user": user, "priority": priority}
                common |= {"spec_version": spec_version, "state": JobState.QUEUED, "held": int(held)}
                common |= {"time_limit_s": time_limit_s}
                insert_parts(
                    conn, new_id, submit_key, common, parts, needs=needs, blockers=blockers, lanes=max_workers
                )
            record_event(conn, new_id, "submitted", detail={"retry_of": retry_of} if retry_of else None)
            failpoint("submit.inserted")
            return get_job(conn, new_id)

        try:
            accepted = self.database.write(work)
        except IntegrityError:  # two submits with one key at the same moment: the other one won
            accepted = self.database.write(work)
        failpoint("submit.committed")
        return accepted

    def add_finished(
        self,
        *,
        kind: str,
        spec: dict[str, Any],
        spec_version: int,
        user: str,
        name: str,
        files: FinishedFiles,
    ) -> Job:
        """
        Record a job whose work is already done, with its checkpoint: `ganq import`.

        Args:
            files: called with the new id while the row is not yet committed; it makes
                the files durable and says where they are. If it fails, nothing is recorded.
        """

        submit_key = secrets.token_hex(16)

        def work(conn: Connection) -> Job:
            known = conn.execute(select(job).where(job.c.submit_key == submit_key)).first()
            if known is not None:  # our own commit, whose answer was lost
                return Job.from_row(known)
            new_id = conn.execute(
                insert(job)
                .values(
                    submit_key=submit_key,
                    name=name,
                    kind=kind,
                    queue="none",
                    user=user,
                    priority=0,
                    spec=spec,
                    spec_version=spec_version,
                    state=JobState.SUCCEEDED,
                    attempt=1,
                    created_at=utcnow(),
                    started_at=utcnow(),
                    finished_at=utcnow(),
                )
                .returning(job.c.id)
            ).scalar_one()
            path, digest, size, epoch = files(new_id)
            conn.execute(
                insert(checkpoint).values(
                    job_id=new_id,
                    attempt=1,
                    kind="import",
                    epoch=epoch,
                    step=0,
                    path=path,
                    manifest_sha256=digest,
                    bytes=size,
                    created_at=utcnow(),
                )
            )
            record_event(conn, new_id, "imported", attempt=1, detail={"path": path})
            return get_job(conn, new_id)

        return self.database.write(work)

    # --- claim and lease ------------------------------------------------------------------

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
            check_schema(conn)
            if again:
                mine = conn.execute(
                    select(job).where(text(f"job.{RUNNING}"), job.c.lease_token == token)
                ).first()
                if mine is not None:  # our own commit, whose answer was lost
                    return Lease(Job.from_row(mine), mine.attempt, token)
            again = True
            ripen(conn)
            best = best_job(conn, wanted) if guard("claim_cas") else seen_before
            if best is None:
                return None
            still = job.c.state == JobState.QUEUED if guard("claim_cas") else true()
            taken = conn.execute(
                update(job)
                .where(job.c.id == best, still)
                .values(
                    state=JobState.RUNNING,
                    attempt=job.c.attempt + 1,
                    lease_token=token,
                    worker=who.name,
                    hb_seq=job.c.hb_seq + 1,
                    error_code=None,
                    error_message=None,
                    error_hint=None,
                    started_at=func.coalesce(job.c.started_at, utcnow()),
                )
                .returning(job)
            ).first()
            if taken is None:
                return None
            claimed = Job.from_row(taken)
            conn.execute(
                insert(attempt).values(
                    job_id=best,
                    number=claimed.attempt,
                    lease_token=token,
                    worker=who.name,
                    host=who.host,
                    device=who.device,
                    boot_id=who.boot_id,
                    pid=who.pid,
                    start_ticks=who.start_ticks,
                    started_at=utcnow(),
                )
            )
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
            if "checkpoint_id" in wanted and not hold_checkpoint(conn, wanted["checkpoint_id"]):
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

    def register_checkpoint(
        self, lease: Lease, *, kind: str, epoch: int, step: int, path: str, manifest_sha256: str, size: int
    ) -> int:
        """
        Make a durable checkpoint folder real. A later step than any before forgives all crashes.

        Returns:
            The checkpoint's id.

        Raises:
            LeaseLostError: the job belongs to another attempt; the folder stays unreferenced.
        """

        def work(conn: Connection) -> int:
            # The owner's row is locked until commit: no other attempt can begin meanwhile.
            mine = owned_by(lease, "checkpoint_fence")
            if conn.execute(select(job.c.id).where(mine).with_for_update()).first() is None:
                raise lease_lost(lease)
            known = conn.execute(
                select(checkpoint.c.id).where(checkpoint.c.job_id == lease.job_id, checkpoint.c.path == path)
            ).scalar_one_or_none()
            if known is not None:
                return int(known)
            # A run that goes back and forth over the same steps makes no progress.
            newest = select(func.max(checkpoint.c.step)).where(checkpoint.c.job_id == lease.job_id)
            best = conn.execute(newest).scalar_one()
            forgiven = {"crash_count": 0} if best is None or step > best else {}
            conn.execute(update(job).where(job.c.id == lease.job_id).values(waits=0, **forgiven))
            new_id = conn.execute(
                insert(checkpoint)
                .values(
                    job_id=lease.job_id,
                    attempt=lease.attempt,
                    kind=kind,
                    epoch=epoch,
                    step=step,
                    path=path,
                    manifest_sha256=manifest_sha256,
                    bytes=size,
                    created_at=utcnow(),
                )
                .returning(checkpoint.c.id)
            ).scalar_one()
            if kind != "resume":
                record_event(
                    conn,
                    lease.job_id,
                    "checkpoint",
                    attempt=lease.attempt,
                    detail={"kind": kind, "epoch": epoch, "step": step},
                )
            return int(new_id)

        return self.database.write(work)

    def forget_checkpoints(self, lease: Lease, ids: Sequence[int]) -> list[Checkpoint]:
        """
        Take rows out of the table before their folders are deleted; those that a job needs stay.

        Returns:
            The checkpoints whose folders may now go.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """

        def work(conn: Connection) -> list[Checkpoint]:
            if conn.execute(select(job.c.id).where(owned_by(lease)).with_for_update()).first() is None:
                raise lease_lost(lease)
            going = unneeded(conn, lease.job_id, ids)
            conn.execute(checkpoint.delete().where(checkpoint.c.id.in_([one.id for one in going])))
            return going

        return self.database.write(work)

    # --- the ends of an attempt -----------------------------------------------------------

    def succeed(self, lease: Lease, result: dict[str, Any]) -> None:
        """
        Publish: the result's pointers become real in this one step.

        Raises:
            LeaseLostError: the job belongs to another attempt; the result is nobody's.
        """
        bit_exact = result.get("bit_exact")
        values = {
            "result": result,
            "bit_exact": None if bit_exact is None else int(bit_exact),
            "error_code": None,
            "error_message": None,
            "error_hint": None,
        }
        self._settle_by(
            lease, lambda row: (JobState.SUCCEEDED, Outcome.SUCCEEDED, values), {Outcome.SUCCEEDED}, None
        )

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
                return JobState.QUEUED, Outcome.RELEASED, yielded
            return JobState.QUEUED, Outcome.RELEASED, {}

        return self._settle_by(lease, decide, {Outcome.RELEASED, Outcome.CANCELLED}, {"reason": reason})

    def fail(self, lease: Lease, error: GanqError) -> JobState:
        """
        Settle an error by its policy: never again, once in a fresh process, or later.

        Returns:
            The state that the job is in now.
        """
        told = {
            "error_code": error.code,
            "error_message": plain(error.message),
            "error_hint": plain(error.hint),
        }

        def decide(row: Any) -> Decision:
            if row.cancel_requested_at is not None:
                return JobState.CANCELLED, Outcome.CANCELLED, {}
            if error.retry is Retry.LATER:
                later = utcnow() + BACKOFF_S[min(row.waits, len(BACKOFF_S) - 1)]
                return JobState.QUEUED, Outcome.RETRIED, {**told, "not_before": later, "waits": row.waits + 1}
            if error.retry is Retry.FRESH and row.fresh_retries < 1:
                return JobState.QUEUED, Outcome.RETRIED, {**told, "fresh_retries": row.fresh_retries + 1}
            return JobState.FAILED, Outcome.FAILED, told

        endings = {Outcome.RETRIED, Outcome.FAILED, Outcome.CANCELLED}
        return self._settle_by(lease, decide, endings, {"code": error.code, "message": error.message})

    def crashed(self, lease: Lease, message: str, *, hung: bool = False) -> JobState:
        """
        The runner died under a living supervisor. The third time without progress is the last.

        Returns:
            The state that the job is in now.
        """

        def decide(row: Any) -> Decision:
            return after_crash(row, message, hung=hung)

        return self._settle_by(lease, decide, {Outcome.CRASHED, Outcome.CANCELLED}, {"message": message})

    def rescue(self, beat: Beat, why: str, *, within_s: float = float("inf")) -> JobState | None:
        """
        Take a job back from a worker that fell silent (the reaper's compare-and-set).

        Args:
            within_s: let it be if the table could not be written for so long: whoever
                kept us waiting has kept the worker from beating, too.

        Returns:
            The job's new state, or None if it moved by itself in the meantime.
        """
        began = time.monotonic()

        def work(conn: Connection) -> JobState | None:
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
                new, values = JobState.QUEUED, {}
            leave(conn, row, new, Outcome.LOST, values, {"why": why})
            return new

        return self.database.write(work)

    def _settle_by(
        self,
        lease: Lease,
        decide: Callable[[Any], Decision],
        endings: set[Outcome],
        detail: dict[str, Any] | None,
    ) -> JobState:
        """End an attempt as `decide` says. `endings` are all outcomes that it may say: an attempt that
        ended in one of them has been settled by this very call, and its commit's answer was lost."""

        def work(conn: Connection) -> JobState:
            mine = owned_by(lease, "finish_fence")
            row = conn.execute(select(job).where(mine).with_for_update()).first()
            if row is None:
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
                if done is not None:
                    return JobState(done.state)
                raise lease_lost(lease)
            new, outcome, values = decide(row)
            # The holder's own clock cannot be set, as the database's can.
            leave(conn, row, new, outcome, {**values, "ran_s": row.ran_s + lease.ran_s}, detail)
            return JobState(new)

        return self.database.write(work)

    # --- wishes of a person ---------------------------------------------------------------

    def request_cancel(self, job_id: int) -> Job:
        """
        Cancel a queued job at once, or ask its worker to stop it.

        Raises:
            JobNotFoundError, InvalidTransitionError: it is not there, or has already ended.
        """

        again = False

        def work(conn: Connection) -> Job:
            nonlocal again
            row = locked_job(conn, job_id)
            if again and row.state == JobState.CANCELLED:  # our own commit, whose answer was lost
                return Job.from_row(row)
            again = True
            if row.part_of is not None:
                raise InvalidTransitionError(
                    f"job {job_id} is a part of job {row.part_of}, and goes with it",
                    hint=f"ganq cancel {row.part_of}",
                )
            if JobState(row.state).terminal:
                raise InvalidTransitionError(
                    f"job {job_id} has already {how_it_ended(row.state)}",
                    hint=f"ganq status {job_id} shows it",
                )
            if row.cancel_requested_at is None:
                conn.execute(update(job).where(job.c.id == job_id).values(cancel_requested_at=utcnow()))
                record_event(conn, job_id, "cancel_requested")
            if row.state == JobState.QUEUED:
                leave(conn, row, JobState.CANCELLED, None, {}, None)
            return get_job(conn, job_id)

        return self.database.write(work)

    def hold(self, job_id: int, *, held: bool) -> Job:
        """
        Keep a queued job from being claimed, or let it go again.

        Raises:
            JobNotFoundError, InvalidTransitionError: it is not there, or not queued.
        """

        again = False

        def work(conn: Connection) -> Job:
            nonlocal again
            row = locked_job(conn, job_id)
            if again and row.state != JobState.QUEUED and not held and not row.held:
                return Job.from_row(row)  # our own commit, whose answer was lost; it was claimed since
            again = True
            if row.state != JobState.QUEUED:
                raise InvalidTransitionError(
                    f"job {job_id} is {row.state}, and only a queued job can be held or released",
                    hint=f"ganq cancel {job_id} stops a running job",
                )
            if bool(row.held) != held:
                conn.execute(update(job).where(job.c.id == job_id).values(held=int(held), rung_at=None))
                hold_parts(conn, job_id, held=held)
                record_event(conn, job_id, "held" if held else "unheld")
            return get_job(conn, job_id)

        return self.database.write(work)

    # --- recovery -------------------------------------------------------------------------

    def running(self) -> list[Beat]:
        """All running jobs with their heartbeat counters, for the reaper."""

        def work(conn: Connection) -> list[Beat]:
            rows = conn.execute(
                select(
                    job.c.id,
                    job.c.attempt,
                    job.c.hb_seq,
                    attempt.c.boot_id,
                    attempt.c.pid,
                    attempt.c.start_ticks,
                    job.c.worker,
                )
                .join(attempt, and_(attempt.c.job_id == job.c.id, attempt.c.number == job.c.attempt))
                .where(text(f"job.{RUNNING}"))
            )
            return [Beat(*row) for row in rows]

        return self.database.read(work)

    def due_bells(self, *, again_s: float, limit: int) -> list[tuple[int, str]]:
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
        ripe = select(job.c.id).where(is_ripe())
        # A look that locks nothing first: most of the time there is nothing to ring for.
        if not self.database.read(
            lambda conn: conn.execute(silent.limit(1)).first() or conn.execute(ripe).first()
        ):
            return []

        def work(conn: Connection) -> list[tuple[int, str]]:
            ripen(conn)
            rows = conn.execute(silent.limit(limit).with_for_update(skip_locked=True)).all()
            if rows:
                conn.execute(
                    update(job).where(job.c.id.in_([row.id for row in rows])).values(rung_at=utcnow())
                )
            return [(row.id, row.queue) for row in rows]

        return self.database.write(work)

    def due_in(self) -> float | None:
        """Seconds until the next job that waits for its time may be claimed; None if none waits."""

        def work(conn: Connection) -> float | None:
            soonest = conn.execute(
                select(func.min(job.c.not_before) - utcnow()).where(
                    text(RIPENING), job.c.held == 0, job.c.blockers == 0
                )
            ).scalar_one()
            return None if soonest is None else max(float(soonest), 0.0)

        return self.database.read(work)

    def not_rung(self, job_id: int) -> None:
        """The submitter could not ring after all: the dispatcher does it at its next look."""
        self.database.write(
            lambda conn: conn.execute(update(job).where(job.c.id == job_id).values(rung_at=None)),
            patience_s=2.0,
        )
