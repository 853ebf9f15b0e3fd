"""
Priority inheritance: a job that waits lends its priority to the jobs that it waits for.

The column `priority` is what claims and preemption compare: the highest of the job's own and those
of all jobs that wait for it, directly or not. The own priority is kept in `inputs`, under
OWN_PRIORITY, from the first loan on: a column of its own would need a migration, and workers of an
older version keep what they find in `inputs`. A held job lends nothing, because it waits for a person.

Every function runs in the transaction that makes, holds, releases or ends the waiting job.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, update

from jobs.states import JobState
from storage.db.rows import OWN_PRIORITY
from storage.db.tables import dependency, job

OPEN = (JobState.QUEUED, JobState.RUNNING)
AT_ONCE = 500

_SET = (
    update(job)
    .where(job.c.id == bindparam("of_job"))
    .values(
        priority=bindparam("effective", type_=job.c.priority.type),
        inputs=bindparam("kept", type_=job.c.inputs.type),
    )
)


def needs_of(conn: Connection, ids: Sequence[int]) -> list[int]:
    """Return the open jobs that these wait for."""
    found: set[int] = set()
    for start in range(0, len(ids), AT_ONCE):
        some = ids[start : start + AT_ONCE]
        query = select(dependency.c.needs).join(job, job.c.id == dependency.c.needs)
        query = query.where(dependency.c.job_id.in_(some), job.c.state.in_(OPEN))
        found.update(conn.execute(query).scalars())
    return sorted(found)


def lend(conn: Connection, needs: Sequence[int], priority: int) -> None:
    """Raise the priority of jobs that are waited for, and of those that they wait for."""
    while needs:
        raised = [row for row in _locked(conn, needs) if row.priority < priority]
        _set(conn, [(row, priority) for row in raised])
        # A held job passes nothing on until it is released.
        needs = needs_of(conn, [row.id for row in raised if row.blockers and not row.held])


def repay(conn: Connection, needs: Sequence[int]) -> None:
    """Lower the priority of jobs that were waited for to what is still lent to them."""
    while needs:
        lowered = []
        for row in _locked(conn, needs):
            own = (row.inputs or {}).get(OWN_PRIORITY)
            if not isinstance(own, int) or row.priority <= own:
                continue
            still = max(own, _lent(conn, row.id, own))
            if still < row.priority:
                lowered.append((row, still))
        _set(conn, lowered)
        needs = needs_of(conn, [row.id for row, _ in lowered if row.blockers and not row.held])


def _lent(conn: Connection, job_id: int, own: int) -> int:
    """Return the highest priority of the jobs that wait for this one; `own` if none does."""
    waiting = (
        select(func.max(job.c.priority))
        .join(dependency, dependency.c.job_id == job.c.id)
        .where(dependency.c.needs == job_id, job.c.state == JobState.QUEUED, job.c.held == 0)
    )
    found = conn.execute(waiting).scalar_one()
    return own if found is None else int(found)


def _locked(conn: Connection, ids: Sequence[int]) -> list[Any]:
    columns = (job.c.id, job.c.priority, job.c.inputs, job.c.blockers, job.c.held)
    rows: list[Any] = []
    for start in range(0, len(ids), AT_ONCE):
        query = select(*columns).where(job.c.id.in_(ids[start : start + AT_ONCE]), job.c.state.in_(OPEN))
        rows += conn.execute(query.order_by(job.c.id).with_for_update()).all()
    return [row for row in rows if isinstance(row.priority, int)]  # not of a row that no ganq wrote


def _set(conn: Connection, changed: Sequence[tuple[Any, int]]) -> None:
    if changed:
        conn.execute(
            _SET,
            [
                {
                    "of_job": row.id,
                    "effective": priority,
                    "kept": {OWN_PRIORITY: row.priority, **(row.inputs or {})},
                }
                for row, priority in changed
            ],
        )
