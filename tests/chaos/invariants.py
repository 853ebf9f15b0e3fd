"""
What must be true of the job table and the volume at every moment, whatever has befallen the workers.

One call from any test:

    assert_invariants(database, volume)

It looks at one snapshot of the table, then at the files that the snapshot points to, and
raises with all violations at once, each a sentence that begins with the number of the
invariant in docs/guarantees.md. It may be called while workers run.

Left to the caller, because they hold only at certain moments:

    unfinished(look(database), ids)                     I2, at the end: every accepted job has ended
    invariants_volume.unequal_trainings(view, volume)   I6, at the end: one spec, one result
    invariants_volume.leftovers(database, volume)       I9, when nothing runs
    invariants_volume.two_runners(before, now)          I3, by two looks at the processes
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, Table, select, text

from jobs.errors import all_errors
from jobs.states import JobState, Outcome
from storage.db.engine import Database
from storage.db.tables import attempt, checkpoint, dependency, end_dependency, event, job
from storage.volume.layout import Volume

ENDS = {str(state) for state in JobState if state.terminal}
BACK = {str(one) for one in Outcome} - ENDS
"""Outcomes after which a job is queued again."""
AFTER_THE_END = {"results_deleted", "kept", "not_kept"}
REQUESTS = {"submitted", "held", "pause_requested", "hold_released", "cancel_requested"}
"""Events that no attempt makes."""
CODES_WITHOUT_A_CLASS = {"CRASHED", "STALLED", "CRASH_LOOP", "WORKER_LOST", "DEPENDENCY_FAILED"}
TICK_S = 0.002
"""SQLite's clock has milliseconds."""


@dataclass(frozen=True)
class View:
    """The job table at one moment."""

    jobs: dict[int, Any]
    attempts: dict[int, list[Any]]
    checkpoints: dict[int, list[Any]]
    events: dict[int, list[Any]]
    needs: dict[int, list[int]]
    ends: dict[int, list[int]]
    """Jobs whose end, whatever it is, or whose failure a job waits for."""


@dataclass
class Memory:
    """Files that an earlier call has verified; they are hashed once."""

    verified: set[tuple[str, str]] = field(default_factory=set)


def look(database: Database) -> View:
    """Read the whole table in one snapshot."""

    def ask(conn: Connection) -> View:
        if not database.is_sqlite:
            conn.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        jobs = {row.id: row for row in conn.execute(select(job).order_by(job.c.id))}
        needs: dict[int, list[int]] = defaultdict(list)
        for row in conn.execute(select(dependency)):
            needs[row.job_id].append(row.needs)
        ends: dict[int, list[int]] = defaultdict(list)
        for row in conn.execute(select(end_dependency).where(end_dependency.c.resolved == 0)):
            ends[row.job_id].append(row.needs)
        return View(
            jobs,
            _by_job(conn, attempt, attempt.c.number),
            _by_job(conn, checkpoint, checkpoint.c.id),
            _by_job(conn, event, event.c.id),
            needs,
            ends,
        )

    # Database.read() uses no transaction on Postgres: each statement would see another snapshot.
    return (database.read if database.is_sqlite else database.write)(ask, patience_s=30.0)


def _by_job(conn: Connection, table: Table, order: Any) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = defaultdict(list)
    for row in conn.execute(select(table).order_by(order)):
        found[row.job_id].append(row)
    return found


def violations(
    database: Database,
    volume: Volume,
    *,
    secrets: Sequence[str] = (),
    clock: bool = True,
    memory: Memory | None = None,
) -> list[str]:
    """
    Args:
        secrets: strings that must stand nowhere in the table nor in a file of the volume's jobs.
        clock: False if the test sets the database's clock: then no times are compared.
        memory: files that an earlier call has hashed are not hashed again.
    """
    from chaos.invariants_volume import check_volume

    view = look(database)
    found = list(table_violations(view, secrets=secrets, clock=clock))
    found += check_volume(database, volume, view, memory or Memory(), secrets)
    return found


def assert_invariants(database: Database, volume: Volume, **how: Any) -> None:
    """
    Args:
        how: see violations().

    Raises:
        AssertionError: with every violation.
    """
    found = violations(database, volume, **how)
    assert not found, "\n".join([f"{len(found)} violations:", *found])


def table_violations(view: View, *, secrets: Sequence[str] = (), clock: bool = True) -> Iterator[str]:
    """Return the violations that the table alone shows."""
    for row in view.jobs.values():
        yield from one_end(row, view.events[row.id])
        yield from one_open_attempt(row, view.attempts[row.id], clock=clock)
        yield from no_stale_checkpoint(row, view.attempts[row.id], view.checkpoints[row.id], clock=clock)
        yield from counted_blockers(row, view)
        yield from truthful_errors(row, view.attempts[row.id])
    for table in (view.jobs.values(), *_all(view.attempts), *_all(view.checkpoints), *_all(view.events)):
        yield from no_secret(table, secrets)


def _all(rows: Mapping[int, list[Any]]) -> Iterable[list[Any]]:
    return rows.values()


# --- I1, I3, I4 by history ------------------------------------------------------------------


def one_end(row: Any, events: Sequence[Any]) -> Iterator[str]:
    """
    I1, I3 and I4 as the history tells them: one way into a terminal state and none out,
    attempts 1 to n one after the other, and no word of an attempt that has ended.
    """
    state, number = "queued", 0
    for one in events:
        who = f"job {row.id}: '{one.type}' (event {one.id}, attempt {one.attempt})"
        if state in ENDS and one.type not in AFTER_THE_END:
            law = "I1" if one.type in ENDS | BACK | {"claimed"} else "I4"
            yield f"{law}: {who} after it had {state}"
        elif one.type == "claimed":
            if state != "queued":
                yield f"I3: {who} while it was {state}"
            if one.attempt != number + 1:
                yield f"I3: {who} after attempt {number}"
            state, number = "running", one.attempt
        elif one.type == "imported":
            state, number = "succeeded", one.attempt
        elif one.type in ENDS or one.type in BACK:
            if one.type in BACK | {"succeeded"} and state != "running":
                yield f"I1: {who} while it was {state}"
            if one.attempt != number:
                yield f"I4: {who} while attempt {number} was the newest"
            state = one.type if one.type in ENDS else "queued"
        elif one.type not in REQUESTS | AFTER_THE_END and (state, one.attempt) != ("running", number):
            yield f"I4: {who} while it was {state}, attempt {number}"
    if (state, number) != (row.state, row.attempt):
        yield (
            f"I1: job {row.id} is {row.state}, attempt {row.attempt}, but its history says {state}, "
            f"attempt {number}"
        )
    if (row.finished_at is not None) != (row.state in ENDS):
        yield f"I1: job {row.id} is {row.state}, and finished_at is {row.finished_at}"


def one_open_attempt(row: Any, attempts: Sequence[Any], *, clock: bool = True) -> Iterator[str]:
    """I3: attempts are numbered 1 to n; the newest is open if and only if the job runs; none overlap."""
    if row.kind == "import":
        return
    numbers = [one.number for one in attempts]
    if numbers != list(range(1, row.attempt + 1)):
        yield f"I3: job {row.id} has had {row.attempt} attempts, and rows of {numbers}"
    still_open = [one.number for one in attempts if one.ended_at is None]
    expected = [row.attempt] if row.state == "running" else []
    if still_open != expected:
        yield f"I3: job {row.id} is {row.state}, attempt {row.attempt}, and attempts {still_open} are open"
    for one in attempts:
        if (one.ended_at is None) != (one.outcome is None):
            yield f"I3: attempt {one.number} of job {row.id}: ended {one.ended_at}, outcome {one.outcome}"
        if one.number == row.attempt and row.state == "running" and one.lease_token != row.lease_token:
            yield f"I3: job {row.id} runs under another lease than its attempt {one.number}"
    won = [one.number for one in attempts if one.outcome == "succeeded"]
    if won != ([row.attempt] if row.state == "succeeded" else []):
        yield f"I1: job {row.id} is {row.state}, attempt {row.attempt}, and attempts {won} succeeded"
    for before, after in pairwise(attempts):
        if clock and (before.ended_at or 0.0) > after.started_at + TICK_S:
            yield f"I3: attempts {before.number} and {after.number} of job {row.id} overlap"


def no_stale_checkpoint(
    row: Any, attempts: Sequence[Any], checkpoints: Sequence[Any], *, clock: bool = True
) -> Iterator[str]:
    """I4: each checkpoint was registered by its attempt while that was open, and is in its folder."""
    known = {one.number: one for one in attempts}
    newest = 0
    for one in checkpoints:
        who = f"checkpoint {one.id} of job {row.id} (attempt {one.attempt}, step {one.step})"
        if one.attempt < newest:
            yield f"I4: {who} was registered after one of attempt {newest}"
        newest = max(newest, one.attempt)
        if not one.path.startswith(f"jobs/{row.id:06d}/a{one.attempt}/checkpoints/"):
            yield f"I4: {who} lies in another attempt's folder: {one.path}"
        if row.kind == "import":
            continue
        its = known.get(one.attempt)
        if its is None:
            yield f"I4: {who} is of an attempt that there never was"
        elif clock and its.ended_at is not None and one.created_at > its.ended_at + TICK_S:
            late = one.created_at - its.ended_at
            yield f"I4: {who} was registered {late:.3f} s after that attempt had ended ({its.outcome})"
        elif clock and one.created_at < its.started_at - TICK_S:
            yield f"I4: {who} was registered before that attempt began"


# --- I2 -------------------------------------------------------------------------------------


def counted_blockers(row: Any, view: View) -> Iterator[str]:
    """
    I2: a job's count of blockers equals the number of its dependencies that have not succeeded, and of its
    other unfulfilled conditions.
    """
    waits = [one for one in view.needs[row.id] if view.jobs[one].state != "succeeded"]
    others = len(view.ends[row.id]) + (row.begin_at is not None) + (row.throttled or 0)
    if row.state == "queued" and row.blockers != len(waits) + others:
        yield f"I2: job {row.id} counts {row.blockers} that it waits for, and there are {waits} and {others}"
    if row.state in ("running", "succeeded") and waits:
        yield f"I2: job {row.id} is {row.state}, but {waits}, which it needs, have not succeeded"


def unfinished(view: View, accepted: Iterable[int]) -> list[str]:
    """I2, after enough time: every accepted job exists and has ended."""
    found = []
    for job_id in accepted:
        row = view.jobs.get(job_id)
        if row is None:
            found.append(f"I2: job {job_id} was accepted, and is not in the table")
        elif row.state not in ENDS:
            found.append(f"I2: job {job_id} is still {row.state} (attempt {row.attempt})")
    return found


# --- I10 ------------------------------------------------------------------------------------


def known_codes() -> set[str]:
    """Return every error code that a job may have."""
    import storage.gc.sweep  # noqa: F401 - has error classes of its own

    return {cls.code for cls in all_errors()} | CODES_WITHOUT_A_CLASS


def truthful_errors(row: Any, attempts: Sequence[Any]) -> Iterator[str]:
    """I10: a failure has a known code and a message; a success has none."""
    codes = known_codes()
    for what, one in [("job", row), *((f"attempt {each.number} of job", each) for each in attempts)]:
        if one.error_code is not None and one.error_code not in codes:
            yield f"I10: {what} {row.id} has the unknown code {one.error_code!r}"
        if "Traceback (most recent" in (one.error_message or ""):
            yield f"I10: {what} {row.id} tells a traceback"
    if row.state == "failed" and not (row.error_code and row.error_message):
        yield f"I10: job {row.id} has failed and does not say why"
    if row.state == "succeeded" and row.error_code is not None:
        yield f"I10: job {row.id} has succeeded with {row.error_code}"


def no_secret(rows: Iterable[Any], secrets: Sequence[str]) -> Iterator[str]:
    for row in rows if secrets else ():
        for name, value in row._mapping.items():
            if any(secret in str(value) for secret in secrets):
                owner = row._mapping.get("job_id", row[0])
                yield f"I10: a secret stands in the table, column {name}, of job {owner}"
