"""
How a job moves: the compare-and-set under every change of state, with its attempt and event.

storage/db/store/ decides when; this module is the only one that writes `state`
into an existing row.
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
    update,
)

from jobs.errors import InvalidTransitionError, JobNotFoundError, LeaseLostError
from jobs.failpoints import guard
from jobs.renamed import renamed_code
from jobs.states import JobState, Outcome, check_transition
from storage.db.backoff import BACKOFF_S as BACKOFF_S
from storage.db.rows import Job, Lease
from storage.db.store.inheritance import needs_of, repay
from storage.db.tables import attempt, dependency, event, job, utcnow

MAX_CRASHES = 3
LOST_AT_ONCE = 2
"""So often within LOST_WITHIN_S a job that was lost is offered again without a pause."""
LOST_WITHIN_S = 300.0

ENDED = {"preempt_for": None, "yielded_at": None}
"""Any end but a yield ends the wish to yield and the memory of it; of a yield, its values tell."""

Decision = tuple[JobState, Outcome, dict[str, Any]]
"""Where a job goes, how its attempt ended, and the columns that tell of it."""


def _fence(job_id: Any, attempt: Any, token: Any) -> Any:
    return and_(
        job.c.id == job_id,
        job.c.state == JobState.RUNNING,
        job.c.attempt == attempt,
        job.c.lease_token == token,
    )


OWNED = _fence(bindparam("owned_id"), bindparam("owned_attempt"), bindparam("owned_token"))
"""The fence, of a lease that is bound when the statement runs: see bound_to()."""


def bound_to(lease: Lease) -> dict[str, Any]:
    """The values of OWNED."""
    return {"owned_id": lease.job_id, "owned_attempt": lease.attempt, "owned_token": lease.token}


def owned_by(lease: Lease, fence: str = "") -> Any:
    """
    The fence, for statements that are made anew each time.

    Args:
        fence: what a test calls this use of the fence, to take it out.
    """
    return _fence(lease.job_id, lease.attempt, lease.token) if guard(fence) else job.c.id == lease.job_id


def lease_lost(lease: Lease) -> LeaseLostError:
    return LeaseLostError(
        f"job {lease.job_id} is no longer this worker's (attempt {lease.attempt})", job_id=lease.job_id
    )


def get_job(conn: Connection, job_id: int) -> Job:
    return Job.from_row(conn.execute(select(job).where(job.c.id == job_id)).one())


def locked_job(conn: Connection, job_id: int) -> Any:
    row = conn.execute(select(job).where(job.c.id == job_id).with_for_update()).first()
    if row is None:
        raise JobNotFoundError(f"there is no job {job_id}", hint="ganq status lists them")
    return row


def plain(text: str | None) -> str | None:
    """Text that both databases take: Postgres refuses NUL, and neither takes half a surrogate pair,
    which stands in the name of a file that is no UTF-8."""
    return None if text is None else text.encode("utf-8", "replace").decode().replace("\0", "")


def how_it_ended(state: str) -> str:
    return "been cancelled" if state == JobState.CANCELLED else state


def record_event(
    conn: Connection,
    job_id: int,
    type: str,
    *,
    attempt: int | None = None,
    worker: str | None = None,
    detail: dict[str, Any] | None = None,
) -> None:
    conn.execute(_EVENT, _told(job_id, type, attempt=attempt, worker=worker, detail=detail))


def _told(
    job_id: int,
    type: str,
    *,
    attempt: int | None = None,
    worker: str | None = None,
    detail: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The values of _EVENT."""
    return {
        "told_of": job_id,
        "told_type": type,
        "told_attempt": attempt,
        "told_worker": worker,
        "told_detail": detail,
    }


def event_of_row(row: CTE, type: str, **more: Any) -> Insert:
    """The event of a row that the same statement on Postgres has written; `more` are columns of it."""
    columns = select(row.c.id, _event_time(row.c.id), literal(type), *more.values())
    return insert(event).from_select(["job_id", "at", "type", *more], columns)


def _event_time(job_id: Any) -> Any:
    """Now; but a job's history never runs backwards, even if somebody sets the clock back."""
    last = select(event.c.at).where(event.c.job_id == job_id)
    last_at = last.order_by(event.c.id.desc()).limit(1).scalar_subquery()
    return case((last_at > utcnow(), last_at), else_=utcnow())


# Built once: making a statement costs as much as running it.
_EVENT = insert(event).values(
    job_id=bindparam("told_of"),
    at=_event_time(bindparam("told_of")),
    type=bindparam("told_type"),
    attempt=bindparam("told_attempt"),
    worker=bindparam("told_worker"),
    detail=bindparam("told_detail", type_=event.c.detail.type),
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
_TIED = select(dependency.c.job_id).where(dependency.c.needs == bindparam("needed"))


@lru_cache(maxsize=256)
def _leaving(move: Update) -> Select[Any]:
    """The move, the end of its attempt and the event: one trip to Postgres instead of three."""
    moved = move.returning(job.c.id).cte("moved")
    return select(moved.c.id).add_cte(_CLOSE.cte("closed"), _EVENT.cte("told"))


@lru_cache(maxsize=256)
def _moving(names: tuple[str, ...], ends: bool) -> Update:
    """The compare-and-set that gives these columns the values of to_…"""
    told: dict[Any, Any] = {job.c[name]: bindparam(f"to_{name}", type_=job.c[name].type) for name in names}
    if ends:
        told[job.c.finished_at] = utcnow()
    return (
        update(job)
        .where(
            job.c.id == bindparam("moved"),
            job.c.state == bindparam("old"),
            job.c.attempt == bindparam("old_attempt"),
        )
        .values(told)
    )


@lru_cache(maxsize=16)
def _ending_owned(names: tuple[str, ...], new: JobState, dialect: str) -> Any:
    """The same for an end under the fence; on Postgres with its records, of a row that was moved."""
    told: dict[Any, Any] = {job.c[name]: bindparam(f"to_{name}", type_=job.c[name].type) for name in names}
    told |= {job.c.ran_s: job.c.ran_s + bindparam("more_s"), job.c.finished_at: utcnow()}
    move = update(job).where(OWNED).values(told).returning(job.c.id, job.c.attempt, job.c.worker)
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
    return select(moved).add_cte(closed.cte("closed"), event_of.cte("told"))


def after_crash(row: Any, message: str, *, hung: bool = False) -> Decision:
    if row.cancel_requested_at is not None:
        return JobState.CANCELLED, Outcome.CANCELLED, {}
    crashes = row.crash_count + 1
    told = {
        "error_code": "STALLED" if hung else "CRASHED",
        "error_message": plain(message),
        "crash_count": crashes,
    }
    if crashes >= MAX_CRASHES:
        told["error_code"] = "CRASH_LOOP"
        told["error_message"] = f"{plain(message)}; {crashes} times without progress"
        told["error_hint"] = f"ganq logs {row.id} shows its last lines; ganq retry {row.id} tries again"
        return JobState.FAILED, Outcome.CRASHED, told
    told["not_before"] = utcnow() + BACKOFF_S[crashes - 1]
    return JobState.QUEUED, Outcome.CRASHED, told


def after_loss(conn: Connection, job_id: int, why: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Decide whether a job whose worker is taken for lost is offered at once, as it is the first times.

    Whoever takes it for lost may be wrong; it must not be so again and again without a pause.

    Returns:
        The job's columns and the event's detail.
    """
    since_s = utcnow() - attempt.c.ended_at
    lost = select(func.count()).where(
        attempt.c.job_id == job_id,
        attempt.c.outcome == Outcome.LOST,
        since_s.between(-LOST_WITHIN_S, LOST_WITHIN_S),  # somebody may have set the clock back
    )
    before = int(conn.execute(lost).scalar_one())
    if before < LOST_AT_ONCE:
        return {}, {"reason": why}
    pause_s = BACKOFF_S[min(before - LOST_AT_ONCE, len(BACKOFF_S) - 1)]
    told = {
        "error_code": "WORKER_LOST",
        "error_message": plain(f"{why}; lost {before + 1} times within {LOST_WITHIN_S / 60:.0f} minutes"),
        "error_hint": f"ganq events {job_id} shows by whom; ganq doctor checks the workers",
        "not_before": utcnow() + pause_s,
    }
    return told, {"reason": why, "times": before + 1, "pause_s": pause_s}


def leave(
    conn: Connection,
    row: Any,
    new: JobState,
    outcome: Outcome | None,
    values: dict[str, Any],
    detail: dict[str, Any] | None,
) -> None:
    """Move a locked row out of its state: job, attempt, event and dependants in one transaction."""
    _move(conn, row, new, outcome, values, detail)
    if new.terminal:
        _repay(conn, row)
        update_dependants(conn, row.id, new)


def end_owned(
    conn: Connection, lease: Lease, new: JobState, outcome: Outcome, values: dict[str, Any]
) -> bool:
    """
    End a job under the fence without reading its row first: for ends that depend on nothing in it.

    Args:
        values: other columns of the row, none of them a formula.

    Returns:
        False: the lease is not ours, and nothing was moved.
    """
    check_transition(JobState.RUNNING, new)
    ending = {**ENDED, **values, "state": new}
    bound = {f"to_{name}": value for name, value in ending.items()}
    bound |= bound_to(lease) | {"more_s": lease.ran_s}
    end = _ending_owned(tuple(sorted(ending)), new, conn.dialect.name)
    if conn.dialect.name == "postgresql":
        moved = conn.execute(end, {**bound, "ended_as": outcome}).first()
    elif (moved := conn.execute(end, bound).first()) is not None:
        closing = {"of_job": moved.id, "of_attempt": moved.attempt, "ended_as": outcome}
        conn.execute(_CLOSE, {**closing, "code": None, "message": None})
        record_event(conn, moved.id, str(new), attempt=moved.attempt, worker=moved.worker)
    if moved is None:
        return False
    update_dependants(conn, moved.id, new)
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
    ending: dict[str, Any] = dict(ENDED)
    if not new.terminal:
        # Back in the queue nobody has been told of it yet, whatever was rung before it ran.
        ending |= {"lease_token": None, "worker": None, "rung_at": None}
    if outcome is not None and "ran_s" not in values:
        ending["ran_s"] = job.c.ran_s + seconds_of_attempt(row)
    ending |= {**values, "state": new}
    formulas = {name: value for name, value in ending.items() if isinstance(value, ClauseElement)}
    known = {name: value for name, value in ending.items() if name not in formulas}
    move = _moving(tuple(sorted(known)), new.terminal)
    moving = {f"to_{name}": value for name, value in known.items()}
    moving |= {"moved": row.id, "old": row.state, "old_attempt": row.attempt}
    closing = {"of_job": row.id, "of_attempt": row.attempt, "ended_as": outcome}
    closing |= {"code": values.get("error_code"), "message": values.get("error_message")}
    kind = str(new) if new.terminal else str(outcome)
    told = _told(row.id, kind, attempt=row.attempt, worker=row.worker, detail=detail)
    if conn.dialect.name == "postgresql" and outcome is not None and not formulas:
        _must_move(row, new, len(conn.execute(_leaving(move), {**moving, **closing, **told}).all()))
        return
    _must_move(row, new, conn.execute(move.values(formulas) if formulas else move, moving).rowcount)
    if outcome is not None:
        conn.execute(_CLOSE, closing)
    conn.execute(_EVENT, told)


def _repay(conn: Connection, row: Any) -> None:
    """A job that has ended while it waited lends its priority no more."""
    if row.state == JobState.QUEUED and row.blockers:
        repay(conn, needs_of(conn, [row.id]))


def _must_move(row: Any, new: JobState, moved: int) -> None:
    if moved != 1:
        raise InvalidTransitionError(f"job {row.id} moved while it was locked", old=row.state, new=new)


def cancel_queued(conn: Connection, ids: Sequence[int]) -> None:
    """End queued jobs on which no other depends, their rows locked by the caller, by three statements."""
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
        conn.execute(_EVENT, [_told(one, type) for one in ids])
    repay(conn, needs_of(conn, ids))


def seconds_of_attempt(row: Any, at_most_s: float = float("inf")) -> Any:
    """
    Return the SQL of how long a running job has run this time.

    Args:
        at_most_s: by a clock that cannot be set, as the database's can, forwards or back.
    """
    began = select(attempt.c.started_at).where(attempt.c.job_id == row.id, attempt.c.number == row.attempt)
    ran_s = utcnow() - began.scalar_subquery()
    if at_most_s < float("inf"):
        return case((ran_s > at_most_s, at_most_s), (ran_s > 0, ran_s), else_=0.0)
    return case((ran_s > 0, ran_s), else_=0.0)


def update_dependants(conn: Connection, job_id: int, ended: JobState) -> None:
    """Unblock the jobs that waited for this one, or end them with it, and those that waited for them."""
    # A list instead of a recursion: a chain may be longer than Python's stack. Each round asks
    # the table anew, because a job that waits for two of them may have ended in the round before.
    ended_jobs = [(job_id, ended)]
    while ended_jobs:
        needed, ending = ended_jobs.pop(0)
        # Two steps and the state by hand: SQLite would rather read all that is queued.
        tied = conn.execute(_TIED, {"needed": needed}).scalars().all()
        for row in _locked(conn, tied):
            if row.state != JobState.QUEUED:
                continue
            if ending is JobState.SUCCEEDED:
                conn.execute(
                    update(job).where(job.c.id == row.id).values(blockers=job.c.blockers - 1, rung_at=None)
                )
                continue
            new = JobState.CANCELLED if ending is JobState.CANCELLED else JobState.FAILED
            _move(conn, row, new, None, _told_of(conn, needed, ending, row.id), {"needs": needed})
            _repay(conn, row)
            ended_jobs.append((row.id, new))
        if ending is not JobState.SUCCEEDED:
            ended_jobs += _end_parts(conn, needed)


def _locked(conn: Connection, ids: Sequence[int]) -> Sequence[Any]:
    if not ids:
        return ()
    return conn.execute(select(job).where(job.c.id.in_(ids)).order_by(job.c.id).with_for_update()).all()


def _told_of(conn: Connection, needed: int, ending: JobState, waiting: int) -> dict[str, Any]:
    """Why a job ends with the one that it waited for; a whole ends with the error of its part."""
    parent = conn.execute(select(job).where(job.c.id == needed)).one()
    if parent.part_of == waiting and ending is JobState.FAILED:
        hint = parent.error_hint or f"ganq status {needed} shows the part that failed"
        code, message = renamed_code(parent.error_code), f"{parent.error_message} (part {needed})"
        return {"error_code": code, "error_message": message, "error_hint": hint}
    return {
        "error_code": "DEPENDENCY_FAILED",
        "error_message": f"job {needed}, which it waited for, has {how_it_ended(ending)}",
        "error_hint": f"ganq status {needed} says why; ganq retry {needed} --with-waiting does both again",
    }


def _end_parts(conn: Connection, whole: int) -> list[tuple[int, JobState]]:
    """A job that has ended without success needs its parts no more: cancel them."""
    ended = []
    rows = select(job).where(text("part_of IS NOT NULL"), job.c.part_of == whole)
    for row in conn.execute(rows.order_by(job.c.id).with_for_update()).all():
        if row.state == JobState.QUEUED:
            _move(conn, row, JobState.CANCELLED, None, {}, {"part_of": whole})
            _repay(conn, row)
            ended.append((row.id, JobState.CANCELLED))
        elif row.state == JobState.RUNNING and row.cancel_requested_at is None:
            conn.execute(update(job).where(job.c.id == row.id).values(cancel_requested_at=utcnow()))
            record_event(conn, row.id, "cancel_requested", detail={"part_of": whole})
    return ended
