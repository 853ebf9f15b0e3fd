"""
Priority inheritance: a job raises the priority of the jobs on which it depends to its own.

Claims and preemption compare the column `priority`: the highest of the job's own priority and those of all
its direct and indirect dependants. The own priority is kept in `inputs` under OWN_PRIORITY once
it has been raised: a column would need a migration, and workers of older versions keep the keys of `inputs`.
A held job raises no priority, because it waits for a user.

Each function runs in the transaction that inserts, holds, releases or ends the dependant.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, update

from jobs.states import JobState
from storage.db.rows import OWN_PRIORITY
from storage.db.tables import dependency, job

OPEN = (JobState.QUEUED, JobState.RUNNING)
BATCH_SIZE = 500

_COLUMNS = (job.c.id, job.c.priority, job.c.inputs, job.c.blockers, job.c.held)
_SET = (
    update(job)
    .where(job.c.id == bindparam("of_job"))
    .values(
        priority=bindparam("effective", type_=job.c.priority.type),
        inputs=bindparam("kept_inputs", type_=job.c.inputs.type),
    )
)


def open_dependencies(conn: Connection, ids: Sequence[int]) -> list[int]:
    """Return the unfinished jobs on which these depend."""
    found: set[int] = set()
    for start in range(0, len(ids), BATCH_SIZE):
        # Two statements: in one, SQLite would read all queued jobs.
        query = select(dependency.c.needs).where(dependency.c.job_id.in_(ids[start : start + BATCH_SIZE]))
        found.update(conn.execute(query).scalars())
    needed, unfinished = sorted(found), set[int]()
    for start in range(0, len(needed), BATCH_SIZE):
        some = needed[start : start + BATCH_SIZE]
        states = select(job.c.id).where(job.c.id.in_(some), job.c.state.in_(OPEN))
        unfinished.update(conn.execute(states).scalars())
    return sorted(unfinished)


def raise_priority(conn: Connection, needs: Sequence[int], priority: int) -> None:
    """Raise the priority of jobs and of their own dependencies."""
    while needs:
        raised = [row for row in _locked(conn, needs) if row.priority < priority]
        _set(conn, [(row, priority) for row in raised])
        # A held job raises no priority until it is released.
        needs = open_dependencies(conn, [row.id for row in raised if row.blockers and not row.held])


def restore_priority(conn: Connection, needs: Sequence[int]) -> None:
    """Lower the priority of jobs to the highest of their own and those of their dependants."""
    while needs:
        lowered = []
        for row in _locked(conn, needs):
            own = (row.inputs or {}).get(OWN_PRIORITY)
            if not isinstance(own, int) or row.priority <= own:
                continue
            effective = max(own, _inherited_priority(conn, row.id, own))
            if effective < row.priority:
                lowered.append((row, effective))
        _set(conn, lowered)
        needs = open_dependencies(conn, [row.id for row, _ in lowered if row.blockers and not row.held])


def set_own_priority(conn: Connection, row: Any, priority: int) -> None:
    """Set the own priority of a job and its shards; raise or restore the priority of their dependencies."""
    shards = conn.execute(select(*_COLUMNS).where(job.c.part_of == row.id, job.c.state.in_(OPEN))).all()
    effective = max(priority, _inherited_priority(conn, row.id, priority))
    for one in (row, *shards):
        kept = one.inputs or {}
        own = {OWN_PRIORITY: priority} if OWN_PRIORITY in kept or effective != priority else {}
        values = {"priority": effective, "inputs": {**kept, **own} if own else one.inputs}
        conn.execute(update(job).where(job.c.id == one.id).values(**values))
    needs = open_dependencies(conn, [row.id]) if row.blockers and not row.held else []
    if effective > row.priority:
        raise_priority(conn, needs, effective)
    else:
        restore_priority(conn, needs)


def _inherited_priority(conn: Connection, job_id: int, own: int) -> int:
    """Return the highest priority of a job's dependants; `own` if it has none."""
    waiting = (
        select(func.max(job.c.priority))
        .join(dependency, dependency.c.job_id == job.c.id)
        .where(dependency.c.needs == job_id, job.c.state == JobState.QUEUED, job.c.held == 0)
    )
    found = conn.execute(waiting).scalar_one()
    return own if found is None else int(found)


def _locked(conn: Connection, ids: Sequence[int]) -> list[Any]:
    rows: list[Any] = []
    for start in range(0, len(ids), BATCH_SIZE):
        query = select(*_COLUMNS).where(job.c.id.in_(ids[start : start + BATCH_SIZE]), job.c.state.in_(OPEN))
        rows += conn.execute(query.order_by(job.c.id).with_for_update()).all()
    return [row for row in rows if isinstance(row.priority, int)]  # not of a malformed row


def _set(conn: Connection, changed: Sequence[tuple[Any, int]]) -> None:
    if changed:
        conn.execute(
            _SET,
            [
                {
                    "of_job": row.id,
                    "effective": priority,
                    "kept_inputs": {OWN_PRIORITY: row.priority, **(row.inputs or {})},
                }
                for row, priority in changed
            ],
        )
