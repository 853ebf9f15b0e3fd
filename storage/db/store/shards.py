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
_VALUES = {
    "sqlite": "CASE WHEN json_valid(progress) THEN json_extract(progress, '$.{0}') END",
    "postgresql": "CAST(progress ->> '{0}' AS double precision)",
}
_PROGRESS = {
    dialect: text(
        "SELECT part_of, state, count(*) AS number, "
        + ", ".join(f"sum({value.format(name)}) AS {name}" for name in ("done", "total", "rate"))
        + f" FROM job WHERE {IS_SHARD} AND part_of IN :parents GROUP BY part_of, state"
    ).bindparams(bindparam("parents", expanding=True))
    for dialect, value in _VALUES.items()
}


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


def shards_of(conn: Connection, parent: int, *, most: int | None = None) -> list[Any]:
    """Return the rows of a parent's first shards, in the order of sample indices."""
    query = _SHARDS_OF if most is None else _SHARDS_OF.limit(most)
    return list(conn.execute(query, {"whole": parent}))


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
    """Return the progress of the shards of each parent; of ten thousand shards the database adds it up."""
    if not parents:
        return {}
    counted = defaultdict(list)
    for row in conn.execute(_PROGRESS[conn.dialect.name], {"parents": list(parents)}):
        counted[row.part_of].append(row)
    running = select(job.c.part_of, job.c.worker).where(
        text(IS_SHARD), job.c.part_of.in_(parents), job.c.state == JobState.RUNNING
    )
    workers = defaultdict(set)
    for row in conn.execute(running):
        workers[row.part_of].add(row.worker)
    return {parent: _summary(states, workers[parent]) for parent, states in counted.items()}


def _summary(states: Sequence[Any], workers: set[str | None]) -> ShardSummary:
    return ShardSummary(
        number=sum(row.number for row in states),
        ended=sum(row.number for row in states if state_of(row.state).terminal),
        running=sum(row.number for row in states if row.state == JobState.RUNNING),
        done=int(sum((row.total if row.state == JobState.SUCCEEDED else row.done) or 0 for row in states)),
        total=int(sum(row.total or 0 for row in states)),
        rate=float(sum(row.rate or 0 for row in states if row.state == JobState.RUNNING)),
        workers=tuple(sorted(one for one in workers if one)),
    )
