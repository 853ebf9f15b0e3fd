"""
Shards: a large generation is a parent job and its shards, each a job with its own lease.

The parent depends on its shards through the dependency table, and is then claimed itself, to merge and
publish them. So a lost shard is requeued like any job, and neither two shards that finish last at the same
time nor a crash while merging leave the parent waiting.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, text, update

from jobs.states import JobState
from storage.db.rows import state_of
from storage.db.tables import dependency, event, job, utcnow

IS_SHARD = "part_of IS NOT NULL"
_SHARDS_OF = select(job).where(job.c.part_of == bindparam("whole")).order_by(job.c.id)  # built once


@dataclass(frozen=True)
class ShardSummary:
    """Progress of the shards of one parent."""

    number: int
    ended: int
    running: int
    done: int
    total: int
    rate: float
    workers: tuple[str, ...]

    @property
    def under_way(self) -> bool:
        return self.running > 0 or self.ended > 0


def insert_shards(
    conn: Connection,
    parent: int,
    submit_key: str,
    common: dict[str, Any],
    shards: Sequence[tuple[dict[str, Any], int]],
    *,
    needs: Sequence[int],
    blockers: int,
    max_parallel: int,
) -> list[int]:
    """
    Insert the shards of a job, in the transaction that inserts the parent.

    Args:
        common: columns that shards and parent share.
        shards: (spec, number of images) of each.
        needs, blockers: the jobs on which the parent depends, and how many of them have not succeeded.
        max_parallel: shards that may run at once; 0: all of them.

    Returns:
        Their ids.
    """
    rows = [
        {
            **common,
            "submit_key": hashlib.sha256(f"{submit_key}/{place}".encode()).hexdigest(),
            "spec": spec,
            "part_of": parent,
            "blockers": blockers + (max_parallel > 0 and place >= max_parallel),
            "progress": {"done": 0, "total": images, "unit": "images"},
        }
        for place, (spec, images) in enumerate(shards)
    ]
    # RETURNING may return the ids in any order; the key identifies them.
    made = conn.execute(insert(job).values(created_at=utcnow()).returning(job.c.id, job.c.submit_key), rows)
    by_key = {row.submit_key: row.id for row in made}
    ids = [by_key[row["submit_key"]] for row in rows]
    links = [{"job_id": parent, "needs": one} for one in ids]
    links += [{"job_id": one, "needs": needed} for one in ids for needed in needs]
    if max_parallel > 0:
        links += [{"job_id": ids[i], "needs": ids[i - max_parallel]} for i in range(max_parallel, len(ids))]
    conn.execute(insert(dependency), links)
    conn.execute(
        insert(event).values(at=utcnow()),
        [{"job_id": one, "type": "submitted", "detail": {"part_of": parent}} for one in ids],
    )
    return ids


def shards_of(conn: Connection, parent: int) -> list[Any]:
    """Return the rows of a parent's shards, in the order of sample indices."""
    return list(conn.execute(_SHARDS_OF, {"whole": parent}))


def hold_shards(conn: Connection, parent: int, *, held: bool) -> None:
    """Hold the shards that have not started, or release all that have not ended."""
    states = (JobState.QUEUED,) if held else (JobState.QUEUED, JobState.RUNNING)
    waiting = update(job).where(job.c.part_of == parent, job.c.state.in_(states))
    conn.execute(waiting.values(held=int(held), rung_at=None))


def pause_shards(conn: Connection, parent: int) -> bool:
    """Request the workers of running shards to stop; return whether there are any."""
    running = update(job).where(job.c.part_of == parent, job.c.state == JobState.RUNNING, job.c.held == 0)
    return conn.execute(running.values(held=1)).rowcount > 0


def summaries(conn: Connection, parents: Sequence[int]) -> dict[int, ShardSummary]:
    """Return the progress of the shards of each parent, by one query."""
    if not parents:
        return {}
    rows = defaultdict(list)
    query = select(job.c.part_of, job.c.state, job.c.progress, job.c.worker)
    for row in conn.execute(query.where(text(IS_SHARD), job.c.part_of.in_(parents))):
        rows[row.part_of].append(row)
    return {parent: _summary(shards) for parent, shards in rows.items()}


def _summary(rows: Sequence[Any]) -> ShardSummary:
    done, total, rate = 0, 0, 0.0
    for row in rows:
        progress = row.progress or {}
        images = int(progress.get("total") or 0)
        total += images
        done += images if row.state == JobState.SUCCEEDED else int(progress.get("done") or 0)
        if row.state == JobState.RUNNING:
            rate += float(progress.get("rate") or 0.0)
    running = [row for row in rows if row.state == JobState.RUNNING]
    return ShardSummary(
        number=len(rows),
        ended=sum(state_of(row.state).terminal for row in rows),
        running=len(running),
        done=done,
        total=total,
        rate=rate,
        workers=tuple(sorted({row.worker for row in running if row.worker})),
    )
