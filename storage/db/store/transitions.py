"""
State transitions: the compare-and-set of each change of state, with the attempt and the event.

The other modules of storage/db/store/ decide when; only this one updates the column `state`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    CTE,
    ClauseElement,
    Connection,
    Insert,
    Select,
    Update,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal,
    select,
    text,
    union_all,
    update,
)

from jobs.errors import InvalidTransitionError, JobNotFoundError, LeaseLostError
from jobs.renamed import renamed_code
from jobs.states import JobState, Outcome, check_transition, ending_text
from storage.db.backoff import BACKOFF_S as BACKOFF_S
from storage.db.engine import REQUESTER, Database, Requester
from storage.db.rows import Job, Lease
from storage.db.store.inheritance import open_dependencies, restore_priority
from storage.db.store.waiting import fill_slots, fulfilled
from storage.db.tables import UNRESOLVED, attempt, dependency, end_dependency, event, job, utcnow

MAX_CRASHES = 3
LOSSES_WITHOUT_BACKOFF = 2
"""A job that is lost more often within LOST_WITHIN_S waits before it can be claimed again."""
LOST_WITHIN_S = 300.0

NO_PREEMPTION = {"preempt_for": None, "yielded_at": None}
"""Set by each end of an attempt; a preemption then sets `yielded_at` again."""

Decision = tuple[JobState, Outcome, dict[str, Any]]
"""New state of a job, outcome of its attempt, and other columns of the job."""


class StoreMixin:
    """Base of the parts of JobStore."""

    def __init__(self, database: Database, requester: Requester | None = None) -> None:
        """
        Args:
            requester: who asks for the changes; None: a worker.
        """
        self.database = database if requester is None else database.requested_by(requester)


def _fence(job_id: Any, attempt: Any, token: Any) -> Any:
    return and_(
        job.c.id == job_id,
        job.c.state == JobState.RUNNING,
        job.c.attempt == attempt,
        job.c.lease_token == token,
    )


FENCE = _fence(bindparam("owned_id"), bindparam("owned_attempt"), bindparam("owned_token"))
"""The fence as a condition with parameters; fence_values() gives their values."""


def fence_values(lease: Lease) -> dict[str, Any]:
    """Return the parameters of FENCE."""
    return {"owned_id": lease.job_id, "owned_attempt": lease.attempt, "owned_token": lease.token}


def fence_of(lease: Lease) -> Any:
    """Return the fence as a condition without parameters."""
    return _fence(lease.job_id, lease.attempt, lease.token)


def lease_lost(lease: Lease) -> LeaseLostError:
    return LeaseLostError(
        f"attempt {lease.attempt} of job {lease.job_id} has lost its lease", job_id=lease.job_id
    )


def get_job(conn: Connection, job_id: int) -> Job:
    return Job.from_row(conn.execute(select(job).where(job.c.id == job_id)).one())


def locked_job(conn: Connection, job_id: int) -> Any:
    row = conn.execute(select(job).where(job.c.id == job_id).with_for_update()).first()
    if row is None:
        raise JobNotFoundError(f"there is no job {job_id}", hint="ganq status lists them")
    requester = conn.get_execution_options().get(REQUESTER)
    if requester is not None and requester.expect is not None:
        requester.expect(row)
    return row


def storable_text(text: str | None) -> str | None:
    """
    Return text that both databases accept.

    Postgres rejects NUL, and both reject lone surrogates, which encode bytes of file names that are not
    UTF-8.
    """
    return None if text is None else text.encode("utf-8", "replace").decode().replace("\0", "")


def record_event(
    conn: Connection,
    job_id: int,
    type: str,
    *,
    attempt: int | None = None,
    worker: str | None = None,
    detail: dict[str, Any] | None = None,
) -> None:
    detail = with_requester(conn, detail)
    conn.execute(_EVENT, _event_values(job_id, type, attempt=attempt, worker=worker, detail=detail))


def with_requester(conn: Connection, detail: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the detail of an event with the person who asked, and the way."""
    requester = conn.get_execution_options().get(REQUESTER)
    return detail if requester is None else {**(detail or {}), "by": requester.user, "via": requester.way}


def _event_values(
    job_id: int,
    type: str,
    *,
    attempt: int | None = None,
    worker: str | None = None,
    detail: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the parameters of _EVENT."""
    return {
        "event_job_id": job_id,
        "event_type": type,
        "event_attempt": attempt,
        "event_worker": worker,
        "event_detail": detail,
    }


def event_of_row(row: CTE, type: str, **more: Any) -> Insert:
    """
    Insert the event of a row that the same statement writes (Postgres); `more` are columns of the event.
    """
    columns = select(row.c.id, _event_time(row.c.id), literal(type), *more.values())
    return insert(event).from_select(["job_id", "at", "type", *more], columns)


def _event_time(job_id: Any) -> Any:
    """Return the time of a new event: now, but not before the job's last event if the clock was set back."""
    last = select(event.c.at).where(event.c.job_id == job_id)
    last_at = last.order_by(event.c.id.desc()).limit(1).scalar_subquery()
    return case((last_at > utcnow(), last_at), else_=utcnow())


# Built once: building a statement takes as long as executing it.
_EVENT = insert(event).values(
    job_id=bindparam("event_job_id"),
    at=_event_time(bindparam("event_job_id")),
    type=bindparam("event_type"),
    attempt=bindparam("event_attempt"),
    worker=bindparam("event_worker"),
    detail=bindparam("event_detail", type_=event.c.detail.type),
)
_CLOSE = (
    update(attempt)
    .where(
        attempt.c.job_id == bindparam("of_job"),
        attempt.c.number == bindparam("of_attempt"),
        attempt.c.ended_at.is_(None),
    )
    .values(
        ended_at=utcnow(),
        outcome=bindparam("ended_as"),
        error_code=bindparam("code"),
        error_message=bindparam("message"),
    )
)
_DEPENDANTS = union_all(
    select(dependency.c.job_id, literal("success").label("condition")).where(
        dependency.c.needs == bindparam("needed")
    ),
    select(end_dependency.c.job_id, end_dependency.c.condition).where(
        end_dependency.c.needs == bindparam("needed"), text(UNRESOLVED)
    ),
)
_RESOLVED = (
    update(end_dependency)
    .where(end_dependency.c.needs == bindparam("needed"), text(UNRESOLVED))
    .values(resolved=1)
)


@lru_cache(maxsize=256)
def _move_with_records(move: Update) -> Select[Any]:
    """
    Combine update, end of the attempt and event in one statement: one round trip to Postgres, not three.
    """
    moved = move.returning(job.c.id).cte("moved")
    return select(moved.c.id).add_cte(_CLOSE.cte("closed"), _EVENT.cte("recorded"))


@lru_cache(maxsize=256)
def _move_statement(names: tuple[str, ...], ends: bool) -> Update:
    """Return the compare-and-set that sets these columns to the parameters `to_<column>`."""
    columns: dict[Any, Any] = {job.c[name]: bindparam(f"to_{name}", type_=job.c[name].type) for name in names}
    if ends:
        columns[job.c.finished_at] = utcnow()
    return (
        update(job)
        .where(
            job.c.id == bindparam("moved"),
            job.c.state == bindparam("old"),
            job.c.attempt == bindparam("old_attempt"),
        )
        .values(columns)
    )


@lru_cache(maxsize=16)
def _fenced_finish(names: tuple[str, ...], new: JobState, dialect: str) -> Any:
    """Return the same for a final state under the fence; on Postgres with the attempt and the event."""
    columns: dict[Any, Any] = {job.c[name]: bindparam(f"to_{name}", type_=job.c[name].type) for name in names}
    columns |= {job.c.ran_s: job.c.ran_s + bindparam("more_s"), job.c.finished_at: utcnow()}
    ended = (job.c.id, job.c.attempt, job.c.worker, job.c.sweep, job.c.max_running)
    move = update(job).where(FENCE).values(columns).returning(*ended)
    if dialect != "postgresql":
        return move
    moved = move.cte("moved")
    closed = (
        update(attempt)
        .where(
            attempt.c.job_id == moved.c.id,
            attempt.c.number == moved.c.attempt,
            attempt.c.ended_at.is_(None),
        )
        .values(ended_at=utcnow(), outcome=bindparam("ended_as"))
    )
    event_of = event_of_row(moved, str(new), attempt=moved.c.attempt, worker=moved.c.worker)
    return select(moved).add_cte(closed.cte("closed"), event_of.cte("recorded"))


def after_crash(row: Any, message: str, *, hung: bool = False) -> Decision:
    if row.cancel_requested_at is not None:
        return JobState.CANCELLED, Outcome.CANCELLED, {}
    crashes = row.crash_count + 1
    columns = {
        "error_code": "STALLED" if hung else "CRASHED",
        "error_message": storable_text(message),
        "crash_count": crashes,
    }
    if crashes >= MAX_CRASHES:
        columns["error_code"] = "CRASH_LOOP"
        columns["error_message"] = f"{storable_text(message)}; {crashes} crashes without progress"
        columns["error_hint"] = f"ganq logs {row.id} shows its last lines; ganq retry {row.id} tries again"
        return JobState.FAILED, Outcome.CRASHED, columns
    columns["not_before"] = utcnow() + BACKOFF_S[crashes - 1]
    return JobState.QUEUED, Outcome.CRASHED, columns


def after_loss(conn: Connection, job_id: int, why: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Decide whether a job that was lost waits before it can be claimed again.

    The reaper may be wrong about a worker; without a pause it could be wrong again and again.

    Returns:
        Columns of the job, and the detail of the event.
    """
    since_s = utcnow() - attempt.c.ended_at
    lost = select(func.count()).where(
        attempt.c.job_id == job_id,
        attempt.c.outcome == Outcome.LOST,
        since_s.between(-LOST_WITHIN_S, LOST_WITHIN_S),  # the clock may have been set back
    )
    before = int(conn.execute(lost).scalar_one())
    if before < LOSSES_WITHOUT_BACKOFF:
        return {}, {"reason": why}
    pause_s = BACKOFF_S[min(before - LOSSES_WITHOUT_BACKOFF, len(BACKOFF_S) - 1)]
    columns = {
        "error_code": "WORKER_LOST",
        "error_message": storable_text(
            f"{why}; lost {before + 1} times within {LOST_WITHIN_S / 60:.0f} minutes"
        ),
        "error_hint": f"ganq events {job_id} names the workers; ganq doctor checks them",
        "not_before": utcnow() + pause_s,
    }
    return columns, {"reason": why, "times": before + 1, "pause_s": pause_s}


def transition(
    conn: Connection,
    row: Any,
    new: JobState,
    outcome: Outcome | None,
    values: dict[str, Any],
    detail: dict[str, Any] | None,
) -> None:
    """
    Change the state of a locked job, with its attempt, event and dependants, in the caller's transaction.
    """
    _move(conn, row, new, outcome, values, detail)
    if new.terminal:
        _restore_priorities(conn, row)
        update_dependants(conn, row.id, new)
        if row.max_running and row.sweep:
            fill_slots(conn, row.sweep, row.max_running)


def finish_fenced(
    conn: Connection, lease: Lease, new: JobState, outcome: Outcome, values: dict[str, Any]
) -> bool:
    """
    Set a final state under the fence without reading the row first.

    Args:
        values: other columns of the row, none of them a SQL expression.

    Returns:
        False if the lease was lost; then nothing has changed.
    """
    check_transition(JobState.RUNNING, new)
    ending = {**NO_PREEMPTION, **values, "state": new}
    bound = {f"to_{name}": value for name, value in ending.items()}
    bound |= fence_values(lease) | {"more_s": lease.ran_s}
    end = _fenced_finish(tuple(sorted(ending)), new, conn.dialect.name)
    if conn.dialect.name == "postgresql":
        moved = conn.execute(end, {**bound, "ended_as": outcome}).first()
    elif (moved := conn.execute(end, bound).first()) is not None:
        closing = {"of_job": moved.id, "of_attempt": moved.attempt, "ended_as": outcome}
        conn.execute(_CLOSE, {**closing, "code": None, "message": None})
        record_event(conn, moved.id, str(new), attempt=moved.attempt, worker=moved.worker)
    if moved is None:
        return False
    update_dependants(conn, moved.id, new)
    if moved.max_running and moved.sweep:
        fill_slots(conn, moved.sweep, moved.max_running)
    return True


def _move(
    conn: Connection,
    row: Any,
    new: JobState,
    outcome: Outcome | None,
    values: dict[str, Any],
    detail: dict[str, Any] | None,
) -> None:
    check_transition(JobState(row.state), new)
    ending: dict[str, Any] = dict(NO_PREEMPTION)
    if not new.terminal:
        # No worker has been notified of it since it is queued again.
        ending |= {"lease_token": None, "worker": None, "rung_at": None}
    if outcome is not None and "ran_s" not in values:
        ending["ran_s"] = job.c.ran_s + seconds_of_attempt(row)
    ending |= {**values, "state": new}
    expressions = {name: value for name, value in ending.items() if isinstance(value, ClauseElement)}
    known = {name: value for name, value in ending.items() if name not in expressions}
    move = _move_statement(tuple(sorted(known)), new.terminal)
    moving = {f"to_{name}": value for name, value in known.items()}
    moving |= {"moved": row.id, "old": row.state, "old_attempt": row.attempt}
    closing = {"of_job": row.id, "of_attempt": row.attempt, "ended_as": outcome}
    closing |= {"code": values.get("error_code"), "message": values.get("error_message")}
    kind = str(new) if new.terminal else str(outcome)
    columns = _event_values(row.id, kind, attempt=row.attempt, worker=row.worker, detail=detail)
    if conn.dialect.name == "postgresql" and outcome is not None and not expressions:
        _require_moved(
            row, new, len(conn.execute(_move_with_records(move), {**moving, **closing, **columns}).all())
        )
        return
    _require_moved(row, new, conn.execute(move.values(expressions) if expressions else move, moving).rowcount)
    if outcome is not None:
        conn.execute(_CLOSE, closing)
    conn.execute(_EVENT, columns)


def _restore_priorities(conn: Connection, row: Any) -> None:
    """Restore the priority that others inherited from a job, if it ended while it waited."""
    if row.state == JobState.QUEUED and row.blockers:
        restore_priority(conn, open_dependencies(conn, [row.id]))


def _require_moved(row: Any, new: JobState, moved: int) -> None:
    if moved != 1:
        raise InvalidTransitionError(
            f"job {row.id} changed its state while it was locked", old=row.state, new=new
        )


def cancel_queued(conn: Connection, ids: Sequence[int]) -> None:
    """Cancel queued jobs without dependants, whose rows the caller has locked, with three statements."""
    if not ids:
        return
    check_transition(JobState.QUEUED, JobState.CANCELLED)
    ending = {"state": JobState.CANCELLED, "cancel_requested_at": utcnow(), "finished_at": utcnow()}
    conn.execute(
        update(job)
        .where(job.c.id.in_(ids), job.c.state == JobState.QUEUED)
        .values(**ending, preempt_for=None, yielded_at=None)
    )
    for type in ("cancel_requested", str(JobState.CANCELLED)):
        detail = with_requester(conn, None)
        conn.execute(_EVENT, [_event_values(one, type, detail=detail) for one in ids])
    restore_priority(conn, open_dependencies(conn, ids))


def seconds_of_attempt(row: Any, at_most_s: float = float("inf")) -> Any:
    """
    Return a SQL expression for the duration of a job's current attempt.

    Args:
        at_most_s: upper bound, measured by a monotonic clock; the database's clock may be set.
    """
    began = select(attempt.c.started_at).where(attempt.c.job_id == row.id, attempt.c.number == row.attempt)
    ran_s = utcnow() - began.scalar_subquery()
    if at_most_s < float("inf"):
        return case((ran_s > at_most_s, at_most_s), (ran_s > 0, ran_s), else_=0.0)
    return case((ran_s > 0, ran_s), else_=0.0)


def update_dependants(conn: Connection, job_id: int, ended: JobState, *, late: bool = False) -> None:
    """
    Unblock the jobs that wait for this end of a job; end those that wait for another, with their dependants.

    Args:
        late: an older worker has ended the job, and has updated those that wait for its success.
    """
    # A list, not recursion: a chain may be longer than Python's stack. Each round reads the rows
    # again, because a job that depends on two of them may have ended in the round before.
    ended_jobs = [(job_id, ended)]
    while ended_jobs:
        needed, ending = ended_jobs.pop(0)
        # Two queries, and the state is checked here: in one, SQLite would read all queued jobs.
        tied = {row.job_id: row.condition for row in conn.execute(_DEPENDANTS, {"needed": needed})}
        if any(condition != "success" for condition in tied.values()):
            conn.execute(_RESOLVED, {"needed": needed})
        if late and needed == job_id:
            tied = {one: condition for one, condition in tied.items() if condition != "success"}
        for row in _locked(conn, list(tied)):
            if row.state != JobState.QUEUED:
                continue
            if fulfilled(tied[row.id], ending):
                conn.execute(
                    update(job).where(job.c.id == row.id).values(blockers=job.c.blockers - 1, rung_at=None)
                )
                continue
            if tied[row.id] == "success":
                new = JobState.CANCELLED if ending is JobState.CANCELLED else JobState.FAILED
                error = _dependency_error(conn, needed, ending, row.id)
            else:
                new, error = JobState.CANCELLED, _not_needed(needed, ending)
            _move(conn, row, new, None, error, {"needs": needed})
            _restore_priorities(conn, row)
            ended_jobs.append((row.id, new))
        if ending is not JobState.SUCCEEDED:
            ended_jobs += _cancel_shards(conn, needed)


def _locked(conn: Connection, ids: Sequence[int]) -> Sequence[Any]:
    if not ids:
        return ()
    return conn.execute(select(job).where(job.c.id.in_(ids)).order_by(job.c.id).with_for_update()).all()


def _dependency_error(conn: Connection, needed: int, ending: JobState, waiting: int) -> dict[str, Any]:
    """
    Return the error columns of a job that ends because another did; a parent gets the error of its shard.
    """
    needed_job = conn.execute(select(job).where(job.c.id == needed)).one()
    if needed_job.part_of == waiting and ending is JobState.FAILED:
        hint = needed_job.error_hint or f"ganq status {needed} shows the shard that failed"
        code = renamed_code(needed_job.error_code)
        message = f"{needed_job.error_message} (shard {needed})"
        return {"error_code": code, "error_message": message, "error_hint": hint}
    return {
        "error_code": "DEPENDENCY_FAILED",
        "error_message": f"job {needed}, on which it depends, has {ending_text(ending)}",
        "error_hint": f"ganq status {needed} shows why; ganq retry {needed} --with-waiting retries both",
    }


def _not_needed(needed: int, ending: JobState) -> dict[str, Any]:
    """Return the error columns of a job that waited for a failure that did not happen."""
    return {
        "error_code": "NOT_NEEDED",
        "error_message": f"job {needed}, after whose failure it was to run, has {ending_text(ending)}",
    }


def _cancel_shards(conn: Connection, parent: int) -> list[tuple[int, JobState]]:
    """Cancel the shards of a parent that has ended without success."""
    ended = []
    rows = select(job).where(text("part_of IS NOT NULL"), job.c.part_of == parent)
    for row in conn.execute(rows.order_by(job.c.id).with_for_update()).all():
        if row.state == JobState.QUEUED:
            _move(conn, row, JobState.CANCELLED, None, {}, {"part_of": parent})
            _restore_priorities(conn, row)
            ended.append((row.id, JobState.CANCELLED))
        elif row.state == JobState.RUNNING and row.cancel_requested_at is None:
            conn.execute(update(job).where(job.c.id == row.id).values(cancel_requested_at=utcnow()))
            record_event(conn, row.id, "cancel_requested", detail={"part_of": parent})
    return ended
