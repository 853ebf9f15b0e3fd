"""
Checkpoints that a queued or running job needs, and that retention must keep.

A checkpoint is chosen first and pinned later, and retention may run in between. So a pin locks the
checkpoint's row and fails if it is gone, and retention locks the rows before it reads the pins.
"""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection, case, func, literal_column, select

from jobs.states import JobState
from storage.db.rows import Checkpoint
from storage.db.tables import checkpoint, job

LIVE = (JobState.QUEUED, JobState.RUNNING)


def pinned_ids(inputs: dict[str, Any] | None) -> set[int]:
    """Return the checkpoints that a job has pinned: its source, and those of --grid-epochs."""
    fixed = inputs or {}
    one = {fixed["checkpoint_id"]} if "checkpoint_id" in fixed else set()
    return one | set(fixed.get("checkpoint_ids", ()))


def _source_is(conn: Connection, job_id: int) -> Any:
    """Return the condition that a job's spec names this source; false for malformed specs."""
    if conn.dialect.name == "sqlite":
        read = case((func.json_valid(job.c.spec) == 1, job.c.spec), else_=literal_column("'{}'"))
        return func.json_extract(read, "$.source") == job_id
    return job.c.spec["source"].as_string() == str(job_id)


def lock_checkpoints(conn: Connection, ids: Collection[int]) -> bool:
    """Lock the rows of checkpoints until the transaction ends; return False if one was deleted."""
    held = select(checkpoint.c.id).where(checkpoint.c.id.in_(ids)).order_by(checkpoint.c.id)
    return len(conn.execute(held.with_for_update(read=True)).all()) == len(ids)


def deletable(conn: Connection, job_id: int, ids: Sequence[int]) -> list[Checkpoint]:
    """Return those of a job's checkpoints that no job has pinned or names; their rows are locked."""
    chosen = select(checkpoint).where(checkpoint.c.id.in_(ids), checkpoint.c.job_id == job_id)
    rows = [Checkpoint.from_row(row) for row in conn.execute(chosen.with_for_update())]
    if not rows:
        return []
    live = select(job.c.inputs).where(job.c.state.in_(LIVE), job.c.inputs.is_not(None))
    pinned = {one for (inputs,) in conn.execute(live) for one in pinned_ids(inputs)}
    # 'best' and 'last' are resolved when the job begins, but an epoch that is named must stay.
    reads_this = _source_is(conn, job_id)
    named = {
        str(which)
        for (which,) in conn.execute(
            select(job.c.spec["checkpoint"].as_string()).where(
                job.c.state == JobState.QUEUED, job.c.kind.not_in(("train", "import")), reads_this
            )
        )
    }
    return [
        one for one in rows if one.id not in pinned and not (one.kind != "resume" and str(one.epoch) in named)
    ]
